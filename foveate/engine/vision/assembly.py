"""Putting together what methods left of pictures: in the order of the prompt, projected, with one book of what went where."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import FoveateError
from ...tokens import Reduction
from ..model.anatomy import Anatomy
from ..model.seams import deepstack, marked, with_features
from .arrangement import Arrangement
from .encoding import EncodedPictures
from .reduction import Reduced


@dataclass(frozen=True)
class Visuals:
    """The pictures or videos of one call, encoded and reduced.

    Attributes
    ----------
    output : the encoder output of transformers, with the reduced features.
    embeds : per item [m_i, D] in the space of the decoder.
    reduction : of all units, over their grids.
    kept : per item, which of its placeholders stay, in the order of the features.
    arrangement : of all placeholders.
    changed : False where every token stayed in place: the prompt and the features are then the unmodified model's.
    encoder_counts : per encoder layer [units] tokens that leave it, where they became fewer inside.
    notes : for the report.
    """

    output: Any
    embeds: list[Tensor]
    reduction: Reduction
    kept: list[Tensor]
    arrangement: Arrangement
    changed: bool
    encoder_counts: list[Tensor] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def deepstack(self) -> list[Tensor]:
        """Per item [levels, m_i, D] features that the decoder adds after its first layers; empty where it adds none."""
        levels = deepstack(self.output)
        if not levels:
            return []
        together = torch.stack([torch.cat(list(level)) for level in levels])
        return list(together.split([len(embeds) for embeds in self.embeds], 1))


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
    # per item, of the tokens that stay: a key to sort by, the row among the outputs of all groups, the placeholder
    pieces: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in arrangement.sizes]
    start = 0
    for reduced in found:
        index = reduced.reduction.index[reduced.reduction.mask()].split(reduced.counts)
        for unit, chosen in zip(reduced.units, index, strict=True):
            places = unit.places[chosen]
            # sorting is stable, so that one key for a whole unit leaves its tokens in the order of the method
            key = places if arrangement.woven else unit.places[:1].expand(len(places))
            pieces[unit.item].append((key, start + torch.arange(len(places), device=device), places))
            start += len(places)
    fixed: list[int] = []
    offsets = arrangement.offsets
    rowed = {each.item for each in arrangement.fixed if each.ends is not None}
    alive = {item: _alive(arrangement.sizes[item], [places for *_, places in pieces[item]]) for item in rowed}
    for each in arrangement.fixed:
        # the newline of a row goes with the last token of that row
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
    """One reduction of all units, in the order of ``arrangement.units``, over the cells of their whole grids.

    Groups have other numbers of outputs and cells, and a unit may lack cells: index, owner and scores of each are written into
    tensors of the largest size, at the cells that the unit really has.
    """
    units = arrangement.units
    if len(found) == 1 and len(found[0].units) == len(units) and all(unit.cells is None for unit in found[0].units):
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
    told = any(reduced.reduction.attention is not None for reduced in found)
    attention = torch.zeros(len(units), outputs, cells, device=first.device) if told else None
    drawn = torch.zeros(len(units), dtype=torch.bool, device=first.device)
    for reduced in found:
        source = reduced.reduction.source_map(max(len(unit.places) for unit in reduced.units))
        for row, unit in enumerate(reduced.units):
            i, width = number[unit.item, unit.part], reduced.reduction.index.shape[1]
            cell = torch.arange(len(unit.places), device=first.device) if unit.cells is None else unit.cells
            index[i, :width] = cell[reduced.reduction.index[row]]
            valid[i, :width] = reduced.reduction.mask()[row]
            owner[i, cell] = source[row, : len(cell)]  # units of one group are of one size, but for those of packed patches
            if reduced.reduction.scores is not None:
                scores[i, cell] = reduced.reduction.scores[row].float()
            if reduced.reduction.threshold is not None:
                threshold[i] = reduced.reduction.threshold[row]
            if reduced.reduction.attention is not None and attention is not None:
                attention[i, :width, cell] = reduced.reduction.attention[row].to(attention)
            drawn[i] = reduced.reduction.made is not None
        for unit, went in reduced.emptied:
            owner[number[unit.item, unit.part], : len(went)] = went
    return Reduction(
        index,
        valid,
        scores=scores if scored else None,
        threshold=threshold if bounded else None,
        owner=owner,
        attention=attention,
        drawn=drawn,
    )


def stacked(reductions: list[Reduction], cells: list[int], rows: list[int]) -> Reduction:
    """Several reductions, over grids of up to so many ``cells``, as one; ``rows`` is their order, counted through all of them."""

    def padded(values: list[Tensor], fill: float) -> Tensor:
        width = max(each.shape[1] for each in values)
        return torch.cat([F.pad(each, (0, width - each.shape[1]), value=fill) for each in values])[rows]

    scores, thresholds = [each.scores for each in reductions], [each.threshold for each in reductions]
    known = [score for score in scores if score is not None]
    bounds = [bound for bound in thresholds if bound is not None]
    told = [each.attention for each in reductions]
    return Reduction(
        padded([each.index for each in reductions], 0),
        padded([each.mask() for each in reductions], False),
        scores=padded(known, 0.0) if len(known) == len(scores) else None,
        threshold=torch.cat(bounds)[rows] if len(bounds) == len(thresholds) else None,
        owner=padded([each.source_map(n) for each, n in zip(reductions, cells, strict=True)], -1),
        attention=None if all(each is None for each in told) else _attention(reductions, max(cells))[rows],
        drawn=torch.cat([each.are_made() for each in reductions])[rows],
    )


def _attention(reductions: list[Reduction], cells: int) -> Tensor:
    """[B, M, cells] attention of several reductions; zeros where one tells of none."""
    outputs = max(each.index.shape[1] for each in reductions)
    found = []
    for each in reductions:
        batch, width = each.index.shape
        attention = torch.zeros(batch, width, cells, device=each.index.device) if each.attention is None else each.attention
        found.append(F.pad(attention.float(), (0, cells - attention.shape[2], 0, outputs - width)))
    return torch.cat(found)


def assembled(parts: Anatomy, encoded: EncodedPictures, found: list[Reduced], notes: list[str]) -> Visuals:
    """What groups left, projected, in the order of the prompt."""
    arrangement = encoded.arrangement
    layout = laid_out(arrangement, found)
    pool = _pool(parts, encoded, found, layout.fixed)
    embeds = [pool[order] for order in layout.order]
    levels = deepstack(encoded.output)
    if levels is not None:
        whole = [torch.cat(list(level)) for level in levels]
        pools = [torch.cat([*_carried(found, level), level[layout.fixed]]) for level in whole]
        levels = [[pool[order] for order in layout.order] for pool in pools]
    output = with_features(encoded.output, embeds, levels)
    return Visuals(output, embeds, joined(arrangement, found), layout.kept, arrangement, changed=True, notes=notes)


def unchanged(parts: Anatomy, encoded: EncodedPictures, notes: list[str] | None = None) -> Visuals:
    """Every token of every item."""
    arrangement, projected, output = encoded.arrangement, encoded.projected, encoded.output
    if projected is not None:
        embeds = list(projected.split(arrangement.sizes))
    elif encoded.batch is not None and parts.projector is not None:  # in the shape that the model itself projects
        projected = parts.projector(encoded.batch).flatten(0, 1)
        embeds = list(projected.split(arrangement.sizes))
        output = with_features(output, embeds)
    else:
        raise FoveateError("an encoder that was not asked to project showed no features. This is a fault of foveate.")
    kept = [torch.arange(size, device=projected.device) for size in arrangement.sizes]
    numbers = torch.tensor([len(unit.places) for unit in arrangement.units], device=projected.device)
    index = torch.arange(int(numbers.max()), device=projected.device).expand(len(numbers), -1)
    every = Reduction(index, valid=index < numbers[:, None])
    return Visuals(marked(output), embeds, every, kept, arrangement, changed=False, notes=notes or [])


def after_encoder(
    parts: Anatomy,
    output: Any,
    arrangement: Arrangement,
    lead: Tensor,
    reduction: Reduction,
    counts: list[int],
    patches: Tensor,
    notes: list[str],
) -> Visuals:
    """Items of what left the encoder, fewer patches than there are places in the prompt.

    Parameters
    ----------
    lead : [R, L, C] tokens before each grid, such as [CLS].
    reduction, counts : which cells the patches stand for, and how many each picture has.
    patches : [R, M, C], the invalid ones included.
    """
    found = Reduced(arrangement.units, reduction, counts, patches)
    layout = laid_out(arrangement, [found])
    tokens = torch.cat([patches[reduction.mask()], lead.flatten(0, 1)])
    pool = tokens if parts.projector is None else _projected(parts, tokens)
    embeds = [pool[order] for order in layout.order]
    output = with_features(output, embeds)
    return Visuals(output, embeds, joined(arrangement, [found]), layout.kept, arrangement, changed=True, notes=notes)


def _pool(parts: Anatomy, encoded: EncodedPictures, found: list[Reduced], fixed: Tensor) -> Tensor:
    """[R, D] what all groups keep, one after the other, then the fixed tokens."""
    projected, reductions = encoded.projected, [reduced.reduction for reduced in found]
    pure = all(each.weights is None and each.added is None and each.made is None for each in reductions)
    pure = pure and all(reduced.spread is None for reduced in found)
    if projected is not None and pure:  # a choice can be taken from what is projected already
        return torch.cat([*_carried(found, projected), projected[fixed]])
    pieces = [reduced.outputs[reduced.reduction.mask()] for reduced in found]
    waiting = [each.made is None or each.space == "features" for each in reductions]
    if len(fixed):
        pieces.append(encoded.features[fixed] if projected is None else projected[fixed])
        waiting.append(projected is None)
    if parts.projector is None:  # features are in the space of the decoder there
        return torch.cat(pieces)
    # all that is to be projected goes through the projector together
    raw = [piece for piece, waits in zip(pieces, waiting, strict=True) if waits]
    done = iter(_projected(parts, torch.cat(raw)).split([len(piece) for piece in raw]) if raw else ())
    return torch.cat([next(done) if waits else piece for piece, waits in zip(pieces, waiting, strict=True)])


def _carried(found: list[Reduced], values: Tensor) -> list[Tensor]:
    """[counts, C] of each group, what its outputs have of ``values`` [S, C] of all visual tokens."""
    each = [
        reduced.reduction.carry(values[reduced.places]) if reduced.spread is None else reduced.spread.carry(values)
        for reduced in found
    ]
    return [carried[reduced.reduction.mask()] for carried, reduced in zip(each, found, strict=True)]


def _projected(parts: Anatomy, tokens: Tensor) -> Tensor:
    """[S, C] -> [S, D], by the model's projector."""
    if parts.projector is None:
        raise FoveateError("tokens of this model are merged after its projector. This is a fault of foveate.")
    after: Tensor = parts.projector(tokens[None])[0]
    return after
