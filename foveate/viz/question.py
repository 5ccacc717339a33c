"""One question as one picture: the answers, what each method kept, its scores as heat, and how to read all this."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from ..report import ImageReport
from ..tokens import ELSEWHERE
from .canvas import new_figure, write_figure
from .frames import COLUMNS, by_frame
from .overlay import panels_of
from .views import heat, merged

SIDE = 480  # pixels of the longer side of a panel
WIDE, FRAME = 3.3, 1.7  # inches of a panel of a picture, and of a frame
SAME, OTHER, PLAIN = "#2f8f46", "#c05621", "#1c1c1c"
HOW_TO_READ = (
    "Kept tokens have a coloured edge. Tinted ones were merged into the kept token of that colour. Dark ones were dropped.",
    "Pale ones were merged into a token of another frame.",
    "Heat: the scores that a method chose by, from dark (low) to bright (high); a white edge marks what it kept.",
    "A green answer is the same as with all tokens, an orange one is another.",
)


@dataclass(frozen=True)
class Way:
    """One way of answering.

    Attributes
    ----------
    name : such as "all tokens".
    answer : what the model said.
    counts : visual tokens in words, such as "144 of 576 tokens".
    images : what was kept of the picture, or of each frame; None = everything.
    """

    name: str
    answer: str
    counts: str
    images: Sequence[ImageReport] | None


def save_question(question: str, frames: Sequence[Image.Image], seconds: Sequence[float], ways: Sequence[Way], path: Path) -> None:
    """Draw a question and its answers.

    Parameters
    ----------
    question : the title.
    frames : the picture, or the frames of a clip, as the encoder saw them.
    seconds : when each frame is shown; empty for a picture.
    ways : all tokens first.
    path : of the picture.

    Raises
    ------
    MissingExtraError : matplotlib is not installed.
    """
    rows = _clip_rows(frames, seconds, ways) if seconds else _picture_rows(frames[0], ways)
    columns = max(len(row.panels) for row in rows)
    size = FRAME if seconds else WIDE
    high = max(panel.image.height / panel.image.width for row in rows for panel in row.panels if panel)
    width = max(columns * size + 0.3, 6.0)
    heights = [size * high + (0.62 if row.title else 0.35) for row in rows]
    figure = new_figure(figsize=(width, sum(heights) + 1.5), layout="constrained")
    figure.suptitle(textwrap.fill(question, max(30, int(9 * width))), fontsize=15, fontweight="bold", parse_math=False)
    for part, row in zip(figure.subfigures(len(rows), 1, squeeze=False, height_ratios=heights)[:, 0], rows, strict=True):
        if row.title:
            part.suptitle(row.title, fontsize=11, color=row.color, x=0.01, ha="left", parse_math=False)
        axes = part.subplots(1, columns, squeeze=False)[0]
        for axis in axes:
            axis.set_axis_off()
        for axis, panel in zip(axes, row.panels, strict=False):
            if panel is not None:
                axis.imshow(panel.image)
                axis.set_title(panel.words, fontsize=8 if seconds else 10, color=panel.color, parse_math=False)
    unseen = [] if any(row.heat for row in rows) else ["Heat"]
    unseen += [] if any(ELSEWHERE in image.source for way in ways for image in way.images or ()) else ["Pale"]
    lines = [line for line in HOW_TO_READ if not line.startswith(tuple(unseen))]
    folded = "\n".join(textwrap.fill(line, max(60, int(13.5 * width))) for line in lines)
    figure.supxlabel(folded, fontsize=8.5, color="0.3", x=0.01, ha="left")
    write_figure(figure, path, 120)


@dataclass(frozen=True)
class _Panel:
    """A picture, and what stands above it."""

    image: Image.Image
    words: str
    color: str = PLAIN


@dataclass(frozen=True)
class _Row:
    """Panels side by side; None is an empty place."""

    title: str
    color: str
    panels: list[_Panel | None]
    heat: bool = False


def _color(way: Way, ways: Sequence[Way]) -> str:
    return PLAIN if way is ways[0] else SAME if way.answer == ways[0].answer else OTHER


def _picture_rows(picture: Image.Image, ways: Sequence[Way]) -> list[_Row]:
    """What was kept in one row, and the heat below it."""
    kept: list[_Panel | None] = []
    hot: list[_Panel | None] = []
    for way in ways:
        words = f"{way.name}: {textwrap.shorten(way.answer, 34, placeholder=' ...')}\n{way.counts}"
        color = _color(way, ways)
        if way.images is None:
            kept.append(_Panel(_sized(picture), words, color))
            hot.append(None)
            continue
        for number, (label, image) in enumerate(panels_of("", way.images[0]).items()):
            inside = f", {label.removeprefix(', ').partition(':')[0]}" if "layer" in label else ""
            kept.append(_Panel(merged(picture, image, SIDE), f"{way.name}{inside}" if number else words, color))
            scored = image.scores is not None
            hot.append(_Panel(heat(picture, image, SIDE), f"scores of {way.name}{inside}") if scored else None)
    return [_Row("", PLAIN, kept), *([_Row("", PLAIN, hot, heat=True)] if any(hot) else [])]


def _clip_rows(frames: Sequence[Image.Image], seconds: Sequence[float], ways: Sequence[Way]) -> list[_Row]:
    """A strip for each way, and a second one with its heat."""
    rows: list[_Row] = []
    for way in ways:
        grids = by_frame(way.images, len(frames)) if way.images else [[] for _ in frames]
        every = -(-len(frames) // len(grids))
        kept, hot = [], []
        for frame, second, group in zip(frames[::every], seconds[::every], grids, strict=False):
            left = [[*panels_of("", image).values()][-1] for image in group]
            count = f": {sum(image.after for image in left)} of {sum(image.before for image in group)}" if group else ""
            single = left[0] if len(left) == 1 else None  # of a frame in tiles, only counts are shown
            kept.append(_Panel(merged(frame, single, SIDE) if single else _sized(frame), f"{second:.2f} s{count}"))
            if single and single.scores is not None:
                hot.append(_Panel(heat(frame, single, SIDE), f"{second:.2f} s"))
        rows += _folded(_Row(f"{way.name}: {way.answer}   ({way.counts})", _color(way, ways), [*kept]))
        rows += _folded(_Row(f"scores of {way.name}", PLAIN, [*hot], heat=True))
    return rows


def _folded(row: _Row) -> list[_Row]:
    """A strip in rows of ``COLUMNS`` panels; none where it is empty."""
    parts = [row.panels[start : start + COLUMNS] for start in range(0, len(row.panels), COLUMNS)]
    return [replace(row, title="" if number else row.title, panels=part) for number, part in enumerate(parts)]


def _sized(image: Image.Image) -> Image.Image:
    scale = SIDE / max(image.size)
    return image.resize((max(1, round(scale * image.width)), max(1, round(scale * image.height))), Image.Resampling.NEAREST)
