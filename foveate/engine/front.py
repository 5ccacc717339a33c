"""From pixels to fewer visual tokens, in whichever of three ways a method goes: a smaller picture, fewer patches inside the
encoder, or fewer tokens behind it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError, UnsupportedModelError
from ..methods.base import EncoderReducer, FrontReducer, TokenReducer
from ..methods.selection import grid_middles
from ..report import Clock
from ..tokens import Reduction, resolve_budget
from .asking import Asking
from .families import Anatomy
from .seams import encode_images
from .shrinking import Shrinking
from .vision import Visuals, check, encode, kept_tokens, notes_of, projector_input, reduce, reduced_visuals, unchanged


def check_front(parts: Anatomy, method: FrontReducer) -> None:
    """Raise ``UnsupportedModelError`` where the model lacks what the method needs."""
    for layer in method.encoder_layers(len(parts.layers)):
        parts.encoder_block(layer)
    if isinstance(method, EncoderReducer):
        size = parts.model.config.vision_config.image_size
        grid = parts.grid(*((size, size) if isinstance(size, int) else size))
        if not method.covers(grid[0] * grid[1]):
            Shrinking(parts, method, grid)


def encode_and_reduce(
    parts: Anatomy, method: FrontReducer, kwargs: dict[str, Any], clock: Clock, asked: Asking | None = None
) -> Visuals:
    """Encode the pictures in ``kwargs`` (taken out of it) and reduce their tokens.

    Parameters
    ----------
    parts : where the parts of the model are.
    method : what reduces.
    kwargs : arguments of the call.
    clock : what takes the time.
    asked : gives the question, where the method reads that.

    Raises
    ------
    InputError : the pictures give no grid of tokens, or NaN or infinite values.
    """
    size = kwargs["pixel_values"].shape[-2:]
    grid, parts = parts.grid(*size), replace(parts, chosen=kwargs.get("vision_feature_layer"))
    if not all(grid):
        raise InputError(f"pictures of {size[0]} x {size[1]} pixels are smaller than one patch of the vision encoder.")
    if resolve_budget(method.budget, grid[0] * grid[1]) == grid[0] * grid[1]:
        with clock.measure("vision"):
            encoded = encode(parts, (), kwargs, project=True)
        return unchanged(encoded, list(encoded.output.pooler_output))
    if isinstance(method, EncoderReducer):
        return _shrunk(parts, method, grid, kwargs, clock)
    if not isinstance(method, TokenReducer):
        raise UnsupportedModelError(f"{type(method).__name__} is neither a TokenReducer nor an EncoderReducer.")
    smaller = method.picture(grid)
    if smaller is not None and parts.takes_any_size:
        return _resized(parts, method, grid, smaller, kwargs, clock)
    with clock.measure("vision"):
        encoded = encode(parts, method.encoder_layers(len(parts.layers)), kwargs, project=method.reads_projected)
    visuals = reduce(parts, method, encoded, clock, asked)
    if smaller is not None:
        note = f"{method.name}: {parts.tower_kind.model_type} takes no smaller pictures; its features were shrunk instead"
        visuals = replace(visuals, notes=[*visuals.notes, note])
    return visuals


def _shrunk(parts: Anatomy, method: EncoderReducer, grid: tuple[int, int], kwargs: dict[str, Any], clock: Clock) -> Visuals:
    """Fewer patches inside the encoder."""
    shrinking = Shrinking(parts, method, grid)
    with clock.measure("vision"):
        with shrinking.hooks(), projector_input(parts, skip=True) as seen:
            output = encode_images(parts.model.base_model, kwargs)
        shrinking.check_ran()
        features = seen[0]
        lead = features.shape[1] - shrinking.cell.shape[1]
        patches, reduction = shrinking.result(features[:, lead:])
        counts, _ = check(method, grid[0] * grid[1], patches, reduction, reduction.mask())
        whole = parts.projector(kept_tokens(torch.cat([features[:, :lead], patches], 1), reduction.mask(), lead)[None])[0]
    notes = [*notes_of(parts, method), *shrinking.notes]
    return replace(reduced_visuals(output, whole, reduction, counts, lead, grid, notes), encoder_counts=shrinking.counts)


def _resized(
    parts: Anatomy, method: TokenReducer, grid: tuple[int, int], smaller: tuple[int, int], kwargs: dict[str, Any], clock: Clock
) -> Visuals:
    """A smaller picture: the encoder interpolates its position embeddings. Each token stands in the middle of what it shows."""
    pixels: Tensor = kwargs["pixel_values"]
    size = [side * count // full for side, count, full in zip(pixels.shape[-2:], smaller, grid, strict=True)]
    with clock.measure("vision"):
        low, high = pixels.amin((-2, -1), keepdim=True), pixels.amax((-2, -1), keepdim=True)
        small = F.interpolate(pixels.float(), size, mode="bicubic", antialias=True, align_corners=False)
        kwargs["pixel_values"] = small.to(pixels).clamp(low, high)
        encoded = encode(parts, (), kwargs, project=True, interpolate_pos_encoding=True)
        reduction = _shown(grid, smaller, pixels)
        projected = torch.stack(list(encoded.output.pooler_output))
        counts, _ = check(method, grid[0] * grid[1], projected, reduction, reduction.mask())
    notes = [f"{method.name}: pictures were shrunk to {size[0]} x {size[1]} pixels before the encoder"]
    return reduced_visuals(encoded.output, projected.flatten(0, 1), reduction, counts, encoded.lead, grid, notes)


def _shown(grid: tuple[int, int], smaller: tuple[int, int], like: Tensor) -> Reduction:
    """Which cells of a grid the cells of a smaller one show, and their middles."""
    (rows, columns), (r, c) = grid, smaller
    middle = grid_middles(rows, columns, r, c)
    row, column = ((2 * torch.arange(full) + 1) * part // (2 * full) for full, part in zip(grid, smaller, strict=True))
    owner = row[:, None] * c + column
    index, owner = (cells.flatten().to(like.device).expand(len(like), -1) for cells in (middle, owner))
    return Reduction(index, owner=owner)
