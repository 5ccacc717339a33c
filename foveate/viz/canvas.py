"""What all pictures are drawn on."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from ..errors import MissingExtraError
from ..places import write_bytes


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


def plain(text: str) -> str:
    """A name as matplotlib is to show it: no ``$`` begins a formula, and no label is left out for its underscore."""
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")


def write_figure(figure: Any, path: str | Path, dpi: int) -> None:
    """Write a figure to its file, whose ending says in which format. Where that fails, what was there before stays.

    Raises
    ------
    FoveateError : it cannot be written, for example because the disk is full.
    """
    data = io.BytesIO()
    figure.savefig(data, format=Path(path).suffix[1:] or "png", dpi=dpi)
    write_bytes(path, data.getvalue())
