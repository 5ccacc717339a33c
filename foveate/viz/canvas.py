"""What all pictures are drawn on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import MissingExtraError
from ..places import writing


def new_figure(**options: Any) -> Any:
    """A figure of matplotlib, which is only imported here.

    Raises
    ------
    MissingExtraError : matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("matplotlib", "viz") from error
    return Figure(**options)


def write_figure(figure: Any, path: str | Path, dpi: int) -> None:
    """Write a figure to its file.

    Raises
    ------
    FoveateError : it cannot be written, for example because the disk is full.
    """
    with writing(path):
        figure.savefig(path, dpi=dpi)
