"""What all pictures are drawn on."""

from __future__ import annotations

from typing import Any

from ..errors import MissingExtraError


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
