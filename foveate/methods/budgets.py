"""The setting of a method at which decoder layers run a given number of visual tokens."""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean
from typing import TYPE_CHECKING, Literal, TypeVar

from ..errors import InputError
from ..tokens import resolve_budget

if TYPE_CHECKING:
    from .base import Method

M = TypeVar("M", bound="Method")
T = TypeVar("T")
STEPS = 50  # of the bisection


def budgeted(method: M, tokens: float, total: int, layers: int, at: Literal["mean", "last"]) -> M:
    """What ``Method.at_budget`` returns: found by bisection, since more of a budget means more tokens in every layer."""

    def count(setting: M) -> float:
        each = setting.layer_tokens(total, layers) or [total]
        return fmean(each) if at == "mean" else each[-1]

    def near(make: Callable[[], M], goal: float, off: float) -> M | None:
        """A setting, where the method can have it and it gives about ``goal`` tokens."""
        found = _tried(make)
        reached = None if found is None else _tried(lambda: count(found))
        return found if reached is not None and abs(reached - goal) <= off else None

    if _tried(lambda: (method.with_share(0.5).layer_tokens(total, layers),)) == (None,):
        raise InputError(f"{method.name}: its rule looks at the picture, so that no budget gives a known number of tokens.")
    whole = float(tokens).is_integer()
    direct = near(lambda: method.with_budget(int(tokens)), tokens, 0.5) if whole else None
    if direct is not None:
        return direct
    low, high = 0.0, 1.0
    for _ in range(STEPS):
        middle = (low + high) / 2
        reached = _tried(lambda share=middle: count(method.with_share(share)))  # type: ignore[misc]
        low, high = (middle, high) if reached is None or reached < tokens - 1e-9 else (low, middle)
    found, below = method.with_share(high), near(lambda: method.with_share(low), tokens, total)
    if below is not None and abs(count(below) - tokens) < abs(count(found) - tokens):
        found = below
    reached = count(found)
    if abs(reached - tokens) > max(1.0, 0.01 * total):
        where = f"on average over {layers} decoder layers" if at == "mean" else f"in the last of {layers} decoder layers"
        raise InputError(
            f"{method.name}: {tokens:g} of {total} visual tokens {where} cannot be had; the nearest it can do is {reached:g}."
        )
    # a count reads better than a share, where it means the same
    return near(lambda: method.with_budget(resolve_budget(found.budget, total)), reached, 0.0) or found


def _tried(make: Callable[[], T]) -> T | None:
    """What was made, or None where the method cannot have the setting."""
    try:
        return make()
    except InputError:
        return None
