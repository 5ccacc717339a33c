"""From a prompt with pictures to a short one: encode, reduce, lay out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError
from ..methods.base import FrontReducer, Method
from ..report import Report
from ..tokens import Reduction
from .asking import Asking, asking, question_tokens
from .families import Anatomy
from .front import encode_and_reduce
from .prompt import Layout, cached_layout, image_rows, shorten
from .seams import PRE_ENCODED, has_pixels
from .stages import Prompt

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
    cached = cached_layout(kwargs.get("past_key_values"), len(ids), method.settings(), ids.device)
    past = 0 if cached is None else cached.length
    held = 0 if cached is None else cached.gather.shape[1]
    outside = mask.shape[1] - ids.shape[1]
    if outside not in (0, past):
        raise InputError(
            f"attention_mask has {mask.shape[1]} columns, input_ids {ids.shape[1]} and the cache {past}: give either the whole "
            "prompt or only its new tokens, with a mask for the whole prompt."
        )
    visual = torch.cat([ids.new_zeros(len(ids), outside), ids], 1) == parts.image_token
    visual[:, :past] = False
    report.decoder_layers = parts.decoder_layers
    sizes: list[int] = []
    kept: list[Tensor] = []
    embeds: list[Tensor] = []
    changed = cached is not None and cached.removed > 0
    if has_pixels(kwargs):
        front = method.before_decoder()
        asked = _asked(parts, front, ids, mask, past, kwargs) if front.reads_question else None
        visuals = encode_and_reduce(parts, front, kwargs, report.clock, asked)
        embeds, kept, changed = visuals.embeds, visuals.kept, changed or visuals.changed
        sizes = [visuals.size] * len(embeds)
        kwargs[PRE_ENCODED] = {"image": visuals.output}
        report.rows, report.grid, report.reduction = image_rows(visual, sizes)[1], visuals.grid, visuals.reduction
        report.before, report.after = sizes, [len(features) for features in embeds]
        report.encoder_counts, report.notes = visuals.encoder_counts, [*report.notes, *visuals.notes]
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
    words = question_tokens(ids, asked, parts.image_token, parts.special_tokens())
    rows = ((ids == parts.image_token) & new).nonzero()[:, 0].tolist()
    return asking(parts, front.text_encoder(), ids, words, rows)


def acts_inside(method: Method, tokens: int) -> bool:
    """Whether a method may remove something inside the decoder of images that have ``tokens`` visual tokens.

    A budget that covers all of them leaves the model as it is.
    """
    return tokens > 0 and any(method.acting(tokens))


def expected_prompt(parts: Anatomy, ids: Tensor, mask: Tensor, report: Report, labels: Tensor | None = None) -> Prompt:
    """What the decoder is about to read, for methods that act inside it.

    Parameters
    ----------
    ids : [B, S] the new tokens of the short prompt.
    mask : [B, past + S] its attention mask, what a cache holds included.
    report : knows how many tokens each image has.
    labels : [B, S] of a training step; what they teach is not part of the question.
    """
    past, real = mask.shape[1] - ids.shape[1], mask.bool()
    visual = ids == parts.image_token
    sizes = torch.tensor(report.after, device=ids.device)
    image = torch.full_like(ids, -1)
    numbers = torch.tensor([report.rows[:i].count(row) for i, row in enumerate(report.rows)], device=ids.device)
    image[visual] = numbers.repeat_interleave(sizes)
    cell = torch.full_like(ids, -1)
    if report.reduction is not None:
        index, kept = report.reduction.index, report.reduction.mask()
        lead = sizes - kept.sum(1).to(sizes)  # tokens in front of the grid, such as [CLS]
        places = [F.pad(one[some], (int(n), 0), value=-1) for one, some, n in zip(index, kept, lead.tolist(), strict=True)]
        cell[visual] = torch.cat(places).to(cell)
    special = torch.isin(ids, torch.tensor(parts.special_tokens(), device=ids.device))
    valid, column = real[:, past:], torch.arange(ids.shape[1], device=ids.device)
    asked = valid
    if labels is not None:
        behind = (visual.long().cumsum(1) > 0) & (labels != IGNORED)
        asked = valid & (behind.long().cumsum(1) == 0)
        special = special | (labels != IGNORED)  # what is taught is never removed
    last = (column * asked).amax(1)
    return Prompt(image, cell, report.grid, valid, special, last, past, real[:, :past])
