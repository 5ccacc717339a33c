"""The setting of a method at which decoder layers run a given number, or share, of the visual tokens."""

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
MANY = 10_000  # visual tokens of a picture, of which shares are taken


def budgeted(method: M, tokens: float, total: int, layers: int, at: Literal["mean", "last"]) -> M:
    """What ``Method.at_budget`` returns: found by bisection, since more of a budget means more tokens in every layer."""
    _check_known(method, total, layers)
    if float(tokens).is_integer():
        direct = _near(lambda: method.with_budget(int(tokens)), tokens, 0.5, total, layers, at)
        if direct is not None:
            return direct
    found = _bisected(method, tokens, total, layers, at)
    reached = _count(found, total, layers, at)
    if not abs(reached - tokens) <= max(1.0, 0.01 * total):  # also of what is no number
        raise InputError(
            f"{method.name}: {tokens:g} of {total} visual tokens {_where(layers, at)} cannot be had; the nearest it can do is "
            f"{reached:g}."
        )
    # a count reads better than a share, where it means the same
    return _near(lambda: method.with_budget(resolve_budget(found.budget, total)), reached, 0.0, total, layers, at) or found


def shared(method: M, share: float, layers: int, at: Literal["mean", "last"]) -> M:
    """What ``Method.at_share`` returns."""
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
        raise InputError(
            f"{method.name}: share={share!r}; expected a share of the visual tokens, above 0 and up to 1, such as 0.25"
        )
    if share == 1:
        return method.with_budget(1.0)
    _check_known(method, MANY, layers)
    goal = share * MANY
    direct = _near(lambda: method.with_budget(share), goal, 0.005 * MANY, MANY, layers, at)
    if direct is not None:
        return direct
    found = _bisected(method, goal, MANY, layers, at)
    reached = _count(found, MANY, layers, at) / MANY
    if not abs(reached - share) <= 0.01:
        raise InputError(
            f"{method.name}: {share:.0%} of the visual tokens {_where(layers, at)} cannot be had; the nearest it can do is "
            f"{reached:.0%}."
        )
    return found


def _count(method: Method, total: int, layers: int, at: Literal["mean", "last"]) -> float:
    each = method.layer_tokens(total, layers) or [total]
    return fmean(each) if at == "mean" else each[-1]


def _near(make: Callable[[], M], goal: float, off: float, total: int, layers: int, at: Literal["mean", "last"]) -> M | None:
    """A setting, where the method can have it and it gives about ``goal`` tokens."""
    found = _tried(make)
    reached = None if found is None else _tried(lambda: _count(found, total, layers, at))
    return found if reached is not None and abs(reached - goal) <= off else None


def _check_known(method: Method, total: int, layers: int) -> None:
    if _tried(lambda: (method.with_share(0.5).layer_tokens(total, layers),)) == (None,):
        raise InputError(f"{method.name}: its rule looks at the picture, so that no budget gives a known number of tokens.")


def _bisected(method: M, tokens: float, total: int, layers: int, at: Literal["mean", "last"]) -> M:
    """The setting by a share that comes nearest to ``tokens``."""
    low, high = 0.0, 1.0
    for _ in range(STEPS):
        middle = (low + high) / 2
        reached = _tried(lambda share=middle: _count(method.with_share(share), total, layers, at))  # type: ignore[misc]
        low, high = (middle, high) if reached is None or reached < tokens - 1e-9 else (low, middle)
    found, below = method.with_share(high), _near(lambda: method.with_share(low), tokens, total, total, layers, at)
    nearer = below is not None and abs(_count(below, total, layers, at) - tokens) < abs(_count(found, total, layers, at) - tokens)
    return below if below is not None and nearer else found


def _where(layers: int, at: Literal["mean", "last"]) -> str:
    return f"on average over {layers} decoder layers" if at == "mean" else f"in the last of {layers} decoder layers"


def _tried(make: Callable[[], T]) -> T | None:
    """What was made, or None where the method cannot have the setting."""
    try:
        return make()
    except InputError:
        return None
