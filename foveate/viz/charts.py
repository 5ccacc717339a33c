"""Charts beside a picture: sorted scores with their fence, and visual tokens by decoder layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..report import ImageReport
from .canvas import new_figure, plain

DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (2, 2)), (0, (1, 1)))
SIZE = (4.2, 3.0)  # inches of a chart alone
LEAST = 1e-7  # of scores on a logarithmic scale
COLORS = ("#1f5fbf", "#c0392b", "#27ae60", "#8e44ad", "#b7950b")  # of what methods keep
INKS = ("#9aa0a6", "#1f5fbf", "#c0392b", "#27ae60")  # of all tokens, and of up to three methods


def scores_figure(name: str, report: ImageReport) -> Any:
    """The sorted scores of one picture, which of them were kept, and the fence."""
    figure = new_figure(figsize=SIZE, layout="constrained")
    draw_scores(figure.subplots(), [(name, report)])
    return figure


def layers_figure(layers: Mapping[str, Sequence[int]]) -> Any:
    """Visual tokens by decoder layer, a line for each way of answering."""
    figure = new_figure(figsize=SIZE, layout="constrained")
    draw_layers(figure.subplots(), layers)
    return figure


def draw_layers(axis: Any, layers: Mapping[str, Sequence[int]]) -> None:
    """Visual tokens that each decoder layer runs. Later lines are thinner and dashed, so that equal ones stay visible."""
    for number, (name, counts) in enumerate(layers.items()):
        edges = np.arange(len(counts) + 1) - 0.5
        width, dash = max(1.5, 4.5 - 1.5 * number), DASHES[number % len(DASHES)]
        label = "all tokens" if name == "full" else name
        axis.stairs(
            counts, edges, label=plain(label), linewidth=width, linestyle=dash, color=INKS[number % len(INKS)], baseline=None
        )
    axis.set_ylim(0, 1.35 * max(max(counts) for counts in layers.values()))  # room for the legend
    axis.set_xlabel("decoder layer")
    axis.set_title("visual tokens per layer")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(alpha=0.25)
    axis.legend(fontsize=7)


def draw_scores(axis: Any, scored: list[tuple[str, ImageReport]]) -> None:
    """Scores of the first method in descending order, which of them each method kept, and the fence.

    Scores are on a logarithmic scale, where none is below zero. Tokens without a score (NaN) are left out.
    """
    scores = np.array(scored[0][1].scores, np.float64)
    order = np.argsort(-scores, kind="stable")  # NaN come last
    known = int(np.isfinite(scores).sum())
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    logarithmic = known > 0 and np.nanmin(scores) >= 0
    floor = LEAST if logarithmic else -np.inf
    axis.plot(np.arange(1, known + 1), np.maximum(scores[order[:known]], floor), color="0.6", linewidth=1.2, zorder=1)
    for (name, report), marker, color in zip(scored, "osd^v", COLORS, strict=False):
        cells = np.array([cell for cell in report.kept if np.isfinite(scores[cell])], np.int64)
        size, label = 16 if marker == "o" else 9, f"kept by {name}: {len(report.kept)}"
        axis.scatter(place[cells] + 1, np.maximum(scores[cells], floor), s=size, marker=marker, color=color, label=plain(label))
    for fence in {report.threshold for _, report in scored if report.threshold is not None}:
        axis.axhline(fence, color="black", linestyle="--", linewidth=1, label="fence")
    axis.set_xscale("log")
    if logarithmic:
        axis.set_yscale("log")
    axis.set_xlabel("visual tokens, sorted")
    axis.set_title(plain(f"scores of {scored[0][0]}"))
    axis.grid(alpha=0.25)
    axis.legend(fontsize=7)
