"""Curves: accuracy against kept tokens, and how the pocket model learnt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .canvas import new_figure, plain, write_figure

STYLES = {
    "prumerge": ("#c0392b", "o", "-"),
    "prune-only": ("#c0392b", "o", ":"),
    "prumerge+": ("#1f5fbf", "s", "-"),
    "prune-only+": ("#1f5fbf", "s", ":"),
    "random": ("#7f8c8d", "x", "--"),
    "spatial": ("#27ae60", "^", "--"),
    "sequential": ("#b7950b", "v", "--"),
    "pool": ("#8e44ad", "D", "--"),
}

COLORS = ("#c0392b", "#1f5fbf", "#27ae60", "#8e44ad", "#e67e22", "#16a2b8")  # as many methods as one panel shows
MARKERS = ("o", "s", "^", "D", "v", "P")
TICKS = (4, 8, 16, 36, 64, 100, 144, 200, 288, 400, 576)
GREY: dict[str, tuple[str, Any]] = {"random": ("x", "--"), "spatial": ("^", "-."), "resize": ("s", ":")}


def save_accuracy_curves(report: dict[str, Any], path: str | Path) -> None:
    """Draw the rows of an evaluation: one line per method over its budgets, stars for adaptive rules, bands for 95 % intervals.

    Raises
    ------
    MissingExtraError : matplotlib is not installed.
    """
    figure, axes = _figure((8, 5.2))
    full, low, high = (100 * x for x in report["full_accuracy"])
    axes.axhspan(low, high, color="black", alpha=0.08)
    axes.axhline(full, color="black", linewidth=1, label="all tokens")
    for name, (color, marker, line) in STYLES.items():
        rows = [row for row in report["methods"] if row["name"] == name]
        fixed = [row for row in rows if row["budget"] is not None]
        tokens = [row["mean_tokens"] for row in fixed]
        axes.plot(tokens, [100 * row["accuracy"] for row in fixed], line, color=color, marker=marker, markersize=5, label=name)
        axes.fill_between(tokens, [100 * r["low"] for r in fixed], [100 * r["high"] for r in fixed], color=color, alpha=0.08)
        for row in rows:
            if row["budget"] is None:
                axes.plot(row["mean_tokens"], 100 * row["accuracy"], "*", color=color, markersize=13, markeredgecolor="white")
    axes.set_xscale("log", base=2)
    budgets = [{row["budget"] for row in report["methods"] if row["budget"] and row["name"] == name} for name in STYLES]
    there = [some for some in budgets if some]
    counts = sorted(set.intersection(*there)) if there else []  # those of all; baselines also stand beside adaptive rules
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.set_xlabel("visual tokens kept per image (stars: the method's own adaptive count)")
    axes.set_ylabel("answers right, %")
    axes.set_title(f"pocket model, {report['scenes']} unseen scenes, {report['questions']} questions")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, ncols=2)
    write_figure(figure, path, 150)


def save_comparison(report: dict[str, Any], path: str | Path) -> None:
    """Draw a report of ``foveate compare`` (``comparison_figure``) to a file.

    Raises
    ------
    MissingExtraError : matplotlib is not installed.
    """
    write_figure(comparison_figure(report), path, 140)


def comparison_figure(report: dict[str, Any]) -> Any:
    """A report of ``foveate compare`` as a figure: accuracy against mean tokens over decoder layers.

    One line per method with its 95 % interval, a star for a rule of its own. One panel per kind, or several where a kind has many
    methods; baselines are in each.

    Raises
    ------
    MissingExtraError : matplotlib is not installed.
    """
    kinds = dict.fromkeys(row["kind"] for row in report["rows"] if row["kind"] != "baseline")
    panels = []
    for kind in sorted(kinds, key=("inside the encoder", "before the projector", "inside the decoder").index):
        names = list(dict.fromkeys(row["method"] for row in report["rows"] if row["kind"] == kind))
        parts = -(-len(names) // len(COLORS))
        size = -(-len(names) // parts)
        panels += [(kind + (f", {i + 1} of {parts}" if parts > 1 else ""), names[i * size : (i + 1) * size]) for i in range(parts)]
    panels = panels or [("baselines", [])]
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, grid = _figure((5.4 * columns, 4.6 * rows), rows, columns)
    every = [axes for line in grid for axes in line]
    for axes, (title, names) in zip(every, panels, strict=False):
        _panel(axes, report, names)
        axes.set_title(title, fontsize=10)
    for axes in every[len(panels) :]:
        axes.set_axis_off()
    for line in grid:
        line[0].set_ylabel("answers right, %")
    figure.supxlabel("visual tokens per image, mean over decoder layers (stars: the method's own rule)", fontsize=10)
    name = "pocket model" if report["model"] == "pocket" else report["model"]
    about = "pictures" if report.get("data") else "unseen scenes"
    figure.suptitle(plain(f"{name}, {report['questions']} questions about {report['scenes']} {about}"), fontsize=12)
    return figure


def _panel(axes: Any, report: dict[str, Any], names: Sequence[str]) -> None:
    """The lines of some methods, with all tokens and the baselines behind them."""
    whole = report["all"]
    axes.axhspan(100 * whole["low"], 100 * whole["high"], color="black", alpha=0.08, linewidth=0)
    axes.axhline(100 * whole["accuracy"], color="black", linewidth=1, label="all tokens")
    baselines = dict.fromkeys(row["method"] for row in report["rows"] if row["kind"] == "baseline")
    for name in baselines:
        marker, dash = GREY.get(name, ("d", (0, (2, 2))))
        points = sorted({(r["mean_tokens"], 100 * r["accuracy"]) for r in report["rows"] if r["method"] == name})
        style: dict[str, Any] = {"marker": marker, "linestyle": dash, "markersize": 3, "linewidth": 1}
        axes.plot([x for x, _ in points], [y for _, y in points], color="#8a8a8a", label=plain(name), zorder=1, **style)
    for number, (name, color, marker) in enumerate(zip(names, COLORS, MARKERS, strict=False)):
        rows = sorted((r for r in report["rows"] if r["method"] == name and r["budget"]), key=lambda r: r["mean_tokens"])
        tokens = [row["mean_tokens"] for row in rows]
        axes.fill_between(
            tokens, [100 * r["low"] for r in rows], [100 * r["high"] for r in rows], color=color, alpha=0.1, linewidth=0
        )
        # later ones are thinner and on top, so that curves which lie on each other stay visible
        line = {"color": color, "marker": marker, "markersize": 6.5 - 0.6 * number, "linewidth": 3.4 - 0.45 * number}
        axes.plot(tokens, [100 * row["accuracy"] for row in rows], label=plain(name), zorder=3, **line)
        for row in report["rows"]:
            if row["method"] == name and row["budget"] is None:
                style = {"color": color, "markersize": 12, "markeredgecolor": "white", "zorder": 4}
                axes.plot(row["mean_tokens"], 100 * row["accuracy"], "*", **style)
    axes.set_xscale("log", base=2)
    shown = [row["mean_tokens"] for row in report["rows"] if row["method"] in (names or baselines)]
    total = max(report["total"], *shown)
    ticks = TICKS if total == TICKS[-1] else [*(2**power for power in range(17) if 2**power < 0.75 * total), round(total)]
    axes.set_xticks(ticks, [str(tick) for tick in ticks], fontsize=8)
    axes.set_xlim(0.85 * min(shown), 1.1 * total)
    axes.set_ylim(min(100 * row["low"] for row in report["rows"]) - 2, 101)
    axes.grid(alpha=0.2)
    axes.legend(fontsize=7.5, loc="lower right", ncols=2, framealpha=0.85)


def save_training_curve(log: Sequence[dict[str, Any]], path: str | Path, labels: Sequence[str] = ("24",)) -> None:
    """Draw the log of ``foveate.pocket.train``: accuracy of answers on fresh pictures, per family, over the steps.

    Parameters
    ----------
    labels : of the batches that are drawn: "24" are whole pictures of the first model; the second has "picture" and "clip".

    Raises
    ------
    MissingExtraError : matplotlib is not installed.
    """
    figure, axes = _figure((9, 5.2))
    window, number = 5, 0  # lines of the log, 50 steps each
    for label in labels:
        begin = f"{label}/answer/"
        for name in sorted({key for line in log for key, value in line.items() if key.startswith(begin) and value is not None}):
            known = [(line["step"], 100 * line[name]) for line in log if line.get(name) is not None]
            values = [value for _, value in known]
            smooth = [sum(values[max(0, i - window + 1) : i + 1]) / min(i + 1, window) for i in range(len(values))]
            style = ("-", "--", ":")[number // 10 % 3]
            axes.plot([step for step, _ in known], smooth, style, linewidth=1.4, label=name.removeprefix(begin))
            number += 1
    axes.set_xlabel("step")
    axes.set_ylabel("answer tokens right on fresh pictures, % (mean of 250 steps)")
    axes.set_ylim(0, 101)
    axes.grid(alpha=0.25)
    figure.legend(*axes.get_legend_handles_labels(), fontsize=8, loc="outside right upper")  # beside the curves, not on them
    write_figure(figure, path, 120)


def _figure(size: tuple[float, float], rows: int = 0, columns: int = 0) -> tuple[Any, Any]:
    """A figure with one pair of axes, or with rows of them that share their scales."""
    figure = new_figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, sharey=True) if rows else figure.subplots()
