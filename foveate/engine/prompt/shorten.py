"""The pictures of a prompt, encoded and reduced; and the prompt without the placeholders they no longer need."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import InputError
from ...methods.base import FrontReducer, Method
from ...report import Item, Report
from ...tokens import Reduction
from ..decoder.stages import DecoderPrompt
from ..model.anatomy import Anatomy
from ..vision.assembly import Visuals, stacked
from ..vision.front import Around, encode_and_reduce
from ..vision.question import Asking, question_tokens
from .layout import Layout, image_rows, runs_of, shorten

if TYPE_CHECKING:
    from ..call import Call

IGNORED = -100  # the label of what is not taught


@dataclass(frozen=True)
class PromptPictures:
    """The pictures and videos of a call after reduction.

    Attributes
    ----------
    visual : [B, T] bool, their placeholders in the full prompt.
    encoded : by modality, the encoder output that the model is handed.
    embeds : visual tokens of each item, in the space of the decoder, in the order of the prompts.
    deepstack : of each item [levels, m_i, D], as ``Visuals.deepstack``, in the same order.
    reduction : of all grids; None without pictures.
    changed : whether any token left its place.
    """

    visual: Tensor
    encoded: dict[str, Any]
    embeds: list[Tensor]
    deepstack: list[Tensor]
    reduction: Reduction | None
    changed: bool


@dataclass(frozen=True)
class _Found:
    """A picture or video of a call: where its placeholders begin (row, column), and its number among those of its modality."""

    start: tuple[int, int]
    number: int
    modality: str
    visuals: Visuals

    @property
    def embeds(self) -> Tensor:
        return self.visuals.embeds[self.number]

    def reported(self) -> Item:
        arrangement, kept = self.visuals.arrangement, self.visuals.kept[self.number]
        size, units = arrangement.sizes[self.number], arrangement.of_item(self.number)
        part, cell = torch.full((2, size), -1, device=kept.device)
        for unit in units:
            part[unit.places] = unit.part
            cell[unit.places] = torch.arange(len(unit.places), device=kept.device)
        return Item(self.start[0], self.modality, size, kept, part[kept], cell[kept], [unit.grid for unit in units])


def _together(found: list[_Found]) -> tuple[Reduction | None, list[Tensor]]:
    """The reductions of all grids, and how many tokens of each leave each layer of the encoder, in the order of the prompts."""
    visuals = {one.modality: one.visuals for one in found}
    if len(visuals) < 2:
        return next(((each.reduction, each.encoder_counts) for each in visuals.values()), (None, []))
    first, start = {}, 0
    for modality, each in visuals.items():
        first[modality], start = start, start + len(each.arrangement.units)
    rows = [
        first[one.modality] + i for one in found for i, unit in enumerate(one.visuals.arrangement.units) if unit.item == one.number
    ]
    cells = [max(r * c for r, c in (unit.grid for unit in each.arrangement.units)) for each in visuals.values()]
    counts = zip(*(each.encoder_counts for each in visuals.values()), strict=True)
    return stacked([each.reduction for each in visuals.values()], cells, rows), [torch.cat(layer)[rows] for layer in counts]


def check_columns(ids: Tensor, mask: Tensor, past: int) -> None:
    """Raise ``InputError`` unless a mask is of the whole prompt, and the tokens are all of it or what a cache does not hold."""
    if mask.shape[1] - ids.shape[1] not in (0, past):
        raise InputError(
            f"attention_mask has {mask.shape[1]} columns, input_ids {ids.shape[1]} and the cache {past}: give either the whole "
            "prompt or only its new tokens, with a mask for the whole prompt."
        )


def read_pictures(call: Call, method: Method, past: int, report: Report) -> PromptPictures:
    """Encode and reduce the pictures of a call.

    Parameters
    ----------
    call : with their pixels.
    method : what reduces.
    past : columns of the full prompt that a cache stands for.
    report : filled in.
    """
    parts, front, outside = call.parts, method.before_decoder(), call.outside
    new = torch.zeros_like(call.mask, dtype=torch.bool)
    new[:, max(past, outside) :] = True  # pictures of earlier turns are in the cache
    visual = torch.zeros_like(new)
    if not call.pixels:
        return PromptPictures(visual, {}, [], [], None, changed=False)
    asked = _asked(call, front, past) if front.reads_question else None
    whole = F.pad(call.ids, (outside, 0), value=-1)
    found: list[_Found] = []
    encoded: dict[str, Any] = {}
    for modality, inputs in call.pixels.items():
        here = new & (whole == parts.placeholders.get(modality, -1))
        visual = visual | here

        def locate(sizes: list[int], here: Tensor = here, modality: str = modality) -> list[int]:
            return [row for row, _ in image_rows(here, sizes, modality)[1]]

        around = Around(report.clock, asked, runs_of(here), locate, call.encodings)
        own = parts.of(modality, call.arguments.get("vision_feature_layer"))
        visuals = encode_and_reduce(own, front, inputs, around)
        encoded[modality] = visuals.output
        starts = image_rows(here, visuals.arrangement.sizes, modality)[1]
        found += [_Found(start, i, modality, visuals) for i, start in enumerate(starts)]
        report.notes += [note for note in visuals.notes if note not in report.notes]
    found.sort(key=lambda one: one.start)
    report.question_tokens = 0 if asked is None else asked.tokens_read
    return _reported(found, encoded, visual, report)


def read_alone(call: Call, front: FrontReducer, report: Report) -> PromptPictures:
    """As ``read_pictures``, of pictures that belong to no prompt: each is reported as one of row 0."""
    found: list[_Found] = []
    for modality, inputs in call.pixels.items():
        own = call.parts.of(modality, call.arguments.get("vision_feature_layer"))
        visuals = encode_and_reduce(own, front, inputs, Around(report.clock, encodings=call.encodings))
        found += [_Found((0, i), i, modality, visuals) for i in range(len(visuals.embeds))]
        report.notes += [note for note in visuals.notes if note not in report.notes]
    return _reported(found, {one.modality: one.visuals.output for one in found}, torch.zeros(0, 0), report)


def _reported(found: list[_Found], encoded: dict[str, Any], visual: Tensor, report: Report) -> PromptPictures:
    """All items together, once they are in the report."""
    report.items = [one.reported() for one in found]
    report.reduction, report.encoder_counts = _together(found)
    embeds, changed = [one.embeds for one in found], any(one.visuals.changed for one in found)
    deep = {modality: visuals.deepstack for modality, visuals in {one.modality: one.visuals for one in found}.items()}
    deepstack = [deep[one.modality][one.number] for one in found if deep[one.modality]]
    return PromptPictures(visual, encoded, embeds, deepstack, report.reduction, changed)


def lay_out(
    call: Call, method: Method, cached: Layout | None, pictures: PromptPictures, report: Report, *, pad_left: bool
) -> Layout | None:
    """How the short prompt comes from the full one; None where nothing was removed, now or in what the cache holds."""
    changed = pictures.changed or (cached is not None and cached.removed > 0)
    if pad_left and acts_inside(method, max(report.before, default=0)) and bool((call.mask[:, -1] == 0).any()):
        changed = True  # rows padded on the right are generated from as if padded on the left, as where tokens were removed
    if not changed:
        return None
    kept = [item.kept for item in report.items]
    return shorten(pictures.visual, call.mask.bool(), report.before, kept, cached, method.settings(), pad_left=pad_left)


def _asked(call: Call, front: FrontReducer, past: int) -> Asking:
    """How the method gets the question of each image; earlier turns, and what a training step teaches, are none of it."""
    ids, outside, labels = call.ids, call.outside, call.labels
    new = call.mask[:, outside:].bool() & (torch.arange(ids.shape[1], device=ids.device) >= past - outside)
    asked = new if labels is None else new & (labels == IGNORED)
    visual, special = call.parts.visual(ids), call.parts.special_tokens()
    return Asking(
        call.parts, front.text_encoder(), ids, question_tokens(ids, asked, visual, special), call.mask[:, outside:].bool()
    )


def _inside_item(image: Tensor) -> Tensor:
    """[B, S] bool, text between visual tokens of one picture or video [B, S], such as breaks of rows and times of frames."""
    place = torch.arange(image.shape[1], device=image.device).expand_as(image)
    before = torch.where(image >= 0, place, -1).cummax(1).values
    after = -torch.where(image >= 0, -place, -image.shape[1]).flip(1).cummax(1).values.flip(1)
    both = (before >= 0) & (after < image.shape[1])
    same = image.gather(1, before.clamp(min=0)) == image.gather(1, after.clamp(max=image.shape[1] - 1))
    return (image < 0) & both & same


def acts_inside(method: Method, tokens: int) -> bool:
    """Whether a method may remove, or change, something inside the decoder of images that have ``tokens`` visual tokens.

    A budget that covers all of them leaves the model as it is.
    """
    return tokens > 0 and (any(method.acting(tokens)) or method.first_tokens(tokens) is not None)


def expected_prompt(parts: Anatomy, ids: Tensor, mask: Tensor, report: Report, labels: Tensor | None = None) -> DecoderPrompt:
    """What the decoder is about to read, for methods that act inside it.

    Parameters
    ----------
    ids : [B, S] the new tokens of the short prompt.
    mask : [B, past + S] its attention mask, what a cache holds included.
    report : knows how many tokens each image has.
    labels : [B, S] of a training step; what they teach is not part of the question.
    """
    past, real = mask.shape[1] - ids.shape[1], mask.bool()
    visual = parts.visual(ids)
    sizes = torch.tensor(report.after, device=ids.device)
    image = torch.full(ids.shape, -1, device=ids.device)  # of int64, whatever the ids are
    numbers = torch.tensor([report.rows[:i].count(row) for i, row in enumerate(report.rows)], device=ids.device)
    image[visual] = numbers.repeat_interleave(sizes)
    cell = torch.full((3, *ids.shape), -1, dtype=torch.long, device=ids.device)
    if report.items:
        columns = [
            torch.tensor([c for _, c in item.grids] or [1], device=ids.device)[item.part.clamp(min=0)] for item in report.items
        ]
        part = torch.cat([item.part for item in report.items]).to(ids.device)
        own = -2 - torch.arange(len(part), device=ids.device)  # what is in no grid is nobody's neighbour
        place, width = torch.cat([item.cell for item in report.items]).to(ids.device), torch.cat(columns)
        inside = part >= 0
        cell[:, visual] = torch.stack([torch.where(inside, part, own), place // width, place % width])
    special = torch.isin(ids, torch.tensor(parts.special_tokens(), device=ids.device)) | _inside_item(image)
    valid, column = real[:, past:], torch.arange(ids.shape[1], device=ids.device)
    asked = valid
    if labels is not None:
        after = (visual.long().cumsum(1) > 0) & (labels != IGNORED)
        asked = valid & (after.long().cumsum(1) == 0)
        special = special | (labels != IGNORED)  # what is taught is never removed
    last = (column * asked).amax(1)
    return DecoderPrompt(image, cell, valid, special, last, past, real[:, :past])
