"""``foveate models``: which models are supported, and what works on each."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

EPILOG = "Example:  foveate models"


def models_command(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else on stdout.")] = False,
) -> None:
    """The table of models: what works on each family, and why others are refused."""
    from ..api import models
    from ..engine.families import REFUSED

    found = models()
    if as_json:
        print(json.dumps({"supported": [vars(info) for info in found], "refused": REFUSED}))
        return
    out = Console(highlight=False)
    table = Table(show_lines=True)
    for column in ("family", "images", "videos", "merging", "in the encoder", "[CLS]", "positions"):
        table.add_column(column)
    table.add_column("test, and what is different")

    def mark(works: bool) -> str:
        return "[green]yes[/green]" if works else "[dim]no[/dim]"

    for info in found:
        marks = (mark(info.images), mark(info.videos), info.merging, mark(info.in_encoder), mark(info.reads_cls), info.positions)
        about = "\n".join(part for part in (info.test, info.notes) if part)
        table.add_row(escape(f"{info.name}\n{info.example}"), *marks, escape(about))
    out.print(table)
    out.print(
        "Methods that act before the projector or inside the decoder work on all of them. Models that are refused:", style="dim"
    )
    for kind, reason in REFUSED.items():
        out.print(escape(f"  {kind}: {reason}"), style="dim")
