"""Which visual tokens stayed, drawn over the picture, beside the sorted scores and their fence."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from ..errors import InputError, MissingExtraError
from ..notebook import token_color
from ..places import ready_file, user_path
from ..report import ImageReport
from ..tokens import ELSEWHERE
from .canvas import new_figure, write_figure
from .charts import draw_layers, draw_scores

DIMMED = 0.28  # brightness of dropped patches
LEGEND = "coloured edge: kept; tint: merged into\nthe kept token of that colour; dark: dropped"
PALE = "pale: merged into another frame"
TINT = 0.25  # share of colour in patches that were merged into a kept one
FADED = 0.3  # share of white in patches that were merged into one of another frame


def as_seen(pixel_values: Tensor, processor: Any) -> Image.Image:
    """The picture as the encoder saw it, from one image [3, H, W] of ``pixel_values``: cropped and scaled, colours undone."""
    settings = processor.image_processor
    mean, std = (np.array(getattr(settings, name), np.float32)[:, None, None] for name in ("image_mean", "image_std"))
    pixels = pixel_values.float().cpu().numpy() * std + mean
    return Image.fromarray((pixels.clip(0, 1) * 255).round().astype(np.uint8).transpose(1, 2, 0))


def overlay(picture: Image.Image, report: ImageReport, side: int = 480) -> Image.Image:
    """Kept patches clear with a coloured edge, patches merged into one tinted in its colour, those merged into
    one of another frame pale, dropped patches dimmed.

    Parameters
    ----------
    picture : as the encoder saw it (``as_seen``).
    report : of this picture.
    side : about how many pixels the longer side of the result has.
    """
    rows, columns = report.grid
    cell = max(6, side // max(rows, columns))
    canvas = np.asarray(picture.convert("RGB").resize((columns * cell, rows * cell), Image.Resampling.LANCZOS), np.float32)
    canvas = canvas.reshape(rows, cell, columns, cell, 3).swapaxes(1, 2).reshape(rows * columns, cell, cell, 3).copy()
    at = {place: number for number, place in enumerate(report.kept)}
    for place, output in enumerate(report.source):
        patch = canvas[place]
        if place in at:
            edge = token_color(at[place])
            patch[0], patch[-1], patch[:, 0], patch[:, -1] = edge, edge, edge, edge
        elif output == ELSEWHERE:
            patch *= DIMMED
            patch += FADED * (255 - patch)
        elif output < 0:
            patch *= DIMMED
        else:
            patch *= DIMMED + 0.2
            patch += TINT * (token_color(output) - patch)
    image = canvas.reshape(rows, columns, cell, cell, 3).swapaxes(1, 2).reshape(rows * cell, columns * cell, 3)
    return Image.fromarray(image.clip(0, 255).astype(np.uint8))


def picture_file(path: str | Path) -> Path:
    """Where ``save_figure`` will write, checked before anything is computed; without an ending, it is a PNG.

    Raises
    ------
    InputError : the place cannot be written, or the ending is of no kind of picture.
    MissingExtraError : matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError as error:
        raise MissingExtraError("matplotlib", "viz") from error
    path = user_path(path)
    if path.exists() and not path.is_file():
        raise InputError(f"{path} is a folder or a device; give the name of a picture")
    path = path if path.suffix else path.with_suffix(".png")
    kinds = FigureCanvasAgg.get_supported_filetypes()
    if path.suffix[1:].lower() not in kinds:
        raise InputError(f"a picture cannot be saved as {path.suffix!r}; use one of {', '.join(sorted(kinds))}")
    return ready_file(path)


def panels_of(name: str, report: ImageReport) -> dict[str, ImageReport]:
    """What to show of a method, by the title of its panel: what entered the decoder, and what each cut inside it left."""
    shown = {f"{name}: {report.after} of {report.before} tokens": report}
    if report.stages and report.after == report.before:
        shown = {}
    for stage in report.stages:
        cells = [-1] * len(report.source)
        for number, cell in enumerate(stage.kept):
            cells[cell] = number
        seen = None if stage.scores is None else [stage.scores.get(cell, math.nan) for cell in range(len(cells))]
        left = replace(report, after=len(stage.kept), kept=stage.kept, source=cells, scores=seen, threshold=None)
        shown[f"{name}, decoder layer {stage.layer}: {len(stage.kept)}"] = left
    return shown


def save_figure(
    picture: Image.Image,
    reports: Mapping[str, ImageReport],
    path: str | Path,
    title: str = "",
    layers: Mapping[str, Sequence[int]] | None = None,
) -> None:
    """One panel with the picture, one for each stage of each method with what it kept, one with the sorted scores, and one with the
    visual tokens of each decoder layer where they differ.

    Parameters
    ----------
    picture : as the encoder saw it.
    reports : by the name of the method.
    path : of the picture.
    title : over all panels.
    layers : visual tokens of each decoder layer, by the name of the method.

    Raises
    ------
    MissingExtraError : matplotlib is not installed.
    """
    scored = [(name, report) for name, report in reports.items() if report.scores is not None]
    shown = {label: view for name, report in reports.items() for label, view in panels_of(name, report).items()}
    steps = any(len(set(counts)) > 1 for counts in (layers or {}).values())
    panels = 1 + len(shown) + bool(scored) + steps
    figure = new_figure(figsize=(3.6 * panels, 4.7), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    axes[0].imshow(picture.resize((480, 480 * picture.height // picture.width), Image.Resampling.NEAREST))
    axes[0].set_title("the picture")
    for axis, (label, view) in zip(axes[1:], shown.items(), strict=False):
        axis.imshow(overlay(picture, view))
        axis.set_title(label, fontsize=10, parse_math=False)
    for axis in axes[: 1 + len(shown)]:
        axis.set_xticks([])
        axis.set_yticks([])
        axis.set_frame_on(False)
    axes[0].set_xlabel(LEGEND, fontsize=8, color="0.35")
    if scored:
        draw_scores(axes[1 + len(shown)], scored)
    if steps and layers:
        draw_layers(axes[-1], layers)
    if title:
        figure.suptitle(title, parse_math=False)
    write_figure(figure, path, 110)
