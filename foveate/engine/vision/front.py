"""From pixels to fewer visual tokens, in whichever of three ways a method goes: a smaller picture, fewer patches inside the
encoder, or fewer tokens behind it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import InputError, UnsupportedModelError
from ...methods.base import EncoderReducer, FrontReducer, KeepAll, ProjectorReducer
from ...methods.tools.selection import grid_middles
from ...report import Clock
from ...tokens import Reduction, resolve_budget
from ..model.anatomy import Anatomy
from ..model.seams import encode_visuals, with_features
from .arrangement import Arrangement, frames, grids
from .blocks import Shrinking
from .encoding import EncodedPictures, Visuals, check, encode, notes_of, projector_input, reduce, unchanged
from .grouping import Group, Reduced, joined, laid_out, shares
from .question import Asking

PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}


def check_front(parts: Anatomy, method: FrontReducer) -> None:
    """Raise ``UnsupportedModelError`` where the model lacks what the method needs."""
    for layer in method.encoder_layers(len(parts.layers)):
        parts.encoder_block(layer)
    if isinstance(method, EncoderReducer) and not method.keeps_all:
        _check_shrinkable(parts, method)
        size = parts.model.config.vision_config.image_size
        grid = parts.grid(*((size, size) if isinstance(size, int) else size))
        if not method.covers(grid[0] * grid[1]):
            Shrinking(parts, method, grid)


def _check_shrinkable(parts: Anatomy, method: FrontReducer) -> None:
    if not parts.family.shrinkable:
        raise UnsupportedModelError(
            f"{method.name} acts inside the vision encoder, and {parts.family.name} lays out or merges what leaves it by its place "
            "in the picture. Use a method that acts behind the encoder, such as 'prumerge+'."
        )


def encode_and_reduce(
    parts: Anatomy,
    method: FrontReducer,
    kwargs: dict[str, Any],
    clock: Clock,
    asked: Asking | None = None,
    runs: list[int] | None = None,
    locate: Callable[[list[int]], list[int]] | None = None,
) -> Visuals:
    """Encode pictures, or videos, and reduce their tokens.

    Parameters
    ----------
    parts : where the parts of the model are, for the modality.
    method : what reduces.
    kwargs : arguments of the model's own encoding.
    clock : what takes the time.
    asked : gives the question, where the method reads that.
    runs : lengths of the runs of placeholders in the prompts.
    locate : from placeholders of each item to the prompt it belongs to; raises ``InputError`` where they do not fit.

    Raises
    ------
    InputError : the pictures give no grid of tokens, do not fit the prompts, or hold NaN or infinite values.
    UnsupportedModelError : the model is not built so that the method could act.
    """
    parts.check_modality()
    size = kwargs[PIXELS[parts.modality]].shape[-2:]
    flat = parts.arrangement in ("thw", "sizes")  # pixels are no pictures there, or only with their padding
    patches, whole = (0, 0) if flat else parts.grid(*size), method.keeps_all
    if not flat and not all(patches):
        raise InputError(f"pictures of {size[0]} x {size[1]} pixels are smaller than one patch of the vision encoder.")
    if parts.arrangement in ("grid", "frames"):
        every = patches[0] * patches[1] * (kwargs[PIXELS["video"]].shape[1] if parts.modality == "video" else 1)
        whole = whole or resolve_budget(method.budget, every) == every
    if isinstance(method, EncoderReducer) and not whole:
        return _shrunk(parts, method, patches, kwargs, clock, locate)
    if not isinstance(method, ProjectorReducer | EncoderReducer):
        raise UnsupportedModelError(f"{type(method).__name__} is neither a ProjectorReducer nor an EncoderReducer.")
    reducer = method if isinstance(method, ProjectorReducer) else KeepAll()
    smaller = reducer.picture(patches) if not flat and not whole else None
    if smaller is not None and parts.arrangement == "grid" and parts.projector is not None and parts.takes_any_size:
        return _resized(parts, reducer, patches, smaller, kwargs, clock, locate)
    layers = () if whole else method.encoder_layers(len(parts.layers))
    with clock.measure("vision"):
        encoded = encode(parts, layers, kwargs, project=whole or method.reads_projected, runs=runs)
    rows = None if locate is None else locate(encoded.arrangement.sizes)
    if whole and (method.temporal is None or parts.modality == "image"):
        return unchanged(parts, encoded)
    visuals = reduce(parts, reducer, encoded, clock, asked, rows)
    if smaller is not None:
        note = f"{method.name}: {parts.tower_kind.model_type} takes no smaller pictures; its features were shrunk instead"
        visuals = replace(visuals, notes=[*visuals.notes, note])
    return visuals


def _rows_of(parts: Anatomy, pixels: Tensor, lead: int, patches: tuple[int, int]) -> Arrangement:
    """How the tokens of the full encoder would be arranged."""
    tokens = lead + patches[0] * patches[1]
    if parts.modality == "video":
        return frames(len(pixels), pixels.shape[1], tokens, patches, pixels.device)
    return grids(len(pixels), tokens, patches, pixels.device)


def _shrunk(
    parts: Anatomy,
    method: EncoderReducer,
    grid: tuple[int, int],
    kwargs: dict[str, Any],
    clock: Clock,
    locate: Callable[[list[int]], list[int]] | None,
) -> Visuals:
    """Fewer patches inside the encoder."""
    _check_shrinkable(parts, method)
    pixels, notes = kwargs[PIXELS[parts.modality]], []
    cells = grid[0] * grid[1]
    if parts.modality == "video" and method.budget is not None:  # all frames go through the encoder together
        each = min(shares(method.budget, [cells] * pixels.shape[1]) or [cells])
        method = method.with_budget(max(1, each))
        notes = [f"{method.name}: {each} tokens of each frame"]
    if method.temporal is not None and parts.modality == "video":
        notes.append(f"{method.name} acts inside the encoder, where temporal= has no effect")
    shrinking = Shrinking(parts, method, grid)
    with clock.measure("vision"):
        with shrinking.hooks(), projector_input(parts, skip=True) as seen:
            output = encode_visuals(parts.model.base_model, parts.modality, kwargs)
        shrinking.check_ran()
        features = seen[0]
        lead = features.shape[1] - shrinking.cell.shape[1]
        arrangement = _rows_of(parts, pixels, lead, grid)
        if locate is not None:
            locate(arrangement.sizes)
        patches, reduction = shrinking.result(features[:, lead:])
        counts, _ = check(method, cells, patches, reduction, reduction.mask())
        notes = [*notes_of(parts, method), *shrinking.notes, *notes]
        visuals = _behind_encoder(parts, output, arrangement, features[:, :lead], patches, reduction, counts, notes)
    return replace(visuals, encoder_counts=shrinking.counts)


def _behind_encoder(
    parts: Anatomy,
    output: Any,
    arrangement: Arrangement,
    front: Tensor,
    patches: Tensor,
    reduction: Reduction,
    counts: list[int],
    notes: list[str],
) -> Visuals:
    """Items of what left the encoder: ``front`` [R, L, C] tokens in front of each grid, and ``patches`` [R, M, C]."""
    found = [Reduced(Group(None, arrangement.units), reduction, counts, patches)]
    layout = laid_out(arrangement, found)
    tokens = torch.cat([patches[reduction.mask()], front.flatten(0, 1)])
    pool = tokens if parts.projector is None else parts.projector(tokens[None])[0]
    embeds = [pool[order] for order in layout.order]
    output = with_features(output, embeds)
    return Visuals(output, embeds, joined(arrangement, found), layout.kept, arrangement, changed=True, notes=notes)


def _resized(
    parts: Anatomy,
    method: ProjectorReducer,
    grid: tuple[int, int],
    smaller: tuple[int, int],
    kwargs: dict[str, Any],
    clock: Clock,
    locate: Callable[[list[int]], list[int]] | None,
) -> Visuals:
    """A smaller picture: the encoder interpolates its position embeddings. Each token stands in the middle of what it shows."""
    pixels: Tensor = kwargs["pixel_values"]
    size = [side * count // full for side, count, full in zip(pixels.shape[-2:], smaller, grid, strict=True)]
    with clock.measure("vision"):
        low, high = pixels.amin((-2, -1), keepdim=True), pixels.amax((-2, -1), keepdim=True)
        small = F.interpolate(pixels.float(), size, mode="bicubic", antialias=True, align_corners=False)
        small = small.to(pixels).clamp(low, high)
        encoded: EncodedPictures = encode(
            parts, (), {**kwargs, "pixel_values": small, "interpolate_pos_encoding": True}, project=False
        )
        features = encoded.features.unflatten(0, (len(pixels), -1))
        lead = features.shape[1] - smaller[0] * smaller[1]
        arrangement = _rows_of(parts, pixels, lead, grid)
        if locate is not None:
            locate(arrangement.sizes)
        reduction = _shown(grid, smaller, pixels)
        patches = features[:, lead:]
        counts, _ = check(method, grid[0] * grid[1], patches, reduction, reduction.mask())
        notes = [f"{method.name}: pictures were shrunk to {size[0]} x {size[1]} pixels before the encoder"]
        return _behind_encoder(parts, encoded.output, arrangement, features[:, :lead], patches, reduction, counts, notes)


def _shown(grid: tuple[int, int], smaller: tuple[int, int], like: Tensor) -> Reduction:
    """Which cells of a grid the cells of a smaller one show, and their middles."""
    (rows, columns), (r, c) = grid, smaller
    middle = grid_middles(rows, columns, r, c)
    row, column = ((2 * torch.arange(full) + 1) * part // (2 * full) for full, part in zip(grid, smaller, strict=True))
    owner = row[:, None] * c + column
    index, owner = (cells.flatten().to(like.device).expand(len(like), -1) for cells in (middle, owner))
    return Reduction(index, owner=owner)
