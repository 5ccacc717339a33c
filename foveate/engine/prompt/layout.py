"""Shortening a prompt: surplus placeholders go, everything with one entry per token follows, padding is laid out anew."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...errors import CacheError, InputError
from ..model.marks import chosen_rows, layout_of


@dataclass(frozen=True)
class Layout:
    """How a short prompt came from the full one.

    Attributes
    ----------
    gather : [B, T'] the column of the full prompt that each column of the short one holds; -1 = padding.
    length : T, columns of the full prompt.
    real : [B] tokens of the full prompt that are not padding.
    method : settings of the method that made it.
    reusable : False where a cache cannot be continued (beams, several sequences per prompt).
    ahead : [B, 1] by how much positions are ahead of what the mask counts: transformers numbered the padding of a cache that was
        filled by hand before. None = not at all.
    """

    gather: Tensor
    length: int
    real: Tensor
    method: dict[str, Any]
    reusable: bool = True
    ahead: Tensor | None = None

    @property
    def removed(self) -> int:
        """Columns by which the prompt became shorter."""
        return self.length - self.gather.shape[1]

    def take(self, values: Tensor, fill: int | Tensor) -> Tensor:
        """[B, T] or [..., B, T] values of the full prompt -> [..., B, T'] of the short one."""
        index = self.gather.to(values.device)
        values = values.expand(*values.shape[:-2], len(index), values.shape[-1])
        taken = values.gather(-1, index.clamp(min=0).expand(*values.shape[:-1], -1))
        return torch.where(index < 0, torch.as_tensor(fill, dtype=values.dtype, device=values.device), taken)

    def of_last(self, values: Tensor) -> Tensor:
        """[B, S] values of the last S tokens of the full prompt -> those of them that are left."""
        earlier = self.length - values.shape[1]
        if earlier < 0:
            raise InputError(f"an input with one entry per token has {values.shape[1]} columns, and the prompt has {self.length}")
        taken = self.take(torch.nn.functional.pad(values, (earlier, 0)), 0)
        held = int((self.gather < earlier).all(0).sum()) if earlier else 0  # columns of what a cache has
        return taken[:, held:]

    def chosen(self, rows: int, index: Tensor) -> Layout:
        """The layout of a cache of ``rows`` rows of which those at ``index`` are left."""
        gather, real = (chosen_rows(values, rows, index) for values in (self.gather, self.real))
        ahead = None if self.ahead is None else chosen_rows(self.ahead, rows, index)
        return replace(self, gather=gather, real=real, ahead=ahead)

    def cropped(self, held: int) -> Layout:
        """The layout of a cache of which only the first ``held`` columns are left.

        Raises
        ------
        CacheError : it was cut inside or before a picture whose tokens were removed.
        """
        removed = self.gather.shape[1] - held
        length = self.length - removed
        tail = self.gather[:, held:]
        expected = torch.arange(length, self.length, device=tail.device)
        if not bool(((tail == expected) | (tail < 0)).all()):
            raise CacheError(
                f"this cache was cropped to {held} tokens, inside a picture or before one whose tokens were removed. "
                "Start a new cache."
            )
        return replace(self, gather=self.gather[:, :held], length=length, real=self.real - (tail >= 0).sum(1))

    def extended(self, columns: int) -> Layout:
        """The layout after ``columns`` further tokens that were all kept."""
        if columns == 0:
            return self
        new = torch.arange(self.length, self.length + columns, device=self.gather.device).expand(len(self.gather), -1)
        gather = torch.cat([self.gather, new], 1)
        return replace(self, gather=gather, length=self.length + columns, real=self.real + columns)


def cached_layout(cache: Any, rows: int, method: dict[str, Any], device: torch.device) -> Layout | None:
    """The layout of what a cache already holds, None for an empty or missing cache.

    Raises
    ------
    CacheError : the cache was made with another method, for other rows, with beams, or was cut inside its prompt.
    """
    held = 0 if cache is None else int(cache.get_seq_length())
    if held == 0:
        return None
    layout = layout_of(cache)
    if layout is None:  # made without foveate, or nothing was removed: every column is there
        return Layout(torch.arange(held, device=device).expand(rows, -1), held, torch.full((rows,), held, device=device), method)
    if not layout.reusable:
        raise CacheError("a cache of beam search or of several sequences per prompt cannot be continued. Start a new cache.")
    if layout.method != method:
        raise CacheError(
            f"this cache was made with {layout.method['name']!r} in other settings or by another method than {method['name']!r}. "
            "Continue it with the same settings, or start a new cache."
        )
    if len(layout.gather) != rows:
        raise CacheError(f"this cache holds {len(layout.gather)} rows, and {rows} rows were given. Start a new cache.")
    if held < layout.gather.shape[1]:
        return layout.cropped(held)
    return layout.extended(held - layout.gather.shape[1])


def layout_past(cache: Any) -> int:
    """Columns of the full prompt that a cache stands for."""
    held = 0 if cache is None else int(cache.get_seq_length())
    layout = layout_of(cache)
    return held if layout is None else held + layout.removed


def image_rows(visual: Tensor, sizes: Sequence[int], what: str = "image") -> tuple[Tensor, list[tuple[int, int]]]:
    """Where the placeholders are, [placeholders, 2] as (row, column), and row and first column of each image.

    Parameters
    ----------
    visual : [B, T] bool, which tokens are placeholders.
    sizes : placeholders that each image needs, in the order of the prompts.
    what : "image" or "video".

    Raises
    ------
    InputError : placeholders and images do not fit.
    """
    places = visual.nonzero()
    if len(places) != sum(sizes):
        raise InputError(
            f"the prompts have {len(places)} {what} placeholders and the {len(sizes)} {what}(s) give {sum(sizes)} visual tokens. "
            f"Make text and {what}s with the model's processor in one call, with one {what} tag for each {what}."
        )
    if not sizes:
        return places, []
    starts = torch.tensor([0, *sizes[:-1]]).cumsum(0)
    ends = starts + torch.tensor(sizes) - 1
    first, last = (places[at.to(places.device)].tolist() for at in (starts, ends))
    if any(a[0] != b[0] for a, b in zip(first, last, strict=True)):
        raise InputError(f"the placeholders of one {what} lie in two prompts. Check the number of {what} tags in each prompt.")
    return places, [(row, column) for row, column in first]


def runs_of(visual: Tensor) -> list[int]:
    """Lengths of the runs of placeholders [B, T] bool, row by row."""
    edges = torch.nn.functional.pad(visual, (1, 1)).long().diff(dim=1)
    return ((edges == -1).nonzero()[:, 1] - (edges == 1).nonzero()[:, 1]).tolist()


def shorten(
    visual: Tensor,
    valid: Tensor,
    sizes: Sequence[int],
    kept: Sequence[Tensor],
    cached: Layout | None,
    method: dict[str, Any],
    *,
    pad_left: bool,
) -> Layout:
    """Lay out the short prompt.

    Parameters
    ----------
    visual : [B, T] bool, placeholders of the images of this call.
    valid : [B, T] bool, tokens that are not padding.
    sizes : placeholders per image.
    kept : per image, the placeholders that stay, in the order of the features.
    cached : layout of the columns that a cache holds already; they stay as they are.
    pad_left : whether all padding goes to the left. Otherwise each row keeps its padding at the end, and is filled up on the left:
        the last columns are those of the full prompt, which callers count from (``logits_to_keep``).
    """
    places, _ = image_rows(visual, sizes)
    stays = torch.zeros(len(places), dtype=torch.bool, device=places.device)
    columns, start = places[:, 1].clone(), 0
    for size, index in zip(sizes, kept, strict=True):
        index = index.to(places.device)
        slots = start + index.sort().values  # text may stand between them, as breaks of rows or times of frames
        stays[slots] = True
        columns[slots] = places[start + index, 1]
        start += size
    rows, length = visual.shape
    # ``source`` is the full column that each column would show, ``keep`` whether it stays: text shows itself, and the placeholders
    # that stay show the kept tokens of their picture one after the other, in the order of the features
    source = torch.arange(length, device=visual.device).expand(rows, -1).clone()
    keep = valid.clone()
    source[visual] = columns
    keep[visual] = stays  # also where a mask hides a placeholder: its features come all the same
    past = 0 if cached is None else cached.length
    keep[:, :past] = False
    # rows close up to the widest one; what is not kept is written to a spare column that is cut off again
    counts = keep.sum(1, keepdim=True)
    trailing = torch.zeros_like(counts) if pad_left else padding_after(valid)[:, None].clamp(max=length - past)
    width = int((counts + trailing).max())
    slot = keep.cumsum(1) - 1 + width - counts - trailing
    gather = source.new_full((rows, width + 1), -1)  # the last column takes what is not kept
    gather = gather.scatter(1, slot.masked_fill(~keep, width), source.masked_fill(~keep, -1))[:, :width]
    if cached is not None:
        gather = torch.cat([cached.gather.to(gather.device), gather], 1)
    return Layout(gather, length, valid.sum(1), method)


def padding_after(valid: Tensor) -> Tensor:
    """[B] columns of padding after the last token of each row [B, T] bool; all of them where there is none."""
    return (valid.flip(1).long().cumsum(1) == 0).sum(1)


def original_positions(valid: Tensor) -> Tensor:
    """[B, T] position of each token in the full prompt, padding not counted (0 there)."""
    return (valid.long().cumsum(1) - 1).clamp(min=0)


def filler(ids: Tensor, mask: Tensor, visual: Tensor) -> Tensor:
    """[B, 1] what to write into padding: the first text token of each row, so that penalties on tokens seen stay the same."""
    text = mask.bool() & ~visual
    first = ids.gather(1, text.long().argmax(1, keepdim=True))
    spare = int(bool((ids[visual] == 0).any()))  # no placeholder
    return torch.where(text.any(1, keepdim=True), first, spare)


def short_rows(layout: Layout, values: Tensor, fill: Any, outside: int, held: int) -> Tensor:
    """[B, S] values of tokens -> [B, S'] of those that are left, without the ones that only the cache has.

    Parameters
    ----------
    outside : columns of the full prompt before the S ones.
    held : columns of the short prompt that the cache holds.
    fill : for padding, one value or [B, 1].
    """
    front = torch.as_tensor(fill, dtype=values.dtype, device=values.device).expand(len(values), outside)
    return layout.take(torch.cat([front, values], 1), fill)[:, held if outside else 0 :]
