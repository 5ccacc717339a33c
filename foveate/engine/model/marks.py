"""What is remembered on a key-value cache: how its prompt was shortened, and what was cut inside the decoder that filled it.

What is remembered has rows, as the cache has. Methods of the cache that re-order, repeat or choose rows change both.
"""

from __future__ import annotations

import types
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .seams import CROPS_TO_LENGTH, cached_rows

if TYPE_CHECKING:
    from ..decoder.stages import HeldCuts
    from ..prompt.layout import Layout

_LAYOUT = "_foveate_layout"
_CUTS = "_foveate_cuts"


def layout_of(cache: Any) -> Layout | None:
    """How the prompt in a cache was shortened, None if it was not."""
    return getattr(cache, _LAYOUT, None)


def mark(cache: Any, layout: Layout) -> None:
    """Remember on a cache how its prompt was shortened."""
    setattr(cache, _LAYOUT, layout)
    _follow(cache)


def cuts_of(cache: Any) -> HeldCuts | None:
    """What was removed between the decoder layers that filled a cache, None if nothing."""
    return getattr(cache, _CUTS, None)


def mark_cuts(cache: Any, cuts: HeldCuts) -> None:
    """Remember on a cache what its layers hold."""
    setattr(cache, _CUTS, cuts)
    _follow(cache)


def forget_if_empty(cache: Any) -> None:
    """A cache that was reset holds no prompt any more."""
    for name in (_LAYOUT, _CUTS):
        if getattr(cache, name, None) is not None and int(cache.get_seq_length()) == 0:
            delattr(cache, name)


def restore(cache: Any, layout: Layout | None) -> None:
    """Mark a cache as it was marked before."""
    if layout is not None:
        mark(cache, layout)
    elif layout_of(cache) is not None:
        delattr(cache, _LAYOUT)


# -- methods of a cache that change its rows, or its length


def reorder_cache(cache: Any, beam_idx: Tensor) -> None:
    rows = cached_rows(cache)
    type(cache).reorder_cache(cache, beam_idx)
    _choose(cache, rows, beam_idx)


def batch_select_indices(cache: Any, indices: Any) -> None:
    rows = cached_rows(cache)
    type(cache).batch_select_indices(cache, indices)
    _choose(cache, rows, torch.arange(rows)[indices if isinstance(indices, slice) else torch.as_tensor(indices).cpu()])


def batch_repeat_interleave(cache: Any, repeats: int) -> None:
    rows = cached_rows(cache)
    type(cache).batch_repeat_interleave(cache, repeats)
    _choose(cache, rows, torch.arange(rows).repeat_interleave(repeats))


def crop(cache: Any, tokens: int) -> None:
    """A positive number is a length, which is another one in layers that hold fewer tokens."""
    if CROPS_TO_LENGTH and tokens > 0:
        tokens = min(0, tokens - int(cache.get_seq_length()))
    type(cache).crop(cache, tokens)


def _follow(cache: Any) -> None:
    """Let the methods of a cache change what is remembered on it, too."""
    for method in (reorder_cache, batch_select_indices, batch_repeat_interleave, crop):
        if hasattr(type(cache), method.__name__) and method.__name__ not in vars(cache):
            vars(cache)[method.__name__] = types.MethodType(method, cache)


def _choose(cache: Any, rows: int, index: Tensor) -> None:
    """Of ``rows`` rows, which may be several beams of each prompt, those at ``index`` are left."""
    layout, cuts = layout_of(cache), cuts_of(cache)
    if layout is not None and layout.reusable:
        setattr(cache, _LAYOUT, layout.chosen(rows, index))
    if cuts is not None:
        setattr(cache, _CUTS, cuts.chosen(rows, index))


def chosen_rows(values: Tensor, rows: int, index: Tensor) -> Tensor:
    """[B, ...] values of prompts, of which ``rows`` rows were made, -> [len(index), ...] those of some rows."""
    whole = values.repeat_interleave(rows // len(values), 0) if rows != len(values) else values
    return whole[index.to(values.device)]
