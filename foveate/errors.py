"""What foveate raises: each message says what was wrong, what was expected and what to do."""

from __future__ import annotations

import reprlib

SHOWN = 80  # characters of what somebody gave that a message repeats
LINE = 500  # characters of what an error of another library says


class FoveateError(Exception):
    """Base of all errors that foveate raises on purpose."""


class InputError(FoveateError, ValueError):
    """A call or its data is wrong: bad budget, unknown method, placeholders and images that do not fit."""


class UnsupportedModelError(FoveateError, TypeError):
    """The model cannot be used, or lacks a part that the method needs."""


class CacheError(FoveateError, ValueError):
    """A key-value cache cannot be continued: it belongs to another method or has lost part of its prompt."""


class MissingExtraError(FoveateError, ImportError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed. Install it with: pip install 'foveate[{extra}]'")


_brief = reprlib.Repr()
_brief.maxstring = _brief.maxother = SHOWN


def shown(value: object) -> str:
    """A value that somebody gave, as a message repeats it: in quotes if it is a text, and short, also where it is large or deep."""
    return cut(_brief.repr(value))


def cut(text: str, most: int = SHOWN) -> str:
    """A text, or its beginning where it is longer than ``most``."""
    return text if len(text) <= most else f"{text[:most]}..."


def first_line(error: BaseException) -> str:
    """What an error says, in one line that is not too long."""
    return cut(next(iter(str(error).strip().splitlines()), ""), LINE) or type(error).__name__
