"""Embeddings that a request brings are checked before they reach the engine, which would stop for all requests."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import InputError


def check_picture(data: object) -> None:
    """Raise ``InputError`` for a tensor that is neither embeddings nor a picture, as which it would be taken."""
    if isinstance(data, Tensor) and (data.ndim != 3 or 3 not in (data.shape[0], data.shape[-1])):
        raise InputError(
            f"a tensor of shape {tuple(data.shape)} is neither a picture [3, height, width] nor image_embeds [tokens, width]"
        )


def check_grid(grid: object, merge: int) -> list[int]:
    """Visual tokens of each image, by its ``image_grid_thw`` [images, 3]; raise ``InputError`` where it is none."""
    if not isinstance(grid, Tensor) or grid.is_floating_point() or grid.ndim != 2 or grid.shape[1] != 3 or not len(grid):
        raise InputError("image_grid_thw: expected a tensor of whole numbers [images, 3], the (t, h, w) patches of each image")
    frames, sides = grid[:, 0], grid[:, 1:]
    if not bool((frames == 1).all() and (sides > 0).all() and (sides % merge == 0).all()):
        raise InputError(f"image_grid_thw={grid.tolist()}: expected one frame, and sides that are multiples of {merge}")
    counts: list[int] = (sides.prod(-1) // merge**2).tolist()
    return counts


def check_placed(positions: Tensor, extents: Tensor, counts: list[int], longest: int) -> None:
    """Raise ``InputError`` unless every embedding has a place inside its image.

    Parameters
    ----------
    positions : [sum of counts, 3] (t, h, w) of each embedding in its image; t may go on beyond the extent, as in long videos.
    extents : [images] by how much an image moves on the text after it.
    counts : embeddings of each image.
    longest : what all extents together may be.
    """
    if positions.is_floating_point() or tuple(positions.shape) != (sum(counts), 3):
        raise InputError(
            f"image_positions: {positions.dtype} of shape {tuple(positions.shape)}; expected whole numbers [{sum(counts)}, 3], "
            "the (t, h, w) of each embedding"
        )
    if extents.is_floating_point() or tuple(extents.shape) != (len(counts),):
        raise InputError(
            f"image_extents: {extents.dtype} of shape {tuple(extents.shape)}; expected whole numbers [{len(counts)}], one per image"
        )
    if not 0 < int(extents.min()) <= int(extents.sum()) <= longest:
        raise InputError(f"image_extents={extents.tolist()}: each must be at least 1, and together at most {longest}")
    ends = extents.repeat_interleave(torch.tensor(counts))[:, None].repeat(1, 3)
    ends[:, 0] = longest
    inside = (positions >= 0) & (positions < ends)
    if not bool(inside.all()):
        raise InputError("image_positions lie outside of their images: each must be at least 0 and below the extent")
