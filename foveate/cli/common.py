"""What the commands share: where they print, and how they read budgets and lists."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rich.console import Console

if TYPE_CHECKING:
    from ..methods.base import Method

out, err = Console(highlight=False), Console(stderr=True, highlight=False)
POCKET = "pocket"  # the model where none is named
WIDTH = 150  # of tables that go to a file or a pipe


def parse_budget(text: str) -> int | float:
    """A whole number is a count, anything with a point a fraction.

    Raises
    ------
    InputError : the text is no number.
    """
    from ..errors import InputError

    try:
        return int(text) if text.lstrip("+-").isdigit() else float(text)
    except ValueError as error:
        raise InputError(f"budget {text!r} is not a number. Use a count such as 144 or a fraction such as 0.25.") from error


def method_of(name: str, budget: str | None) -> Method:
    """A method as the command line names it.

    Raises
    ------
    InputError : there is no such method, or it cannot have the budget.
    """
    from ..methods.registry import get

    return get(name, **({} if budget is None else {"budget": parse_budget(budget)}))


def parts_of(text: str, option: str, example: str) -> tuple[str, ...]:
    """The entries of a list that is separated by commas, each once.

    Raises
    ------
    InputError : one is empty.
    """
    from ..errors import InputError

    found = tuple(part.strip() for part in text.split(","))
    if not all(found):
        raise InputError(f"--{option} {text!r} has an empty entry. Give names separated by commas, such as {example}.")
    return tuple(dict.fromkeys(found))


def wide(console: Console, width: int = WIDTH) -> Console:
    """A console that is wide enough for tables where nobody's terminal says how wide it is."""
    if console.is_terminal or console.width >= width:
        return console
    return Console(file=console.file, width=width, highlight=False)


def sayer(console: Console) -> Callable[..., None]:
    """Prints a line as it is, without markup and line breaks."""

    def say(line: str, style: str = "", **options: Any) -> None:
        console.print(line, style=style, markup=False, soft_wrap=True, **options)

    return say
