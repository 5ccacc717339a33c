"""Units that a method can reduce together, each with its share of the budget; and what they leave, item by item."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...methods.base import FrontReducer, ProjectorReducer
from ...tokens import Budget, Reduction, keep_all, resolve_budget
from .arrangement import Arrangement, Unit


@dataclass(frozen=True)
class Group:
    """Units of the same shape. ``method`` has their share of the budget; None = they keep everything."""

    method: ProjectorReducer | None
    units: list[Unit]

    def places(self, arrangement: Arrangement) -> Tensor:
        """[B, N] their tokens among those of all items."""
        offsets = arrangement.offsets
        return torch.stack([unit.places + offsets[unit.item] for unit in self.units])


@dataclass(frozen=True)
class Reduced:
    """What a method made of a group: how many tokens each unit keeps, and ``outputs`` [B, M, C], the invalid ones included."""

    group: Group
    reduction: Reduction
    counts: list[int]
    outputs: Tensor


def shares(budget: Budget, sizes: list[int]) -> list[int] | None:
    """Tokens to keep of each unit of an item, in proportion to their sizes; None where the method decides.

    They sum to the budget, to all tokens at most. Remainders go to the largest fractions, then to earlier units.
    """
    total = sum(sizes)
    count = resolve_budget(budget, total) if total else 0
    if count is None:
        return None
    floors = [count * size // total for size in sizes] if total else list(sizes)
    order = sorted(range(len(sizes)), key=lambda i: (-(count * sizes[i] % max(1, total)), i))
    for i in order[: count - sum(floors)]:
        floors[i] += 1
    return floors


def grouped(method: FrontReducer, arrangement: Arrangement, units: list[Unit]) -> list[Group]:
    """Units by their shape and share of the budget. Those that keep nothing are in no group."""
    groups: dict[tuple[tuple[int, int], int | None], list[Unit]] = {}
    for item in range(len(arrangement.sizes)):
        mine = [unit for unit in units if unit.item == item]
        numbers = [len(unit.places) for unit in mine]
        parts = shares(method.budget, numbers)
        for unit, share in zip(mine, [None] * len(mine) if parts is None else parts, strict=True):
            if share != 0 and len(unit.places):
                groups.setdefault((unit.shape, share), []).append(unit)
    found = []
    for (shape, share), some in groups.items():
        covered = share is not None and share >= shape[0] * shape[1]
        one = method if share == resolve_budget(method.budget, shape[0] * shape[1]) else method.with_budget(share)
        found.append(Group(one if isinstance(one, ProjectorReducer) and not covered else None, some))
    return found


def changed_cells(arrangement: Arrangement, features: Tensor, similar: float) -> list[Unit]:
    """The units of videos without the tokens that look as in the frame before: cosine similarity above ``similar``.

    The first frame of each video is whole.
    """
    offsets, found = arrangement.offsets, []
    for item in range(len(arrangement.sizes)):
        before: Tensor | None = None
        for unit in arrangement.of_item(item):
            now = F.normalize(features[unit.places + offsets[item]].float(), dim=-1)
            if before is not None and before.shape == now.shape:
                unit = unit.only((now * before).sum(-1) <= similar)
            found.append(unit)
            before = now
    return found


def keep_every(group: Group, cells: Tensor) -> Reduced:
    """The reduction of a group that keeps everything."""
    return Reduced(group, keep_all(cells), [cells.shape[1]] * len(cells), cells)


@dataclass(frozen=True)
class Assembly:
    """The tokens that stay, item by item.

    ``order`` says for each item which rows of (outputs of all groups, then the fixed tokens ``fixed``) make it up; ``kept`` which
    of its placeholders they stand at.
    """

    order: list[Tensor]
    kept: list[Tensor]
    fixed: Tensor


def laid_out(arrangement: Arrangement, found: list[Reduced]) -> Assembly:
    """Put what groups keep, and what is fixed, in the order of the prompt.

    A unit's tokens stay in the order of the method, but where rows of several units alternate.
    """
    device = found[0].reduction.index.device
    pieces: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in arrangement.sizes]  # key, row of the outputs, place
    start = 0
    for reduced in found:
        index = reduced.reduction.index[reduced.reduction.mask()].split(reduced.counts)
        for unit, chosen in zip(reduced.group.units, index, strict=True):
            places = unit.places[chosen]
            key = places if arrangement.woven else unit.places[:1].expand(len(places))
            pieces[unit.item].append((key, start + torch.arange(len(places), device=device), places))
            start += len(places)
    fixed: list[int] = []
    offsets = arrangement.offsets
    rowed = {each.item for each in arrangement.fixed if each.ends is not None}
    alive = {item: _alive(arrangement.sizes[item], [places for *_, places in pieces[item]]) for item in rowed}
    for each in arrangement.fixed:
        if each.ends is None or bool(alive[each.item][each.ends].any()):
            place = torch.tensor([each.place], device=device)
            pieces[each.item].append((place, torch.tensor([start + len(fixed)], device=device), place))
            fixed.append(offsets[each.item] + each.place)
    order, kept = [], []
    for mine in pieces:
        keys, rows, places = (torch.cat(part) for part in zip(*mine, strict=True))
        if len(mine) > 1:
            by = keys.argsort(stable=True)
            rows, places = rows[by], places[by]
        order.append(rows)
        kept.append(places)
    return Assembly(order, kept, torch.tensor(fixed, dtype=torch.long, device=device))


def _alive(size: int, places: list[Tensor]) -> Tensor:
    """[size] bool on the host, which placeholders of an item stay."""
    alive = torch.zeros(size, dtype=torch.bool)
    if places:
        alive[torch.cat(places).cpu()] = True
    return alive


def joined(arrangement: Arrangement, found: list[Reduced]) -> Reduction:
    """One reduction of all units, in the order of ``arrangement.units``, over the cells of their whole grids."""
    units = arrangement.units
    if len(found) == 1 and len(found[0].group.units) == len(units) and all(unit.cells is None for unit in found[0].group.units):
        return found[0].reduction
    number = {(unit.item, unit.part): i for i, unit in enumerate(units)}
    cells = max(unit.grid[0] * unit.grid[1] for unit in units)
    outputs = max(reduced.reduction.index.shape[1] for reduced in found)
    first = found[0].reduction.index
    index = first.new_zeros(len(units), outputs)
    valid = torch.zeros_like(index, dtype=torch.bool)
    owner = first.new_full((len(units), cells), -1)
    scored = any(reduced.reduction.scores is not None for reduced in found)
    scores = torch.zeros(len(units), cells, device=first.device)
    bounded = all(reduced.reduction.threshold is not None for reduced in found)
    threshold = torch.zeros(len(units), device=first.device)
    for reduced in found:
        source = reduced.reduction.source_map(len(reduced.group.units[0].places))
        for row, unit in enumerate(reduced.group.units):
            i, width = number[unit.item, unit.part], reduced.reduction.index.shape[1]
            cell = torch.arange(len(unit.places), device=first.device) if unit.cells is None else unit.cells
            index[i, :width] = cell[reduced.reduction.index[row]]
            valid[i, :width] = reduced.reduction.mask()[row]
            owner[i, cell] = source[row]
            if reduced.reduction.scores is not None:
                scores[i, cell] = reduced.reduction.scores[row].float()
            if reduced.reduction.threshold is not None:
                threshold[i] = reduced.reduction.threshold[row]
    return Reduction(index, valid, scores=scores if scored else None, threshold=threshold if bounded else None, owner=owner)


def stacked(reductions: list[Reduction], cells: list[int], rows: list[int]) -> Reduction:
    """Several reductions, over grids of up to so many ``cells``, as one; ``rows`` is their order, counted through all of them."""

    def padded(values: list[Tensor], fill: float) -> Tensor:
        width = max(each.shape[1] for each in values)
        return torch.cat([F.pad(each, (0, width - each.shape[1]), value=fill) for each in values])[rows]

    scores, thresholds = [each.scores for each in reductions], [each.threshold for each in reductions]
    known = [score for score in scores if score is not None]
    bounds = [bound for bound in thresholds if bound is not None]
    return Reduction(
        padded([each.index for each in reductions], 0),
        padded([each.mask() for each in reductions], False),
        scores=padded(known, 0.0) if len(known) == len(scores) else None,
        threshold=torch.cat(bounds)[rows] if len(bounds) == len(thresholds) else None,
        owner=padded([each.source_map(n) for each, n in zip(reductions, cells, strict=True)], -1),
    )
