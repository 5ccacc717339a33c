"""Bookkeeping of cuts: the prompt a decoder is about to read, what is left of it from a layer on, and what caches hold of it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ...cuts import PromptTokens
from ...errors import CacheError
from ..model.marks import chosen_rows


@dataclass(frozen=True)
class DecoderPrompt:
    """The new columns of a (shortened) prompt, S of them, after ``past`` ones that a cache holds.

    Attributes
    ----------
    image : [B, S] the picture or video of its row that a visual token belongs to, -1 = none.
    cell : [3, B, S] the grid of its row that it belongs to, a number of its own where that is none, and its row and column there.
    valid : [B, S] bool.
    special : [B, S] bool, tokens of the model's own such as the end of a turn.
    last : [B] the last column of the question; in training the one before the answer.
    past : columns that the cache holds, of them ``past_valid`` [B, past] are no padding.
    """

    image: Tensor
    cell: Tensor
    valid: Tensor
    special: Tensor
    last: Tensor
    past: int
    past_valid: Tensor

    @property
    def width(self) -> int:
        return self.image.shape[1]

    def resized(self, rows: int, width: int, device: torch.device) -> DecoderPrompt:
        """The same for ``rows`` rows (beams repeat each) and ``width`` columns (those after the prompt are text)."""
        copies, more = rows // len(self.image), width - self.width

        def fit(values: Tensor, fill: Any) -> Tensor:
            values = values.to(device).repeat_interleave(copies, -2)
            return torch.nn.functional.pad(values, (0, more), value=fill)

        return DecoderPrompt(
            fit(self.image, -1),
            fit(self.cell, -1),
            fit(self.valid, True),
            fit(self.special, False),
            self.last.to(device).repeat_interleave(copies, 0),
            self.past,
            self.past_valid.to(device).repeat_interleave(copies, 0),
        )

    def tokens(self, hidden: Tensor, layers: int) -> PromptTokens:
        """What methods see of it before the first layer."""
        column = torch.arange(self.width, device=hidden.device).expand(len(hidden), -1)
        visual = self.image >= 0
        after = visual.long().cumsum(1) > 0
        text = self.valid & ~visual & (column <= self.last[:, None])
        question = text & after & ~self.special
        protected = self.valid & ~visual & (self.special | ~after | (column >= self.last[:, None]))
        images = max(int(self.image.max()) + 1, 1)
        initial = (self.image[:, None] == torch.arange(images, device=hidden.device)[:, None]).sum(-1)
        return PromptTokens(
            hidden,
            self.image,
            self.valid,
            question,
            protected,
            self.last,
            column,
            initial,
            0,
            layers,
            prompt_text=text & after,
        )


@dataclass(frozen=True)
class Stage:
    """What runs from layer ``start`` on: rows are aligned to the right, so that the last column is each row's last token.

    Attributes
    ----------
    order : [B, M] which token of the stage before each one is.
    index : [B, M] its column of this call.
    valid : [B, M] bool.
    plain : every one of them is valid.
    visual : how many of them are visual tokens, in the whole batch.
    positions : [B, M] new position ids, None = the original ones.
    shift : [B, 1] by how much the positions of what follows are smaller, None = not at all.
    """

    start: int
    order: Tensor
    index: Tensor
    valid: Tensor
    plain: bool
    visual: int
    positions: Tensor | None = None
    shift: Tensor | None = None


@dataclass(frozen=True)
class Held:
    """What the caches of layers from a cut on hold of the prompt.

    Attributes
    ----------
    columns : [B, n] column of each key, -1 = padding.
    full : columns of the whole prompt at that time; what was added later was not cut.
    plain, shift : as in ``Stage``.
    """

    columns: Tensor
    full: int
    plain: bool
    shift: Tensor | None

    def extended(self, length: int, new: int, rows: int) -> Tensor:
        """[rows, length + new] columns of a cache that has ``length`` keys, and of ``new`` ones after them.

        Raises
        ------
        CacheError : the cache was cropped inside its prompt, or has other rows.
        """
        lost = self.columns.shape[1] - length
        if lost > 0:
            return self._cropped(lost).extended(length, new, rows)
        more = length + new - self.columns.shape[1]
        if rows % len(self.columns):
            raise CacheError(f"this cache was made for {len(self.columns)} rows, and {rows} were given. Start a new cache.")
        later = torch.arange(self.full, self.full + more, device=self.columns.device)
        columns = self.columns.repeat_interleave(rows // len(self.columns), 0)
        return torch.cat([columns, later.expand(rows, -1)], 1)

    def _cropped(self, lost: int) -> Held:
        """The same without the last ``lost`` keys."""
        tail, full = self.columns[:, -lost:], self.full - lost
        if not bool(((tail == torch.arange(full, self.full, device=tail.device)) | (tail < 0)).all()):
            raise CacheError("this cache was cropped inside a prompt whose visual tokens were removed. Start a new cache.")
        return replace(self, columns=self.columns[:, :-lost], full=full)

    def chosen(self, rows: int, index: Tensor) -> Held:
        """Of a cache of ``rows`` rows of which those at ``index`` are left."""
        shift = None if self.shift is None else chosen_rows(self.shift, rows, index)
        return replace(self, columns=chosen_rows(self.columns, rows, index), shift=shift)


@dataclass
class HeldCuts:
    """All cuts in a cache, by the layer they begin at, the settings that made them, and whether it may be continued."""

    method: dict[str, Any]
    held: dict[int, Held] = field(default_factory=dict)
    reusable: bool = True

    def of(self, layer: int) -> Held | None:
        """What a layer's cache holds; None if all of the prompt."""
        starts = [start for start in self.held if start <= layer]
        return self.held[max(starts)] if starts else None

    def chosen(self, rows: int, index: Tensor) -> HeldCuts:
        """Of a cache of ``rows`` rows of which those at ``index`` are left."""
        return replace(self, held={layer: held.chosen(rows, index) for layer, held in self.held.items()})

    def copy(self) -> HeldCuts:
        return replace(self, held=dict(self.held))


def take(values: Tensor, order: Tensor) -> Tensor:
    """[B or 1, S, ...] values at ``order`` [B, M] -> [B, M, ...]."""
    order = order.to(values.device)
    values = values.expand(len(order), *values.shape[1:])
    index = order.view(*order.shape, *[1] * (values.ndim - 2)).expand(*order.shape, *values.shape[2:])
    return values.gather(1, index)


def place(values: Tensor, stage: Stage, width: int) -> Tensor:
    """[B, M, D] values of a stage at their columns of [B, width, D]; zeros elsewhere."""
    spare = stage.index.masked_fill(~stage.valid, width).to(values.device)  # padding goes to a column that is cut off again
    full = values.new_zeros(len(values), width + 1, values.shape[-1])
    return full.scatter(1, spare[..., None].expand_as(values), values)[:, :width]
