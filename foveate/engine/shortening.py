"""From a prompt with pictures to a short one: encode, reduce, lay out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..methods.base import TokenReducer
from ..report import Report
from ..tokens import Reduction
from .families import Anatomy
from .prompt import Layout, cached_layout, image_rows, shorten
from .seams import PRE_ENCODED, has_pixels
from .vision import encode_and_reduce


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
    parts: Anatomy, method: TokenReducer, ids: Tensor, mask: Tensor, kwargs: dict[str, Any], report: Report, *, pad_left: bool
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
        visuals = encode_and_reduce(parts, method, kwargs, report.clock)
        embeds, kept, changed = visuals.embeds, visuals.kept, changed or visuals.changed
        sizes = [visuals.size] * len(embeds)
        kwargs[PRE_ENCODED] = {"image": visuals.output}
        report.rows, report.grid, report.reduction = image_rows(visual, sizes)[1], visuals.grid, visuals.reduction
        report.before, report.after = sizes, [len(features) for features in embeds]
    layout = None
    if changed:
        layout = shorten(visual, mask.bool(), sizes, kept, cached, method.settings(), pad_left=pad_left)
    return ShortPrompt(layout, held, embeds, report.reduction)
