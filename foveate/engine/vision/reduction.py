"""Letting a method reduce encoded pictures: units of one shape together, each with its share of the budget."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import FoveateError, InputError, UnsupportedModelError, first_line
from ...methods.base import FrontReducer, ProjectorReducer
from ...methods.fields import raise_undeclared
from ...tokens import Budget, Reduction, VisualTokens, keep_all, resolve_budget
from ..model.anatomy import Anatomy
from .arrangement import Arrangement, Unit
from .encoding import EncodedPictures
from .question import Asking
from .videos import Spread, by_frame, whole_videos


@dataclass(frozen=True)
class Group:
    """Units of the same shape. ``method`` has their share of the budget; None = they keep everything.

    ``frames`` of them are one row for a method that decides over whole videos.
    """

    method: ProjectorReducer | None
    units: list[Unit]
    frames: int = 1


def places_of(units: list[Unit], arrangement: Arrangement) -> Tensor:
    """[B, N] the tokens of units of one shape, among those of all items."""
    offsets = arrangement.offsets
    return torch.stack([unit.places + offsets[unit.item] for unit in units])


@dataclass(frozen=True)
class Reduced:
    """What a method made of some units.

    Attributes
    ----------
    units : B of them.
    counts : how many tokens each keeps.
    outputs : [B, M, C], the invalid ones included.
    places : [B, N] their tokens among those of all items, where the encoder gave all of them.
    spread : where outputs were merged over whole videos, of which the units are frames.
    emptied : frames that keep nothing, and where their tokens went [N].
    """

    units: list[Unit]
    reduction: Reduction
    counts: list[int]
    outputs: Tensor
    places: Tensor | None = None
    spread: Spread | None = None
    emptied: list[tuple[Unit, Tensor]] = field(default_factory=list)


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
    """Units by their shape and share of the budget. Those that keep nothing are in no group.

    A method is vectorised over pictures of one grid and one count, so that pictures of several sizes are several calls of it.
    """
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


def grouped_videos(method: ProjectorReducer, arrangement: Arrangement, units: list[Unit]) -> list[Group]:
    """Whole videos by the number and the shape of their frames."""
    groups: dict[tuple[int, tuple[int, int]], list[Unit]] = {}
    for frames in whole_videos(method.name, arrangement, units):
        groups.setdefault((len(frames), frames[0].shape), []).extend(frames)
    return [
        Group(None if method.covers(number * shape[0] * shape[1]) else method, some, number)
        for (number, shape), some in groups.items()
    ]


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


def reduce(
    parts: Anatomy,
    method: ProjectorReducer,
    encoded: EncodedPictures,
    asked: Asking | None = None,
    rows: list[int] | None = None,
) -> tuple[list[Reduced], bool]:
    """What a method leaves of encoded pictures, group by group, and whether that is everything in its place.

    Parameters
    ----------
    parts : where the parts of the model are.
    method : what reduces.
    encoded : with its projection, where the method reads that.
    asked : gives the question, where the method reads that.
    rows : the prompt of each item; with ``asked``.

    Raises
    ------
    InputError : the attention or features hold NaN or infinite values.
    FoveateError : the method returned something that breaks its contract.
    """
    arrangement, features, projected = encoded.arrangement, encoded.features, encoded.projected
    if method.reads_projected and projected is None:
        raise FoveateError("a method that reads projected features has to say reads_projected. A fault of it.")
    found: list[Reduced] = []
    units = arrangement.units
    if parts.modality == "video" and method.temporal is not None:
        units = changed_cells(arrangement, features, method.temporal)
    every = sum(len(unit.places) for unit in units)
    same = every == sum(len(unit.places) for unit in arrangement.units)
    videos = parts.modality == "video" and method.whole_video
    for group in grouped_videos(method, arrangement, units) if videos else grouped(method, arrangement, units):
        places = places_of(group.units, arrangement)
        if group.method is None:
            cells = features[places]
            found.append(Reduced(group.units, keep_all(cells), [cells.shape[1]] * len(cells), cells, places))
            continue
        rows_of = places.reshape(len(places) // group.frames, -1)  # of the method
        cells = features[rows_of]
        after = projected[rows_of] if projected is not None and method.reads_projected else None
        question = None
        if asked is not None and method.reads_question:
            prompts = [rows[unit.item] if rows else 0 for unit in group.units[:: group.frames]]
            question = asked(cells, after, prompts, method.reads_question_state)
        taps = {name: encoded.tap(name, group.units) for name in method.encoder_layers(len(parts.layers))}
        beside = encoded.beside(parts, group.units) if method.joins_encoder else None
        reduction = _reduced(group.method, VisualTokens(cells, group.units[0].shape, taps, after, question, beside, group.frames))
        check_returned(method, cells, reduction)
        if reduction.added is not None and parts.projector is None:
            raise UnsupportedModelError(
                f"{method.name} hands on [CLS] before the projector, where {parts.family.name} has no visual tokens yet. "
                "Use another method."
            )
        if reduction.made is not None:
            check_made(parts, method, cells, reduction)
        outputs = _applied(method, cells, reduction)
        counts, in_place = check(method, cells.shape[1], outputs, reduction, reduction.mask(), after)
        most = resolve_budget(group.method.budget, cells.shape[1])
        if most is not None and max(counts) > most:
            raise FoveateError(
                f"{method.name} kept {max(counts)} tokens of a picture, and its budget is {most}. A method has to read self.budget "
                "(resolve_budget in foveate.tokens makes a count of it)."
            )
        same = same and in_place
        if group.frames == 1:
            found.append(Reduced(group.units, reduction, counts, outputs, places))
            continue
        each = by_frame(method.name, reduction, outputs, group.frames, places)
        some = [row for row, count in enumerate(each.counts) if count]
        spread = None if each.spread is None else each.spread.rows(some)
        framed = each.reduction.rows(some), [each.counts[row] for row in some], each.outputs[some], places[some]
        went = each.reduction.source_map(places.shape[1])
        emptied = [(unit, went[row]) for row, unit in enumerate(group.units) if not each.counts[row]]
        found.append(Reduced([group.units[row] for row in some], *framed, spread, emptied))
    return found, same and sum(sum(reduced.counts) for reduced in found) == every


def _reduced(method: ProjectorReducer, tokens: VisualTokens) -> Reduction:
    try:
        return method.reduce(tokens)
    except (AttributeError, TypeError, KeyError) as error:
        missing = {} if tokens.taps else {"tokens.taps": "encoder_layers()"}
        missing |= {} if tokens.projected is not None else {"tokens.projected": "reads_projected = True"}
        missing |= {} if tokens.beside is not None else {"tokens.beside": "joins_encoder = True"}
        missing |= {} if tokens.question is not None else {"tokens.question": "reads_question = True"}
        raise_undeclared(method, error, missing)
        raise


def check_returned(method: FrontReducer, cells: Tensor, found: Any) -> None:
    """Raise ``FoveateError`` unless a method returned a reduction of tensors of the right shapes."""
    name, (batch, number) = method.name, cells.shape[:2]
    fault = "This is a fault of the method."
    if not isinstance(found, Reduction):
        raise FoveateError(f"{name} returned {type(found).__name__} and no foveate.Reduction. {fault}")
    index = found.index
    if not isinstance(index, Tensor) or index.dtype != torch.long or index.ndim != 2 or len(index) != batch:
        raise FoveateError(f"{name}: Reduction.index has to be a tensor of int64 and of shape [{batch}, tokens kept]. {fault}")
    if found.space not in ("features", "decoder"):
        raise FoveateError(f"{name}: Reduction.space is {found.space!r}; expected 'features' or 'decoder'. {fault}")
    expected = {"valid": tuple(index.shape), "scores": (batch, number), "threshold": (batch,)}
    if found.sources is None:
        expected["weights"] = (*index.shape, number)
    for part, shape in expected.items():
        value = getattr(found, part)
        fits = isinstance(value, Tensor) and tuple(value.shape) == shape and (part != "valid" or value.dtype == torch.bool)
        if value is not None and not fits:
            kind = "bool tensor" if part == "valid" else "tensor"
            raise FoveateError(f"{name}: Reduction.{part} has to be a {kind} of shape {list(shape)}. {fault}")


def _applied(method: FrontReducer, cells: Tensor, reduction: Reduction) -> Tensor:
    """The outputs of a reduction.

    Raises
    ------
    FoveateError : it names tokens that do not exist.
    """
    try:
        return reduction.apply(cells)
    except (IndexError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise FoveateError(
            f"{method.name} returned a reduction that cannot be applied to {cells.shape[1]} tokens "
            f"({first_line(error)}). This is a fault of the method."
        ) from error


def check(
    method: FrontReducer, number: int, reduced: Tensor, reduction: Reduction, valid: Tensor, read: Tensor | None = None
) -> tuple[list[int], bool]:
    """Counts per image and whether nothing changed, with one transfer from the device; the contract is checked on the way.

    ``read`` is what the method chose by, where that is not what it reduced.
    """
    batch, index = len(reduced), reduction.index
    column = torch.arange(index.shape[1], device=index.device)
    cells = index.masked_fill(~valid, 0) + ~valid * (number + column)  # outputs that are not real get numbers of their own
    sequence = cells.diff(dim=1)
    flags = torch.stack(
        [
            torch.stack([torch.isfinite(each).all() for each in (reduced, reduction.scores, read) if each is not None]).all(),
            ((index >= 0) & (index < number) | ~valid).all(),
            (cells.sort(dim=1).values.diff(dim=1) > 0).all(),
            ((sequence > 0) | ~valid[:, 1:]).all(),
            (index == column).all() & valid.all(),
        ]
    )
    *counts, finite, inside, distinct, ascending, ordered = torch.cat([valid.sum(1), flags]).tolist()
    if not finite:
        if any(not torch.isfinite(weight).all() for part in method.trained() for weight in part.module.parameters()):
            raise InputError(
                f"{method.name}: its weights hold NaN or infinite values, so that its training has failed. Train it with a smaller "
                "learning rate, or take the weights of an earlier checkpoint."
            )
        raise InputError(
            f"{method.name}: the vision encoder gave NaN or infinite values. Check the picture, and the dtype of the model "
            "(float16 overflows on some encoders: use bfloat16 or float32)."
        )
    if not inside or index.shape[0] != batch or not 1 <= min(counts) <= max(counts) <= number:
        raise FoveateError(
            f"{method.name} kept no token of an image, more tokens than there are, or one that does not exist. "
            "This is a fault of the method."
        )
    if not distinct:
        raise FoveateError(f"{method.name} put two tokens at one cell of an image. This is a fault of the method.")
    if reduction.made is not None and method.positions == "original" and not ascending:
        raise InputError(
            f"{method.name} makes tokens whose cells are not in the order of the picture, so that they cannot have the positions "
            "of these. Use positions='compact'."
        )
    return counts, bool(ordered) and index.shape[1] == number and reduction.weights is None and reduction.made is None


def check_made(parts: Anatomy, method: FrontReducer, cells: Tensor, reduction: Reduction) -> None:
    """Raise ``FoveateError`` where tokens that were made have not the shape that they say."""
    made, attention = reduction.made, reduction.attention
    width = int(parts.model.config.get_text_config().hidden_size) if reduction.space == "decoder" else cells.shape[-1]
    expected = (*reduction.index.shape, width)
    if made is None or tuple(made.shape) != expected or reduction.weights is not None or reduction.added is not None:
        raise FoveateError(
            f"{method.name}: what is made in the space of the {reduction.space} has to be of shape {expected}, without weights and "
            "added. This is a fault of the method."
        )
    if attention is not None and tuple(attention.shape) != (*reduction.index.shape, cells.shape[1]):
        raise FoveateError(f"{method.name}: attention of shape {tuple(attention.shape)}. This is a fault of the method.")
