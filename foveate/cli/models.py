"""``foveate models``: which models are supported, and what works on each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from .common import out, starting
from .document import JsonFile, ready_json, tell

if TYPE_CHECKING:
    from ..api import ModelInfo

EPILOG = "Example:  foveate models"


def models_command(
    json_file: JsonFile = None,
) -> None:
    """The table of models: what works on each family, and why others are refused."""
    ready_json(json_file)
    with starting():
        from ..api import models
        from ..families import REFUSED

        found = models()
    document = {"supported": [vars(info) for info in found], "refused": REFUSED}
    tell(document, json_file, lambda: show(found, REFUSED))


def show(found: list[ModelInfo], refused: dict[str, str]) -> None:
    """Print the table."""
    table = Table()
    for column in ("config.model_type", "images", "videos", "merge", "encoder", "[CLS]", "positions"):
        table.add_column(escape(column), no_wrap=True)

    def mark(works: bool) -> str:
        return "[green]yes[/green]" if works else "[dim]no[/dim]"

    for info in found:
        place = "before" if info.merging.startswith("before") else "after"
        marks = (mark(info.images), mark(info.videos), place, mark(info.in_encoder), mark(info.reads_cls))
        table.add_row(info.model_type, *marks, escape(info.positions))
    out.print(table)
    out.print(
        "Methods before the projector work on every family, those inside the decoder on all whose layers keep keys and values; "
        "merge: before the projector, or after it. "
        "encoder: tome, ats, evit and crossget work, too. Without a [CLS] token, methods use the substitute that the report names. "
        "What proves a family: pytest tests/engine/model/test_families.py -k MODEL_TYPE",
        style="dim",
        markup=False,
    )
    for info in found:
        if info.notes:
            out.print(escape(f"  {info.name}: {info.notes}"), style="dim")
    out.print("Refused, and why:", style="dim")
    for kind, reason in refused.items():
        out.print(escape(f"  {kind}: {reason}"), style="dim")
