"""``foveate figure``: figures of the PruMerge paper, drawn with the pocket model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import err, sayer, starting
from .document import JsonFile, ready_json, telling

EPILOG = "Examples:  foveate figure 3a --out attention.png  |  foveate figure 4"


def figure_command(
    number: Annotated[str, typer.Argument(help="1, 3a, 3b, 4 or 5.")],
    out_file: Annotated[Path | None, typer.Option("--out", help="The picture. Default: figure-NUMBER.png.")] = None,
    json_file: JsonFile = None,
) -> None:
    """A figure of the LLaVA-PruMerge paper on scenes of the pocket world."""
    from ..errors import InputError

    with starting():
        from ..lab.paper_figures import TITLES, paper_figure
        from ..viz.canvas import write_figure
        from ..viz.overlay import picture_file

    if number not in TITLES:
        raise InputError(f"there is no figure {number!r} here. Choose one of {', '.join(TITLES)}.")
    place = picture_file(out_file or Path(f"figure-{number}.png"))
    ready_json(json_file, place)
    with err.status(f"drawing figure {number}"):
        drawn, numbers = paper_figure(number)
    with telling(numbers, json_file, lambda: None) as keep:  # the numbers are told, also where the picture cannot be written
        if keep(write_figure, drawn, place, 130):
            sayer(err)(f"picture: {place}")
