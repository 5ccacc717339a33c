"""What is remembered on a key-value cache: how its prompt was shortened, and what was cut inside the decoder that filled it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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


def cuts_of(cache: Any) -> HeldCuts | None:
    """What was removed between the decoder layers that filled a cache, None if nothing."""
    return getattr(cache, _CUTS, None)


def mark_cuts(cache: Any, cuts: HeldCuts) -> None:
    """Remember on a cache what its layers hold."""
    setattr(cache, _CUTS, cuts)


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
