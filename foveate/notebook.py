"""Reports as notebooks show them: a table, and a small map of the kept tokens of each picture."""

from __future__ import annotations

import base64
import colorsys
import html
import io
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .tokens import ELSEWHERE

if TYPE_CHECKING:
    from .report import ImageReport, Report

SHOWN_ITEMS = 20  # pictures in a table, and maps below it
SIDE = 120  # pixels of the longer side of a map in the notebook
# grey of dropped tokens; brightness of merged ones beside the kept token that they went to, and of those that decoder layers drop
DROPPED, MERGED, LEFT = 40, 0.35, 0.65
PALE = 110  # grey of tokens that were merged into one of another frame
LEGEND = "bright: kept; dim: merged into the kept token of that colour; grey: dropped"
OVER = "; pale grey: merged into another frame"
LEAVING = "; half bright: dropped between decoder layers"


def token_color(number: int) -> NDArray[np.float32]:
    """A colour [3] from 0 to 255 for each kept token; neighbours in the output get colours far apart."""
    return np.array(colorsys.hsv_to_rgb(number * 0.618034 % 1, 0.75, 1.0), np.float32) * 255


def token_map(image: ImageReport) -> Image.Image:
    """One pixel for each token of a grid: kept ones bright, merged ones dim in the colour of their kept token (pale grey where
    that is in another frame), others grey.

    What enters the decoder and does not reach its last layer is half bright.
    """
    last = set(image.stages[-1].kept if image.stages else image.kept)
    pixels = np.full((image.grid[0] * image.grid[1], 3), DROPPED, np.float32)
    for cell, output in enumerate(image.source):
        if output >= 0:
            pixels[cell] = MERGED * token_color(output)
        elif output == ELSEWHERE:
            pixels[cell] = PALE
    for number, cell in enumerate(image.kept):
        pixels[cell] = (1 if cell in last else LEFT) * token_color(number)
    return Image.fromarray(pixels.reshape(*image.grid, 3).astype(np.uint8))


def data_url(image: Image.Image, kind: str = "PNG") -> str:
    """A picture as an address that holds all of it."""
    data = io.BytesIO()
    image.save(data, format=kind, quality=90, subsampling=0)  # the last two are of JPEG
    return f"data:image/{kind.lower()};base64,{base64.b64encode(data.getvalue()).decode()}"


def report_html(report: Report) -> str:
    """What each picture had and kept as a table, what the decoder layers ran, and maps of the kept tokens."""
    rows = [
        f"<tr><td>{number}</td><td>{item.modality}</td><td>{item.row}</td><td>{item.before}</td><td>{len(item.kept)}</td></tr>"
        for number, item in enumerate(report.items[:SHOWN_ITEMS])
    ]
    if len(report.items) > SHOWN_ITEMS:
        rows.append(f"<tr><td colspan=5>and {len(report.items) - SHOWN_ITEMS} more</td></tr>")
    head = "<tr><th></th><th>kind</th><th>row of the batch</th><th>visual tokens</th><th>kept</th></tr>"
    first, *others = (html.escape(line) for line in str(report).splitlines())
    told = "".join(f"<p>{line}</p>" for line in others)
    table = f"<table>{head}{''.join(rows)}</table>" if rows else ""
    return f"<p>{first}</p>{table}{_maps(report)}{told}"


def _maps(report: Report) -> str:
    images = report.images[:SHOWN_ITEMS]
    shown = [_map(image) for image in images]
    legend = LEGEND + OVER * any(ELSEWHERE in image.source for image in images) + LEAVING * any(image.stages for image in images)
    return f"<div>{''.join(shown)}</div><p><small>{legend}</small></p>" if shown else ""


def _map(image: ImageReport) -> str:
    rows, columns = image.grid
    width, height = (max(1, round(SIDE * side / max(rows, columns))) for side in (columns, rows))
    name = f"picture {image.item}" + (f", part {image.part}" if image.part else "")
    style = f"width:{width}px;height:{height}px;image-rendering:pixelated;margin:2px;display:inline-block"
    title = f"{name}: {image.after} of {image.before} tokens"
    title += f", {len(image.stages[-1].kept)} in the last layer" if image.stages else ""
    return f'<img alt="{title}" title="{title}" style="{style}" src="{data_url(token_map(image))}">'
