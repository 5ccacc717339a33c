"""``foveate methods``: the table of methods."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from .common import Imports, err, out, sayer, starting
from .document import JsonFile, ready_json, tell

if TYPE_CHECKING:
    from ..methods.registry import MethodInfo

EPILOG = "Example:  foveate methods"
PLACES = {"inside the vision encoder": "encoder", "before the projector": "projector", "inside the decoder": "decoder"}


def methods_command(
    imports: Imports = None,
    json_file: JsonFile = None,
) -> None:
    """The table of methods."""
    ready_json(json_file)
    with starting():
        from ..methods.registry import methods

        found = methods()
    document = [vars(info) for info in found]
    tell(document, json_file, lambda: show(found))


def show(found: list[MethodInfo]) -> None:
    """Print the table."""
    table = Table(show_lines=True)
    for column in ("name", "where", "reads", "count"):
        table.add_column(column, no_wrap=True)
    table.add_column("what it does")
    for info in found:
        name = "\n".join([info.name, *([", ".join(info.presets)] if info.presets else [])])
        paper = info.paper.rpartition("/")[2]
        where = PLACES.get(info.stage, "both")
        reads = "\n".join(["[CLS]"] * info.reads_cls + ["question"] * info.reads_question)
        row = (name, where, reads, "adaptive" if info.adaptive else "budget", f"{info.summary} {paper}")
        table.add_row(*(escape(cell) for cell in row))
    out.print(table)
    out.print("second line of a name: its presets, as in prumerge:paper; last word: the paper's number at arxiv.org", style="dim")
    for info in found:
        if info.problem:
            sayer(err)(f"note: {info.name} cannot be built here ({info.problem})", "yellow")
