"""One call of ``generate``, ``forward`` or ``encode``: read once, made shorter, and written as arguments again.

``read`` takes the arguments apart, ``shorten`` encodes and reduces the pictures and lays out the short prompt, and
``ShortCall.arguments`` is what the model is called with. What the user passed is never changed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError
from ..methods.base import Method
from ..report import Report
from ..tokens import Reduction
from .model.anatomy import Anatomy
from .model.inputs import check_sizes, check_tensors
from .model.seams import (
    LAYERED_INPUTS,
    PACKED_INPUTS,
    PER_TOKEN_INPUTS,
    PRE_ENCODED,
    cache_in,
    encodings_in,
    modalities,
    of_modality,
)
from .prompt.layout import Layout, cached_layout, filler, short_rows
from .prompt.positions import Positions
from .prompt.shorten import IGNORED, PromptPictures, check_columns, lay_out, read_pictures
from .vision.encoding import Encodings

TAUGHT = ("labels", "shift_labels", "num_items_in_batch")


@dataclass(frozen=True)
class Call:
    """What a call says, each thing in its place.

    Attributes
    ----------
    parts : of the model.
    arguments : all of them, by today's names.
    ids : [B, S] tokens: the whole prompt, or what the cache does not hold yet.
    mask : [B, T] attention mask of the whole prompt, T >= S.
    pixels : by modality, what the model's own encoding takes.
    encodings : pictures that are encoded already, and with them their pixels; None = they come as pixels.
    """

    parts: Anatomy
    arguments: dict[str, Any]
    ids: Tensor
    mask: Tensor
    pixels: dict[str, dict[str, Any]]
    encodings: Encodings | None = None

    @property
    def cache(self) -> Any:
        """The key-value cache, or None."""
        return cache_in(self.arguments)

    @property
    def labels(self) -> Tensor | None:
        """[B, S] of a training step, also where they came shifted by one."""
        labels, shifted = (self.arguments.get(name) for name in TAUGHT[:2])
        return F.pad(shifted[:, :-1], (1, 0), value=IGNORED) if labels is None and shifted is not None else labels

    @property
    def outside(self) -> int:
        """Columns of the mask that stand for tokens in the cache only."""
        return self.mask.shape[1] - self.ids.shape[1]


def read(parts: Anatomy, arguments: dict[str, Any], ids: Tensor, mask: Tensor | None) -> Call:
    """Take the arguments of a call apart; no mask is a mask of ones.

    Raises
    ------
    UnsupportedModelError : there are pictures or videos that the engine does not take.
    InputError : they come without their sizes, which the prompt depends on.
    """
    mask = torch.ones_like(ids) if mask is None else mask
    mask = mask.expand(len(ids), -1) if mask.ndim == 2 and len(mask) == 1 else mask  # one row for all
    encodings = encodings_in(arguments)
    if encodings is not None:
        return Call(parts, arguments, ids, mask, encodings.inputs, encodings)
    kinds = modalities(arguments)
    parts.check_together(kinds)
    for modality in kinds:
        parts.of(modality).check_modality()
        check_sizes(parts.of(modality).arrangement, modality, arguments)
    base = parts.model.base_model
    return Call(parts, arguments, ids, mask, {modality: of_modality(base, modality, arguments) for modality in kinds})


@dataclass(frozen=True)
class ShortCall:
    """A call after reduction.

    Attributes
    ----------
    call : as it was read.
    layout : None where nothing was removed, now or earlier.
    held : columns of the short prompt that the cache holds.
    pictures : encoded and reduced.
    positions : how its tokens are numbered.
    """

    call: Call
    layout: Layout | None
    held: int
    pictures: PromptPictures
    positions: Positions

    @property
    def embeds(self) -> list[Tensor]:
        """Visual tokens of each item, in the space of the decoder."""
        return self.pictures.embeds

    @property
    def reduction(self) -> Reduction | None:
        """Of all grids; None without pictures."""
        return self.pictures.reduction

    @property
    def ids(self) -> Tensor:
        """[B, S'] tokens, as the model gets them."""
        call = self.call
        if self.layout is None:
            return call.ids
        fill = filler(call.ids, call.mask[:, call.outside :], call.parts.visual(call.ids))
        return short_rows(self.layout, call.ids, fill, call.outside, self.held)

    @property
    def new_ids(self) -> Tensor:
        """[B, S''] those of them that the cache does not hold."""
        return self.ids[:, 0 if self.call.outside else self.held :]

    @property
    def mask(self) -> Tensor:
        """[B, T'] attention mask of the whole short prompt."""
        return self.call.mask if self.layout is None else self.layout.take(self.call.mask, 0)

    @property
    def labels(self) -> Tensor | None:
        """[B, S'] of a training step."""
        labels = self.call.labels
        if self.layout is None or labels is None:
            return labels
        return short_rows(self.layout, labels, IGNORED, self.call.outside, self.held)

    def training(self) -> dict[str, Any]:
        """What a training step teaches, of the short prompt; nothing where the prompt has stayed as it is.

        Placeholders are never taught: which of them stay is not the text's to say.
        """
        call, layout = self.call, self.layout
        if layout is None:
            return {}
        found = {name: value for name, value in taught(call.parts, call.ids, call.arguments).items() if name in TAUGHT}
        if found.get("labels") is not None:
            found["labels"] = short_rows(layout, found["labels"], IGNORED, call.outside, self.held)
        shifted = found.get("shift_labels")
        if shifted is not None:  # of each column the label of the next one, which may be another one now
            labels = short_rows(layout, F.pad(shifted[:, :-1], (1, 0), value=IGNORED), IGNORED, call.outside, self.held)
            found["shift_labels"] = torch.cat([labels[:, 1:], shifted[:, -1:]], 1)
        return found

    def arguments(self) -> dict[str, Any]:
        """Everything but ``input_ids`` that the model is called with: encoded pictures, and inputs that follow the short prompt."""
        call, layout = self.call, self.layout
        raw = {name for inputs in call.pixels.values() for name in inputs}
        found = {name: value for name, value in call.arguments.items() if name not in raw and name != "input_ids"}
        if self.pictures.encoded:
            found[PRE_ENCODED] = self.pictures.encoded
        positions = self.positions.full
        if layout is not None:
            packed = [name for name in PACKED_INPUTS if found.get(name) is not None]
            if packed:
                raise InputError(f"{packed[0]}: packed prompts cannot be shortened. Give each prompt a row of its own.")
            if found.get(LAYERED_INPUTS) is not None:
                raise InputError(f"{LAYERED_INPUTS} cannot be shortened. Leave it out: the model looks it up by input_ids.")
            found["attention_mask"], positions = self.mask, self.positions.follow(layout, call.mask)
            found.pop("position_ids", None)
            found |= self.training()
            for name in PER_TOKEN_INPUTS:
                if found.get(name) is not None:
                    found[name] = layout.of_last(found[name])
        if positions is not None:
            found["position_ids"] = positions
        return found


def taught(parts: Anatomy, ids: Tensor, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments with labels that teach no placeholder, and with the number of labels that a loss is divided by in proportion.

    Trainers count labels over several steps and processes; a step knows its own, so that its share stands for all.
    """
    found, visual = dict(arguments), parts.visual(ids)
    labels, shifted, number = (arguments.get(name) for name in TAUGHT)
    before = after = 0
    if labels is not None:
        found["labels"] = labels.masked_fill(visual.to(labels.device), IGNORED)
        before, after = (int((each[:, 1:] != IGNORED).sum()) for each in (labels, found["labels"]))
    if shifted is not None:
        found["shift_labels"] = shifted.masked_fill(F.pad(visual[:, 1:], (0, 1)).to(shifted.device), IGNORED)
        before, after = (int((each != IGNORED).sum()) for each in (shifted, found["shift_labels"]))
    if number is not None and before:
        found["num_items_in_batch"] = number * (after / before)
    return found


def shorten(call: Call, method: Method, report: Report, *, pad_left: bool) -> ShortCall:
    """Encode and reduce the pictures of a call, and lay out the short prompt.

    Parameters
    ----------
    call : as ``read`` gave it.
    method : what reduces.
    report : filled in.
    pad_left : whether all padding goes to the left, as ``generate`` needs it. Otherwise padding at the end of a row stays there.

    Raises
    ------
    InputError : prompt, pictures, mask, positions and cache do not fit together.
    CacheError : the cache cannot be continued.
    """
    cached = cached_layout(call.cache, len(call.ids), method.settings(), call.ids.device)
    past = 0 if cached is None else cached.length
    positions = Positions(call.parts, method.before_decoder().positions == "compact", call.arguments.get("position_ids"))
    positions.count(call.ids, call.mask, past, bool(call.pixels), call.arguments)
    check_columns(call.ids, call.mask, past)
    report.decoder_layers = call.parts.decoder_layers
    pictures = read_pictures(call, method, past, report)
    layout = lay_out(call, method, cached, pictures, report, pad_left=pad_left)
    return ShortCall(call, layout, 0 if cached is None else cached.gather.shape[1], pictures, positions)


def continued(parts: Anatomy, method: Method, arguments: dict[str, Any]) -> dict[str, Any]:
    """New text tokens on a shortened cache, called by hand: the mask may still count the full prompt."""
    ids, mask, cache = arguments.get("input_ids"), arguments.get("attention_mask"), cache_in(arguments)
    check_tensors(ids, arguments)
    if ids is None:
        raise InputError("a conversation on a shortened cache goes on with input_ids; inputs_embeds cannot be followed there.")
    cached = cached_layout(cache, len(ids), method.settings(), ids.device)
    if cached is None:
        return arguments
    new, given = ids.shape[1], arguments.get("position_ids")
    numbered = Positions(parts, method.before_decoder().positions == "compact", given)
    layout = cached.extended(new)
    if mask is None:
        mask = torch.ones(len(ids), layout.length, dtype=torch.long, device=ids.device)
    numbered.forget_counts(mask)
    changed, positions = dict(arguments), given
    if mask.shape[1] == layout.length:
        changed["attention_mask"], positions = layout.take(mask, 0), numbered.follow(layout, mask)
        changed |= {name: layout.of_last(arguments[name]) for name in PER_TOKEN_INPUTS if arguments.get(name) is not None}
    elif mask.shape[1] != layout.gather.shape[1]:
        raise InputError(
            f"attention_mask has {mask.shape[1]} columns; expected {layout.length} for the full prompt and the new tokens "
            f"(or {layout.gather.shape[1]} for the shortened one)"
        )
    elif not numbered.compact and given is None:
        positions = cached.real[:, None] + torch.arange(new, device=ids.device)
    counted = changed.get("attention_mask")
    counted = mask if counted is None else counted
    changed["position_ids"] = numbered.of_new(positions, counted, cached.ahead, new)
    return changed
