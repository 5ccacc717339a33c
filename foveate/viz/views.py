"""Ways of looking at what a method kept of one picture: merged sources, kept tokens alone, scores as heat, and their order."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from ..report import ImageReport
from .overlay import overlay

HEAT = ((0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164))  # from the lowest score to the highest
VEIL = 0.3  # share of the picture that is seen through the heat
SMALLEST = 11  # pixels of a cell that a number fits into
NO_SCORES = "this method has no scores; what it kept is shown"


def merged(picture: Image.Image, report: ImageReport, side: int = 480) -> Image.Image:
    """Kept tokens with an edge, and those merged into them in their colour."""
    return overlay(picture, report, side)


def kept(picture: Image.Image, report: ImageReport, side: int = 480) -> Image.Image:
    """Kept tokens clear; all others dark, also those that were merged."""
    source = [-1] * len(report.source)
    for number, cell in enumerate(report.kept):
        source[cell] = number
    return overlay(picture, replace(report, source=source), side)


def heat(picture: Image.Image, report: ImageReport, side: int = 480) -> Image.Image:
    """Scores from dark (lowest) to bright (highest), by their logarithm, over the grey picture; kept tokens have a white edge."""
    scores = report.scores
    if scores is None:
        return kept(picture, report, side)
    colors = heat_colors(np.array(scores, np.float64))
    rows, columns = report.grid
    cell = max(6, side // max(rows, columns))
    size = (columns * cell, rows * cell)
    grey = np.asarray(picture.convert("L").resize(size, Image.Resampling.LANCZOS), np.float32)[..., None]
    colored = np.repeat(np.repeat(colors.reshape(rows, columns, 3), cell, 0), cell, 1)
    image = Image.fromarray((VEIL * grey + (1 - VEIL) * colored).clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for place in report.kept:
        y, x = (cell * number for number in divmod(place, columns))
        draw.rectangle((x, y, x + cell - 1, y + cell - 1), outline=(255, 255, 255))
    return image


def heat_colors(scores: NDArray[np.float64]) -> NDArray[np.float32]:
    """[N] scores, NaN where there is none -> [N, 3] colours from 0 to 255; the lowest possible one for NaN."""
    known = np.isfinite(scores)
    if not known.any():
        return np.broadcast_to(np.array(HEAT[0], np.float32), (len(scores), 3)).copy()
    positive = scores[known & (scores > 0)]
    floor = max(positive.min(), positive.max() * 1e-4) if len(positive) else 0.0
    values = np.log(np.maximum(scores, floor)) if len(positive) and scores[known].min() >= 0 else scores
    low, high = values[known].min(), values[known].max()
    place = np.where(known, (values - low) / max(high - low, 1e-12), 0.0)
    stops = np.linspace(0, 1, len(HEAT))
    return np.stack([np.interp(place, stops, [stop[channel] for stop in HEAT]) for channel in range(3)], -1).astype(np.float32)


def ranks(report: ImageReport) -> list[int]:
    """For each kept token its place, from 1 on: by score where there are scores, otherwise as the model reads them."""
    scores = report.scores
    if scores is None:
        return list(range(1, len(report.kept) + 1))
    values = [-math.inf if math.isnan(scores[cell]) else scores[cell] for cell in report.kept]
    order = sorted(range(len(values)), key=lambda number: -values[number])
    found = [0] * len(values)
    for place, number in enumerate(order, 1):
        found[number] = place
    return found


def order(picture: Image.Image, report: ImageReport, side: int = 480) -> Image.Image:
    """Kept tokens in a colour and with a number by their rank (``ranks``), bright is first; all others dark."""
    places = ranks(report)
    most = max(places, default=1)
    scores = [math.nan] * len(report.source)
    for cell, place in zip(report.kept, places, strict=True):
        scores[cell] = float(most - place)
    colors = heat_colors(np.array(scores) - 1e9)  # negative: a linear scale
    image = kept(picture, report, side)
    rows, columns = report.grid
    size = max(6, side // max(rows, columns))
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(0.45 * size)
    for cell, place in zip(report.kept, places, strict=True):
        y, x = (size * number for number in divmod(cell, columns))
        fill = (int(colors[cell, 0]), int(colors[cell, 1]), int(colors[cell, 2]))
        draw.rectangle((x, y, x + size - 1, y + size - 1), fill=fill)
        if size >= SMALLEST:
            ink = (0, 0, 0) if sum(fill) > 330 else (255, 255, 255)
            draw.text((x + size / 2, y + size / 2), str(place), fill=ink, font=font, anchor="mm")
    return image


VIEWS: dict[str, Callable[[Image.Image, ImageReport, int], Image.Image]] = {
    "merged sources": merged,
    "kept only": kept,
    "scores as heat": heat,
    "order": order,
}
MEANINGS = {
    "merged sources": "coloured edge: kept; tint: merged into the kept token of that colour; pale: merged into another frame; "
    "dark: dropped",
    "kept only": "coloured edge: kept; dark: dropped or merged into others",
    "scores as heat": "bright: high score; white edge: kept",
    "order": "1 is the highest score, or the first token that the model reads where a method has no scores; dark: dropped",
}
