"""Pages of HTML that need no network: their skeleton, and what stands in them as texts, tables and pictures."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from typing import Any

from PIL import Image

from ..notebook import data_url

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem; color: #1c1c1c; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.result { font-size: 1.15rem; background: #eef5ee; border-left: 4px solid #3a7d44; padding: .8rem 1rem; }
.kept { background: #fbf3e4; border-left-color: #b7791f; }
table { border-collapse: collapse; width: 100%; font-size: .85rem; } .wide { overflow-x: auto; }
td, th { padding: .25rem .6rem; border-bottom: 1px solid #ddd; text-align: right; vertical-align: top; }
td:first-child, th:first-child, .left { text-align: left; } caption { text-align: left; font-weight: 600; padding: .4rem 0; }
tr.chosen { background: #eef5ee; font-weight: 600; } img { max-width: 100%; } .dim { color: #666; font-size: .9rem; }
.examples { display: grid; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); gap: 1.2rem; }
.examples p { margin: .2rem 0; } pre { white-space: pre-wrap; background: #f4f4f4; padding: .6rem; font-size: .85rem; }
"""


def page(title: str, parts: Sequence[str]) -> str:
    """A whole page: the title as its heading, and parts of HTML below it."""
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{text(title)}</title>'
    body = "\n".join([f"<h1>{text(title)}</h1>", *parts])
    return f'<!doctype html>\n<html lang="en"><head>{head}<style>{STYLE}</style></head><body>\n{body}\n</body></html>\n'


def text(value: Any) -> str:
    """Any value as text of a page."""
    return html.escape(str(value))


def paragraph(value: Any, kind: str = "") -> str:
    """A paragraph of plain text; ``kind`` is a class of the style, such as "dim" or "result"."""
    return f'<p class="{kind}">{text(value)}</p>' if kind else f"<p>{text(value)}</p>"


def table(
    heads: Sequence[str], rows: Sequence[Sequence[Any]], *, left: Sequence[int] = (), chosen: int | None = None, title: str = ""
) -> str:
    """A table that scrolls sideways where it is too wide.

    Parameters
    ----------
    heads, rows : texts.
    left : numbers of the columns that are set to the left, beside the first.
    chosen : the row that stands out.
    title : above it.
    """
    sides = [' class="left"' if number in left else "" for number in range(len(heads))]
    lines = [f"<caption>{text(title)}</caption>"] if title else []
    lines.append("<tr>" + "".join(f"<th{side}>{text(head)}</th>" for side, head in zip(sides, heads, strict=True)) + "</tr>")
    for number, row in enumerate(rows):
        cells = "".join(f"<td{side}>{text(cell)}</td>" for side, cell in zip(sides, row, strict=True))
        lines.append(("<tr class='chosen'>" if number == chosen else "<tr>") + f"{cells}</tr>")
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


def picture(image: Image.Image, alt: str, kind: str = "JPEG") -> str:
    """A picture inside the page."""
    return f'<img alt="{text(alt)}" src="{data_url(image.convert("RGB"), kind)}">'


def figure(drawn: Any, alt: str, dpi: int = 130) -> str:
    """A figure of matplotlib inside the page."""
    data = io.BytesIO()
    drawn.savefig(data, format="png", dpi=dpi)
    return f'<img alt="{text(alt)}" src="data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}">'
