"""The bar of studies: on stderr, in a terminal only, and gone in the end."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import track

T = TypeVar("T")


def bar(jobs: Sequence[T], what: str) -> Iterable[T]:
    """Jobs one after another, with a bar.

    Parameters
    ----------
    what : is done with them.
    """
    console = Console(stderr=True)
    return track(jobs, what, console=console, transient=True) if console.is_terminal else jobs
