"""How the visual tokens of pictures and videos are arranged in the prompt: which placeholder is which cell of which grid.

A picture or video is an *item*: a run of placeholders. Its grids are *units*: the picture, its tiles, or the frames of the video.
Tokens in no grid, such as a newline after a row, are *fixed*: methods never see them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import InputError, UnsupportedModelError
from ..model.anatomy import Anatomy
from ..model.seams import Packing, window_order


@dataclass(frozen=True)
class Unit:
    """One grid of visual tokens, N of them.

    Attributes
    ----------
    item : the picture or video it belongs to, in the order the encoder got them; ``part`` counts the units of an item.
    grid : rows and columns.
    places : [N] which of the item's placeholders its cells are.
    tap : [N] where its cells are among those that ``Arrangement.cells`` gives.
    row : of the encoder's batch, where its [CLS] token is.
    cells : [N] which cells of the grid these are, None = all.
    """

    item: int
    part: int
    grid: tuple[int, int]
    places: Tensor
    tap: Tensor
    row: int = 0
    cells: Tensor | None = None

    def only(self, some: Tensor) -> Unit:
        """The unit without the cells that are not in ``some`` [N] bool."""
        cells = torch.arange(len(some), device=some.device) if self.cells is None else self.cells
        return replace(self, places=self.places[some], tap=self.tap[some], cells=cells[some])

    @property
    def shape(self) -> tuple[int, int]:
        """The grid that methods are told: a row where cells are missing."""
        return self.grid if self.cells is None else (1, len(self.places))


@dataclass(frozen=True)
class Fixed:
    """A placeholder in no grid. It stays; one that ends a row stays while any of the places ``ends`` does."""

    item: int
    place: int
    ends: Tensor | None = None


@dataclass(frozen=True)
class Arrangement:
    """The items of one modality.

    Attributes
    ----------
    sizes : placeholders of each item.
    cells : [R, P, C] patches of an encoder layer -> [F, C] one vector for each token of a grid.
    woven : rows of several units alternate in the prompt, so that tokens can only stand in the order of their places.
    """

    sizes: list[int]
    units: list[Unit]
    fixed: list[Fixed] = field(default_factory=list)
    cells: Callable[[Tensor], Tensor] = lambda patches: patches.flatten(0, 1)
    woven: bool = False

    @property
    def offsets(self) -> list[int]:
        """Where each item begins, if all follow one another."""
        starts = [0]
        for size in self.sizes[:-1]:
            starts.append(starts[-1] + size)
        return starts

    def of_item(self, item: int) -> list[Unit]:
        return [unit for unit in self.units if unit.item == item]


@dataclass(frozen=True)
class Seen:
    """What is known of one call of the encoder.

    Attributes
    ----------
    kwargs : arguments of the call.
    tokens : [R, T, C] about to enter the projector, or None where that is not how the model works.
    projected : what the model made of the pictures: a tensor, or a list with a tensor for each.
    runs : lengths of the runs of placeholders in the prompts.
    packing : how the model lays out tiles, where it does.
    """

    parts: Anatomy
    kwargs: dict[str, Any]
    tokens: Tensor | None
    projected: Any
    runs: list[int]
    packing: Packing | None = None

    @property
    def pixels(self) -> Tensor:
        pixels: Tensor = self.kwargs["pixel_values_videos" if self.parts.modality == "video" else "pixel_values"]
        return pixels

    @property
    def device(self) -> torch.device:
        first = self.projected[0] if self.tokens is None else self.tokens
        device: torch.device = first.device
        return device

    @property
    def patches(self) -> tuple[int, int]:
        """Rows and columns of patches of one picture."""
        return self.parts.grid(*self.pixels.shape[-2:])


def token_grid(tokens: int, patches: tuple[int, int]) -> tuple[int, tuple[int, int]]:
    """How many of ``tokens`` stand before the grid (a [CLS] token), and the grid, which may be coarser than that of patches.

    Raises
    ------
    InputError : they are no grid of these proportions.
    """
    rows, columns = patches
    for lead in (0, 1):
        shrink = math.sqrt(max(1, tokens - lead) / (rows * columns))
        grid = (round(rows * shrink), round(columns * shrink))
        if grid[0] * grid[1] == tokens - lead:
            return lead, grid
    raise InputError(f"pictures of {rows} x {columns} patches gave {tokens} visual tokens and not a grid of them.")


def pooled(patches: tuple[int, int], grid: tuple[int, int]) -> Callable[[Tensor], Tensor]:
    """What makes [F, C], one vector for each token, of [R, P, C] patches: means, where a token stands for several."""

    def cells(values: Tensor) -> Tensor:
        if grid == patches:
            return values.flatten(0, 1)
        planes = values.float().unflatten(1, patches).permute(0, 3, 1, 2)
        return F.adaptive_avg_pool2d(planes, grid).flatten(2).transpose(1, 2).flatten(0, 1).to(values.dtype)

    return cells


def pooled_apart(sizes: list[tuple[int, int]], units: list[Unit], padded: bool = False) -> Callable[[Tensor], Tensor]:
    """The same for pictures of several sizes, one after the other, or ``padded`` to one length; ``sizes`` are in patches."""

    def cells(patches: Tensor) -> Tensor:
        numbers = [rows * columns for rows, columns in sizes]
        own = (
            [each[:number] for each, number in zip(patches, numbers, strict=True)]
            if padded
            else patches.flatten(0, 1).split(numbers)
        )
        return torch.cat([pooled(size, unit.grid)(each[None]) for each, size, unit in zip(own, sizes, units, strict=True)])

    return cells


def of_sizes(sizes: list[tuple[int, int]], merge: int, device: torch.device, padded: bool = False) -> Arrangement:
    """Pictures of so many rows and columns of patches, of which blocks of m x m become a token."""
    units, start = [], 0
    for item, (rows, columns) in enumerate(sizes):
        cell = torch.arange(rows // merge * (columns // merge), device=device)
        units.append(Unit(item, 0, (rows // merge, columns // merge), cell, cell + start))
        start += len(cell)
    return Arrangement([len(unit.places) for unit in units], units, [], pooled_apart(sizes, units, padded))


def grids(rows: int, tokens: int, patches: tuple[int, int], device: torch.device) -> Arrangement:
    """Pictures that are one grid each, perhaps after a [CLS] token."""
    lead, grid = token_grid(tokens, patches)
    number = tokens - lead
    cell = torch.arange(number, device=device)
    units = [Unit(row, 0, grid, cell + lead, cell + row * number, row) for row in range(rows)]
    fixed = [Fixed(row, place) for row in range(rows) for place in range(lead)]
    return Arrangement([tokens] * rows, units, fixed, pooled(patches, grid))


def frames(
    videos: int, count: int, tokens: int, patches: tuple[int, int], device: torch.device, newline: bool = False
) -> Arrangement:
    """Videos of ``count`` frames of ``tokens`` each, perhaps with a newline at the end."""
    one = grids(videos * count, tokens, patches, device)
    units, fixed = (
        [
            replace(unit, item=unit.item // count, part=unit.item % count, places=unit.places + unit.item % count * tokens)
            for unit in one.units
        ],
        [Fixed(each.item // count, each.place + each.item % count * tokens) for each in one.fixed],
    )
    fixed += [Fixed(video, count * tokens) for video in range(videos) if newline]
    return replace(one, sizes=[count * tokens + newline] * videos, units=units, fixed=fixed)


def of_full_encoder(parts: Anatomy, pixels: Tensor, lead: int, patches: tuple[int, int]) -> Arrangement:
    """How the tokens of pictures, or videos, would be arranged if the encoder kept them all: ``lead`` ones, then the patches."""
    tokens = lead + patches[0] * patches[1]
    if parts.modality == "video":
        return frames(len(pixels), pixels.shape[1], tokens, patches, pixels.device)
    return grids(len(pixels), tokens, patches, pixels.device)


def _one_grid(seen: Seen) -> Arrangement:
    tokens = torch.stack(list(seen.projected)) if seen.tokens is None else seen.tokens
    return grids(tokens.shape[0], tokens.shape[1], seen.patches, seen.device)


def _runs(seen: Seen) -> Arrangement:
    """Tiles of a picture that stand in one run of placeholders."""
    one = _one_grid(seen)
    size, sizes = one.sizes[0] if one.sizes else 1, []
    for run in seen.runs:
        if run % size:
            raise InputError(
                f"a run of {run} image placeholders is no multiple of the {size} visual tokens of a tile. "
                "Make text and images with the model's processor in one call."
            )
        sizes.append(run)
    if sum(sizes) != sum(one.sizes):
        return one  # they do not fit, which is said where prompts and pictures meet
    item = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes) // size).tolist()
    part = [number for run in sizes for number in range(run // size)]
    units = [replace(u, item=item[u.item], part=part[u.item], places=u.places + part[u.item] * size) for u in one.units]
    fixed = [Fixed(item[each.item], each.place + part[each.item] * size) for each in one.fixed]
    return replace(one, sizes=sizes, units=units, fixed=fixed)


def _tiles(seen: Seen) -> Arrangement:
    """Tiles that the model hands on sample by sample."""
    patches, total = seen.patches, sum(len(each) for each in seen.projected)
    tokens = patches[0] * patches[1] // int(seen.parts.model.config.scale_factor) ** 2
    return grids(total // tokens, tokens, patches, seen.device)


def _frames(seen: Seen) -> Arrangement:
    videos, count = seen.pixels.shape[:2]
    newline = seen.tokens is None
    tokens = (seen.projected.shape[1] - 1) // count if seen.tokens is None else seen.tokens.shape[1]
    return frames(videos, count, tokens, seen.patches, seen.device, newline)


def _thw(seen: Seen) -> Arrangement:
    """Frames of (t, h, w) patches of which blocks of m x m become a token, in the order of these blocks."""
    name = "video_grid_thw" if seen.parts.modality == "video" else "image_grid_thw"
    grid_thw = seen.kwargs[name]
    merge = int(seen.parts.model.config.vision_config.spatial_merge_size)
    sizes, patches, units, start = [], [], [], 0
    for item, (t, h, w) in enumerate(grid_thw.tolist()):
        grid = (h // merge, w // merge)
        patches += [(h, w)] * t
        cell = torch.arange(grid[0] * grid[1], device=seen.device)
        for frame in range(t):
            places = cell + frame * len(cell)
            units.append(Unit(item, frame, grid, places, places + start))
        sizes.append(t * len(cell))
        start += sizes[-1]
    order = window_order(seen.parts.tower, grid_thw) if seen.parts.tower_kind.windows else None

    def cells(values: Tensor) -> Tensor:
        tokens = values.reshape(-1, merge * merge, values.shape[-1]).float().mean(1).to(values.dtype)
        return tokens if order is None else tokens[order.to(tokens.device).argsort()]

    return Arrangement(sizes, units, [], pooled_apart(patches, units) if seen.parts.tower_kind.by_rows else cells)


def _sizes(seen: Seen) -> Arrangement:
    """Pictures of different sizes, which are told in pixels."""
    merge = int(getattr(seen.parts.model.config, "spatial_merge_size", 1))
    sizes = [seen.parts.grid(int(height), int(width)) for height, width in seen.kwargs["image_sizes"]]
    return of_sizes(sizes, merge, seen.device)


def _shapes(seen: Seen) -> Arrangement:
    """Pictures of different sizes, which are told in patches; the encoder pads their patches."""
    sizes = [(int(rows), int(columns)) for rows, columns in seen.kwargs["spatial_shapes"]]
    return of_sizes(sizes, int(seen.parts.model.config.downsample_factor), seen.device, padded=True)


def _places(seen: Seen) -> Arrangement:
    """Pictures, or frames of videos, of different sizes, of whose patches each says its column and row; the encoder pads them."""
    video = seen.parts.modality == "video"
    ends = (seen.kwargs["video_position_ids" if video else "image_position_ids"].amax(1) + 1).tolist()  # padding is at -1
    merge = int(seen.parts.model.config.vision_config.pooling_kernel_size)
    each = of_sizes([(rows, columns) for columns, rows in ends], merge, seen.device, padded=True)
    return each if not video else in_videos(each, seen.kwargs["num_frames_per_video"].tolist())


def in_videos(each: Arrangement, counts: list[int]) -> Arrangement:
    """Pictures that are the frames of videos, so many of each, one after the other."""
    units, sizes, left = [], [], iter(each.units)
    for item, count in enumerate(counts):
        size = 0
        for part in range(count):
            frame = next(left)
            units.append(replace(frame, item=item, part=part, places=frame.places + size))
            size += len(frame.places)
        sizes.append(size)
    return replace(each, sizes=sizes, units=units)


def _packed(seen: Seen) -> Arrangement:
    """A small picture, then the rows of its tiles side by side without their padding, each row with a newline after it.

    The model packs a map of indices: that tells what stands where. Where the encoder has a [CLS] token, each tile is a unit (its
    part that is no padding); elsewhere all tiles of a picture together are one, as they are where the model shrinks them.
    """
    packing, grid = seen.packing, seen.patches
    if packing is None:
        raise UnsupportedModelError("this model packs no tiles where foveate expects it; transformers may have moved it.")
    number, has_cls = grid[0] * grid[1], seen.parts.tower_kind.has_cls
    if packing.tokens != number:
        raise InputError(f"tiles of {grid[0]} x {grid[1]} patches gave {packing.tokens} visual tokens and not a grid of them.")
    # on the host: what stands where is looked at place by place
    index = torch.arange(sum(packing.tiles) * number, dtype=torch.float64).view(-1, number, 1)
    packed = [each[:, 0] for each in packing(index, torch.full((1,), -1.0, dtype=torch.float64))]
    units: list[Unit] = []
    fixed, start = [], 0
    for item, what in enumerate(packed):
        ends = (what == -1).nonzero().flatten().tolist()
        begin = 0 if len(what) == number + 1 else number  # the small picture alone is one row
        for end in ends:
            fixed.append(Fixed(item, end, torch.arange(begin, end)))
            begin = end + 1
        units += _tile_units(item, what, grid) if has_cls else _map_units(item, ends, grid, start)
        start += len(what)
    units = [replace(unit, places=unit.places.to(seen.device), tap=unit.tap.to(seen.device)) for unit in units]

    def cells(patches: Tensor) -> Tensor:
        return patches.flatten(0, 1) if has_cls else torch.cat(packing(patches, patches.new_zeros(patches.shape[-1])))

    return Arrangement([len(what) for what in packed], units, fixed, cells, woven=True)


def _tile_units(item: int, what: Tensor, grid: tuple[int, int]) -> list[Unit]:
    """The small picture, and what is no padding of each tile."""
    if bool((what != what.round()).any()):
        raise UnsupportedModelError(
            "this picture has so many tiles that the model shrinks them, and the encoder has a [CLS] token for each. "
            "Use a smaller picture."
        )
    number, units = grid[0] * grid[1], []
    place, index = torch.arange(len(what), device=what.device), what.long()
    tile_of = index.div(number, rounding_mode="floor")  # -1 for newlines
    for part, tile in enumerate(tile_of[tile_of >= 0].unique().tolist()):
        mine = place[tile_of == tile]
        at = index[mine]
        cell = at % number
        rows, columns = ((cell // grid[1]).unique(), (cell % grid[1]).unique())
        units.append(Unit(item, part, (len(rows), len(columns)), mine, at, tile))
    return units


def _map_units(item: int, ends: list[int], grid: tuple[int, int], start: int) -> list[Unit]:
    """The small picture, and the map of its tiles."""
    cell = torch.arange(grid[0] * grid[1])
    units = [Unit(item, 0, grid, cell, cell + start)]
    if len(ends) > 1 or ends[0] > len(cell):
        rows, width = len(ends), ends[0] - len(cell)
        places = torch.cat([torch.arange(end - width, end) for end in ends])
        units.append(Unit(item, 1, (rows, width), places, places + start))
    return units


ARRANGEMENTS: dict[str, Callable[[Seen], Arrangement]] = {
    "grid": _one_grid,
    "runs": _runs,
    "tiles": _tiles,
    "frames": _frames,
    "thw": _thw,
    "sizes": _sizes,
    "shapes": _shapes,
    "places": _places,
    "packed": _packed,
}
