"""What foveate raises: each message says what was wrong, what was expected and what to do."""


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


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__
