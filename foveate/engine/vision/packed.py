"""Fewer patches before the encoder: what a method leaves of the pixels, encoded at its own places."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...errors import FoveateError, InputError, UnsupportedModelError
from ...methods.pixels import PixelReducer
from ...report import Clock
from ...tokens import ELSEWHERE, Reduction
from ..model.anatomy import Anatomy
from ..model.packing import packed_inputs
from ..model.seams import deepstack, with_features
from .arrangement import ARRANGEMENTS, Arrangement, Seen
from .assembly import Visuals, joined, laid_out
from .reduction import Reduced, check


def check_packs(parts: Anatomy, method: PixelReducer) -> None:
    """Raise ``UnsupportedModelError`` unless the encoder takes a sequence of any patches."""
    if not parts.tower_kind.packs:
        raise UnsupportedModelError(
            f"{method.name} leaves out patches before the vision encoder, and that of {parts.family.name} takes whole pictures "
            "only. It works with Qwen2-VL, Qwen2.5-VL and Qwen3-VL; use a method that acts after the encoder, such as 'prumerge+'."
        )


def packed(parts: Anatomy, method: PixelReducer, kwargs: dict[str, Any], clock: Clock, runs: list[int]) -> Visuals | None:
    """Encode what a method leaves of pictures or videos; None where it leaves everything.

    Parameters
    ----------
    parts : where the parts of the model are, for the modality.
    kwargs : arguments of the model's own encoding.
    clock : what takes the time.
    runs : lengths of the runs of placeholders in the prompts.

    Raises
    ------
    UnsupportedModelError : the encoder takes whole pictures only.
    InputError : the pixels hold NaN or infinite values.
    FoveateError : the method breaks its contract.
    """
    check_packs(parts, method)
    pixels, grid_thw = _inputs(parts, kwargs)
    if not bool(torch.isfinite(pixels).all()):
        raise InputError(f"{method.name}: the pixels hold NaN or infinite values. Check the picture and its image processor.")
    tower: Any = parts.tower
    cells = pixels.unflatten(0, (-1, int(tower.spatial_merge_size) ** 2))
    sizes = (grid_thw.prod(1) // cells.shape[1]).tolist()
    with clock.measure("selection"):
        sources = [_sources(method, own.flatten(1)) for own in cells.split(sizes)]
        stays = torch.cat([source == torch.arange(len(source), device=source.device) for source in sources])
        if bool(stays.all()):
            return None
    with clock.measure("vision"):
        more = packed_inputs(parts, grid_thw, stays)
        output = tower(cells[stays].flatten(0, 1).to(tower.dtype), grid_thw=grid_thw, return_dict=True, **more)
        seen = Seen(parts, kwargs, None, [output.pooler_output], runs)
        arrangement = ARRANGEMENTS[parts.arrangement or ""](seen)
        return _laid(method, output, arrangement, sources, stays)


def _inputs(parts: Anatomy, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    video = parts.modality == "video"
    pixels: Tensor = kwargs["pixel_values_videos" if video else "pixel_values"]
    return pixels, kwargs["video_grid_thw" if video else "image_grid_thw"]


def _sources(method: PixelReducer, cells: Tensor) -> Tensor:
    source, number = method.sources(cells), torch.arange(len(cells), device=cells.device)
    fits = isinstance(source, Tensor) and source.dtype == torch.long and source.shape == number.shape
    if not fits or not bool(((source >= 0) & (source < len(cells))).all()) or not torch.equal(source[source], source):
        raise FoveateError(
            f"{method.name}: sources has to be int64 of shape [{len(cells)}], of cells that stand for themselves. "
            "This is a fault of the method."
        )
    return source


def _laid(method: PixelReducer, output: Any, arrangement: Arrangement, sources: list[Tensor], stays: Tensor) -> Visuals:
    """What the encoder made of the cells that stay, item by item, in the order of the prompt."""
    units = arrangement.units
    kept = stays.split([len(unit.places) for unit in units])
    counts = [int(mask.sum()) for mask in kept]
    some = [number for number, count in enumerate(counts) if count]  # a frame may be gone as a whole
    index = torch.nn.utils.rnn.pad_sequence([kept[number].nonzero().flatten() for number in some], batch_first=True)
    valid = (
        torch.arange(index.shape[1], device=index.device) < torch.tensor([counts[n] for n in some], device=index.device)[:, None]
    )
    features: Tensor = output.pooler_output
    outputs = features.new_zeros(*index.shape, features.shape[-1])
    outputs[valid] = features
    own = [_owners(arrangement, sources, number, kept) for number in range(len(units))]
    owner = torch.nn.utils.rnn.pad_sequence([own[number] for number in some], batch_first=True, padding_value=-1)
    reduction = Reduction(index, valid=valid, owner=owner)
    check(method, owner.shape[1], outputs, reduction, valid)
    emptied = [(unit, mine) for unit, mine, count in zip(units, own, counts, strict=True) if not count]
    found = [Reduced([units[number] for number in some], reduction, [counts[number] for number in some], outputs, emptied=emptied)]
    layout = laid_out(arrangement, found)
    embeds, levels = [features[order] for order in layout.order], deepstack(output)
    if levels is not None:
        levels = [[level[order] for order in layout.order] for level in levels]
    output = with_features(output, embeds, levels)
    return Visuals(output, embeds, joined(arrangement, found), layout.kept, arrangement, changed=True)


def _owners(arrangement: Arrangement, sources: list[Tensor], number: int, kept: tuple[Tensor, ...]) -> Tensor:
    """For each cell of a unit which of its outputs stands for it; ``ELSEWHERE`` where that is in another frame."""
    unit = arrangement.units[number]
    start, place = int(unit.places[0]), sources[unit.item][unit.places]
    inside = (place >= start) & (place < start + len(unit.places))
    rank = kept[number].cumsum(0) - 1
    return torch.where(inside, rank[(place - start).clamp(0, len(unit.places) - 1)], ELSEWHERE)
