"""Which visual tokens of a video stayed: its frames in a strip."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from ..report import ImageReport
from ..tokens import ELSEWHERE
from .canvas import new_figure, write_figure
from .overlay import LEGEND, PALE, as_seen, overlay, panels_of

COLUMNS = 8  # frames side by side, at most
SIDE = 480  # pixels of the longer side of a frame before it is scaled into the picture
FRAME, GAP, CAPTION, LABEL, TITLE, NARROWEST = 2.0, 0.08, 0.42, 0.3, 0.35, 5.0  # inches
LETTERS = 10  # of a title, on an inch

Panel = tuple[Image.Image, str]  # a frame, and what stands below it


def frames_as_seen(inputs: Mapping[str, Any], processor: Any, frames: Sequence[Image.Image]) -> list[Image.Image]:
    """The frames as the encoder saw them, from what the processor made of them.

    Parameters
    ----------
    inputs : with ``pixel_values_videos`` or ``pixel_values``.
    processor : of the model.
    frames : as they were given to it; they come back where the processor makes patches or several tiles of each.
    """
    pixels = _pictures(inputs)
    return [as_seen(one, processor) for one in pixels] if len(pixels) == len(frames) else list(frames)


def first_as_seen(inputs: Mapping[str, Any], processor: Any, picture: Image.Image) -> Image.Image:
    """A picture, or the first tile of it, as the encoder saw it; as it was given where the processor makes patches of it."""
    pixels = _pictures(inputs)
    return as_seen(pixels[0], processor) if len(pixels) else picture


def _pictures(inputs: Mapping[str, Any]) -> Sequence[Tensor]:
    """[3, H, W] of each picture, tile or frame; none where a processor makes patches of them."""
    pixels = inputs["pixel_values_videos" if "pixel_values_videos" in inputs else "pixel_values"]
    return list(pixels.flatten(0, -4)) if pixels.ndim > 3 else []


def by_frame(values: Sequence[Any], frames: int) -> list[list[Any]]:
    """Reports of grids, put together by the frame they show: encoders make one or more grids of a frame, or one of several frames.

    >>> by_frame("abcdef", 3)
    [['a', 'b'], ['c', 'd'], ['e', 'f']]
    >>> by_frame("ab", 4)
    [['a'], ['b']]
    """
    size = max(1, len(values) // frames)
    return [list(values[start : start + size]) for start in range(0, len(values), size)]


def save_strip(
    frames: Sequence[Image.Image],
    seconds: Sequence[float],
    reports: Mapping[str, Sequence[ImageReport]],
    path: str | Path,
    title: str = "",
) -> None:
    """A strip of the frames, and one below it for each stage of each method with what it kept; long ones go on in a further row.

    Where an encoder makes one grid of several frames, the first of them is shown; where it cuts frames into tiles, only counts are.

    Parameters
    ----------
    frames : as the encoder saw them (``frames_as_seen``).
    seconds : when each is shown.
    reports : of the grids of all frames in order, by the name of the method.
    path : of the picture.
    title : over all strips.

    Raises
    ------
    MissingExtraError : matplotlib is not installed.
    """
    shown: dict[str, list[Panel]] = {"the frames": [(f, f"{s:.2f} s") for f, s in zip(frames, seconds, strict=True)]}
    for name, each in reports.items():
        shown |= strips(name, each, frames, seconds)
    lines = -(-len(frames) // COLUMNS)
    columns = -(-len(frames) // lines)  # as many in each line, nearly
    side = FRAME * max(image.height / image.width for panels in shown.values() for image, _ in panels)
    heights = [LABEL + -(-len(panels) // columns) * (side + CAPTION) for panels in shown.values()]
    width, height = max(columns * (FRAME + GAP) + GAP, NARROWEST), TITLE + sum(heights) + LABEL
    figure = new_figure(figsize=(width, height))
    title = textwrap.shorten(title, int(LETTERS * width), placeholder=" ...")
    figure.text(GAP / width, 1 - GAP / height, title, fontsize=12, va="top", parse_math=False)
    over = any(ELSEWHERE in report.source for each in reports.values() for report in each)
    legend = LEGEND.replace("\n", " ") + f"; {PALE}" * over
    figure.text(GAP / width, GAP / height, legend, fontsize=8, color="0.35")
    top = TITLE
    for (label, panels), high in zip(shown.items(), heights, strict=True):
        figure.text(GAP / width, 1 - (top + LABEL - GAP) / height, label, fontsize=10, va="bottom", parse_math=False)
        for number, (image, below) in enumerate(panels):
            left = GAP + number % columns * (FRAME + GAP)
            bottom = top + LABEL + number // columns * (side + CAPTION) + side
            axis = figure.add_axes((left / width, 1 - bottom / height, FRAME / width, side / height), anchor="S")
            axis.imshow(image)
            axis.set_axis_off()
            middle = (left + FRAME / 2) / width
            figure.text(middle, 1 - (bottom + GAP / 2) / height, below, fontsize=8, ha="center", va="top", parse_math=False)
        top += high
    write_figure(figure, path, 150)


def strips(
    name: str, reports: Sequence[ImageReport], frames: Sequence[Image.Image], seconds: Sequence[float]
) -> dict[str, list[Panel]]:
    """What to show of a method by the title of its strip: what entered the decoder, and what each cut inside it left."""
    grids = by_frame(reports, len(frames))
    per_grid = -(-len(frames) // len(grids))
    views = [[{key.rpartition(":")[0]: view for key, view in panels_of(name, r).items()} for r in group] for group in grids]
    found: dict[str, list[Panel]] = {}
    for label in dict.fromkeys(key for group in views for each in group for key in each):
        panels, left = [], 0
        for number, (group, shown) in enumerate(zip(grids, views, strict=True)):
            first = number * per_grid
            last = min(first + per_grid, len(frames)) - 1
            kept = [view.get(label, report) for view, report in zip(shown, group, strict=True)]
            count, before = sum(view.after for view in kept), sum(report.before for report in group)
            time = f"{seconds[first]:.2f} s" if first == last else f"{seconds[first]:.2f} - {seconds[last]:.2f} s"
            image = frames[first] if len(group) > 1 else overlay(frames[first], kept[0], SIDE)
            panels.append((image, f"{time}\n{count} of {before}"))
            left += count
        found[f"{label}: {left} of {sum(report.before for report in reports)} tokens"] = panels
    return found
