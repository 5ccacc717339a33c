"""Checks of the fields of a method, by their type hints: wrong values are refused where the method is built."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import types
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

from ..errors import InputError, first_line

if TYPE_CHECKING:
    from .base import Method

_KINDS: dict[Any, tuple[str, tuple[type, ...]]] = {
    int: ("a whole number", (Integral,)),
    float: ("a number", (Real,)),
    bool: ("True or False", (bool,)),
}


def _unwrapped(hint: Any, value: Any) -> Any:
    """``X`` where a field is ``X | None`` and has a value; anything for None."""
    if get_origin(hint) in (Union, types.UnionType) and type(None) in get_args(hint):
        kinds = [kind for kind in get_args(hint) if kind is not type(None)]
        return Any if value is None or len(kinds) > 1 else kinds[0]
    return hint


def check_declared(cls: type[Method]) -> None:
    """Raise ``InputError`` where a class has fields of its own that no ``@dataclass`` made fields."""
    own = vars(cls)
    if "__dataclass_fields__" in own:
        return
    named = [name for name, hint in inspect.get_annotations(cls).items() if "ClassVar" not in str(hint)]
    named += [name for name in own if name in {field.name for field in dataclasses.fields(cls)} and name not in named]
    if named:
        raise InputError(
            f"{cls.__name__} has fields ({', '.join(named)}) and is no dataclass, so that they are not read. Write "
            "@dataclass(kw_only=True) above it."
        )


def raise_undeclared(method: Method, error: Exception, missing: dict[str, str]) -> None:
    """Raise ``InputError`` where a method failed that seems to read what it was not given, because it did not ask for it.

    Parameters
    ----------
    error : of the method.
    missing : what it was not given, and how it asks for that.
    """
    if not missing or not ("None" in str(error) or isinstance(error, KeyError)):
        return
    ways = "; ".join(f"{name}: {way}" for name, way in missing.items())
    where = f"{type(error).__name__}: {first_line(error)}"
    message = f"{method.name} failed ({where}). It was not given what it did not ask for; a method asks for {ways}."
    raise InputError(message) from error


def check_fields(method: Method) -> None:
    """Raise ``InputError`` where a field does not hold what its type hint says; sequences become tuples."""
    hints = get_type_hints(type(method))
    for field in dataclasses.fields(method):
        value = plain(getattr(method, field.name))
        setattr(method, field.name, value)
        hint = _unwrapped(hints[field.name], value)
        if get_origin(hint) is tuple and get_args(hint)[-1:] == (...,):
            check_tuple(method, field.name, value, get_args(hint)[0])
        if get_origin(hint) is Literal and value not in get_args(hint):
            raise InputError(f"{method.name}: {field.name}={value!r}; choose one of {', '.join(map(repr, get_args(hint)))}")
        kind, allowed = _KINDS.get(hint, ("", ()))
        if hint in _KINDS and (not isinstance(value, allowed) or isinstance(value, bool) != (hint is bool)):
            raise InputError(f"{method.name}: {field.name}={value!r}; expected {kind}")
        if hint is float and not math.isfinite(value):
            raise InputError(f"{method.name}: {field.name}={value!r}; expected a finite number")


def read_field(cls: type[Method], field: str, text: str) -> Any:
    """The value of a field as somebody writes it: ``0.25``, ``true``, ``none``, ``2,8`` for several, or a text.

    It is checked where the method is built. Fields that the method does not have are read, too; building it says that.
    """
    hint = get_type_hints(cls).get(field, Any)
    if text in get_args(_unwrapped(hint, text)):  # also where "none" is one of the words
        return text
    if text.strip().lower() in ("none", "null"):
        return None
    if _unwrapped(hint, text) is str or get_origin(hint) is Literal:
        return text
    if "," in text and "[" not in text:
        return [_literal(part) for part in text.split(",") if part.strip()]
    return _literal(text)


def _literal(text: str) -> Any:
    """A number, a truth value or a list as JSON writes them; any other text as it is."""
    text = text.strip()
    try:
        return json.loads(text.lower() if text.lower() in ("true", "false") else text)
    except (ValueError, RecursionError):
        return text


def check_tuple(method: Method, field: str, value: Any, element: Any) -> None:
    """Raise ``InputError`` unless a field holds several of ``element``; they become a tuple."""
    kind, allowed = _KINDS.get(element, ("", (object,)))
    if not isinstance(value, list | tuple) or any(not isinstance(each, allowed) or isinstance(each, bool) for each in value):
        raise InputError(f"{method.name}: {field}={value!r}; expected several of {kind or element}, such as (2, 8)")
    setattr(method, field, tuple(plain(each) for each in value))


def check_per_block(method: Method, field: str, least: int) -> tuple[int, ...]:
    """The numbers of a field that holds one for all blocks, or one for each; raise ``InputError`` if they are none."""
    value = getattr(method, field)
    check_tuple(method, field, (value,) if isinstance(value, Integral) else value, int)
    found: tuple[int, ...] = getattr(method, field)
    if any(number < least for number in found):
        raise InputError(f"{method.name}: {field}={found}; each must be at least {least}")
    if method.budget is not None and found:
        raise InputError(f"{method.name}: budget={method.budget} and {field}={found}; give one of them")
    return found


def for_each_block(method: Method, field: str, numbers: tuple[int, ...], blocks: list[int]) -> tuple[int, ...]:
    """One number for each of ``blocks``; raise ``InputError`` if there are others."""
    if len(numbers) not in (1, len(blocks)):
        raise InputError(f"{method.name}: {field} has {len(numbers)} numbers; expected one, or {len(blocks)}, one for each block")
    return numbers * len(blocks) if len(numbers) == 1 else numbers


def plain(value: Any) -> Any:
    """A number of NumPy's as Python's own, which can be written as JSON; anything else as it is."""
    if isinstance(value, int | float) or not isinstance(value, Real):
        return value
    return int(value) if isinstance(value, Integral) else float(value)
