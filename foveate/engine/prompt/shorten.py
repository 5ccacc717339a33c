"""From a prompt with pictures to a short one: encode, reduce, lay out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import InputError
from ...methods.base import FrontReducer, Method
from ...report import Item, Report
from ...tokens import Reduction
from ..decoder.stages import DecoderPrompt
from ..model.anatomy import Anatomy
from ..model.seams import PRE_ENCODED, cache_in, has_pixels, modalities, of_modality
from ..vision.encoding import Visuals
from ..vision.front import encode_and_reduce
from ..vision.grouping import stacked
from ..vision.question import Asking, asking, question_tokens
from .layout import Layout, cached_layout, image_rows, runs_of, shorten

IGNORED = -100  # the label of what is not taught


@dataclass(frozen=True)
class ShortPrompt:
    """A prompt after reduction.

    Attributes
    ----------
    layout : None where nothing was removed, now or earlier.
    held : columns of the short prompt that the cache holds.
    embeds : visual tokens per image, in the space of the decoder.
    reduction : of all images; None without pictures.
    """

    layout: Layout | None
    held: int
    embeds: list[Tensor]
    reduction: Reduction | None


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


def shorten_prompt(
    parts: Anatomy, method: Method, ids: Tensor, mask: Tensor, kwargs: dict[str, Any], report: Report, *, pad_left: bool
) -> ShortPrompt:
    """Encode and reduce the pictures in ``kwargs`` and lay out the short prompt.

    Parameters
    ----------
    parts : where the parts of the model are.
    method : what reduces.
    ids : [B, S] tokens: the whole prompt, or what the cache does not hold yet.
    mask : [B, T] attention mask of the whole prompt, T >= S.
    kwargs : further arguments; those that describe pictures are taken out, the encoded pictures put in.
    report : filled in.
    pad_left : on which side rows are padded.
    """
    cached = cached_layout(cache_in(kwargs), len(ids), method.settings(), ids.device)
    past = 0 if cached is None else cached.length
    held = 0 if cached is None else cached.gather.shape[1]
    outside = mask.shape[1] - ids.shape[1]
    if outside not in (0, past):
        raise InputError(
            f"attention_mask has {mask.shape[1]} columns, input_ids {ids.shape[1]} and the cache {past}: give either the whole "
            "prompt or only its new tokens, with a mask for the whole prompt."
        )
    new = mask.new_zeros(mask.shape, dtype=torch.bool)
    new[:, max(past, outside) :] = True
    report.decoder_layers = parts.decoder_layers
    found: list[_Found] = []
    visual = new & False
    changed = cached is not None and cached.removed > 0
    if has_pixels(kwargs):
        front = method.before_decoder()
        asked = _asked(parts, front, ids, mask, past, kwargs) if front.reads_question else None
        whole = F.pad(ids, (outside, 0), value=-1)
        base, encoded = parts.model.base_model, {}
        for modality in modalities(kwargs):
            parts.of(modality).check_modality()
        given = {modality: of_modality(base, modality, kwargs) for modality in modalities(kwargs)}
        for modality, mine in given.items():
            here = new & (whole == parts.placeholders.get(modality, -1))
            visual = visual | here
            own = parts.of(modality, kwargs.get("vision_feature_layer"))

            def locate(sizes: list[int], here: Tensor = here, modality: str = modality) -> list[int]:
                return [row for row, _ in image_rows(here, sizes, modality)[1]]

            visuals = encode_and_reduce(own, front, mine, report.clock, asked, runs_of(here), locate)
            changed = changed or visuals.changed
            encoded[modality] = visuals.output
            starts = image_rows(here, visuals.arrangement.sizes, modality)[1]
            found += [_Found(start, i, modality, visuals) for i, start in enumerate(starts)]
            report.notes += [note for note in visuals.notes if note not in report.notes]
        for name in {name for mine in given.values() for name in mine}:
            del kwargs[name]
        kwargs[PRE_ENCODED] = encoded
        found.sort(key=lambda one: one.start)
        report.items = [one.reported() for one in found]
        report.reduction, report.encoder_counts = _together(found)
    sizes, kept, embeds = report.before, [item.kept for item in report.items], [one.embeds for one in found]
    layout = None
    if pad_left and acts_inside(method, max(report.before, default=0)) and bool((mask[:, -1] == 0).any()):
        changed = True  # rows padded on the right are generated from as if padded on the left, as where tokens were removed
    if changed:
        layout = shorten(visual, mask.bool(), sizes, kept, cached, method.settings(), pad_left=pad_left)
    return ShortPrompt(layout, held, embeds, report.reduction)


def _asked(parts: Anatomy, front: FrontReducer, ids: Tensor, mask: Tensor, past: int, kwargs: dict[str, Any]) -> Asking:
    """How the method gets the question of each image; earlier turns, and what a training step teaches, are none of it."""
    outside, labels = mask.shape[1] - ids.shape[1], kwargs.get("labels")
    new = mask[:, outside:].bool() & (torch.arange(ids.shape[1], device=ids.device) >= past - outside)
    asked = new if labels is None else new & (labels == IGNORED)
    words = question_tokens(ids, asked, parts.visual(ids), parts.special_tokens())
    return asking(parts, front.text_encoder(), ids, words)


def _inside_item(image: Tensor) -> Tensor:
    """[B, S] bool, text between visual tokens of one picture or video [B, S], such as breaks of rows and times of frames."""
    place = torch.arange(image.shape[1], device=image.device).expand_as(image)
    before = torch.where(image >= 0, place, -1).cummax(1).values
    behind = -torch.where(image >= 0, -place, -image.shape[1]).flip(1).cummax(1).values.flip(1)
    both = (before >= 0) & (behind < image.shape[1])
    same = image.gather(1, before.clamp(min=0)) == image.gather(1, behind.clamp(max=image.shape[1] - 1))
    return (image < 0) & both & same


def acts_inside(method: Method, tokens: int) -> bool:
    """Whether a method may remove something inside the decoder of images that have ``tokens`` visual tokens.

    A budget that covers all of them leaves the model as it is.
    """
    return tokens > 0 and any(method.acting(tokens))


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
    image = torch.full_like(ids, -1)
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
        behind = (visual.long().cumsum(1) > 0) & (labels != IGNORED)
        asked = valid & (behind.long().cumsum(1) == 0)
        special = special | (labels != IGNORED)  # what is taught is never removed
    last = (column * asked).amax(1)
    return DecoderPrompt(image, cell, valid, special, last, past, real[:, :past])
