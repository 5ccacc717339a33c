"""What a command prints, as a page of HTML that needs no network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import err, sayer

if TYPE_CHECKING:
    from rich.table import Table

HtmlFile = Annotated[
    Path | None, typer.Option("--html", help="Write tables and picture as one page of HTML, which needs no network.")
]


def table_part(shown: Table) -> str:
    """A table of the terminal as one of a page, without its markup."""
    from rich.text import Text

    from ..viz.page import table

    def plain(cell: Any) -> str:
        return Text.from_markup(str(cell)).plain

    columns = [[plain(cell) for cell in column.cells] for column in shown.columns]
    left = [number for number, column in enumerate(shown.columns) if column.justify == "left"]
    heads = [plain(column.header) for column in shown.columns]
    return table(heads, [*zip(*columns, strict=True)], left=left, title=plain(shown.title or ""))


def lines_part(lines: Sequence[str]) -> list[str]:
    """Remarks below a table."""
    from ..viz.page import paragraph

    return [paragraph(line, "dim") for line in lines]


def picture_part(draw: Callable[[], Any], alt: str) -> str:
    """What ``draw`` makes with matplotlib, or why there is no picture."""
    from ..errors import MissingExtraError
    from ..viz.page import figure, paragraph

    try:
        return figure(draw(), alt)
    except MissingExtraError as error:
        return paragraph(f"No picture: {error}", "dim")


def write_html(file: Path, title: str, parts: Sequence[str], command: str) -> None:
    """Write a page, with the command that made it at its end.

    Raises
    ------
    FoveateError : it cannot be written.
    """
    from ..places import write_text
    from ..viz.page import page, text

    end = ["<h2>How this was made</h2>", f"<pre>{text(command)}</pre>"]
    write_text(file, page(title, [*parts, *end]))
    sayer(err)(f"page: {file}")
