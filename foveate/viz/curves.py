"""Curves: accuracy against kept tokens, and how the pocket model learnt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import MissingExtraError

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
    counts = sorted({row["budget"] for row in report["methods"] if row["budget"] and row["name"] == "sequential"})
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.set_xlabel("visual tokens kept per image (stars: the method's own adaptive count)")
    axes.set_ylabel("answers right, %")
    axes.set_title(f"pocket model, {report['scenes']} unseen scenes, {report['questions']} questions")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, ncols=2)
    figure.savefig(path, dpi=150)


def save_training_curve(log: Sequence[dict[str, Any]], path: str | Path, side: int = 24) -> None:
    """Draw the log of ``foveate.pocket.train``: accuracy of answers on whole pictures, per family, over the steps.

    Raises
    ------
    MissingExtraError : matplotlib is not installed.
    """
    figure, axes = _figure((9, 5.2))
    names = sorted({key for line in log for key in line if key.startswith(f"{side}/answer/")})
    window = 5  # lines of the log, 50 steps each
    for number, name in enumerate(names):
        steps = [line["step"] for line in log if name in line]
        values = [100 * line[name] for line in log if name in line]
        smooth = [sum(values[max(0, i - window + 1) : i + 1]) / min(i + 1, window) for i in range(len(values))]
        style = "-" if number < 6 else "--"
        axes.plot(steps, smooth, style, linewidth=1.4, label=name.removeprefix(f"{side}/answer/"))
    axes.set_xlabel("step")
    axes.set_ylabel("answer tokens right on fresh whole pictures, % (mean of 250 steps)")
    axes.set_ylim(0, 101)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, ncols=2)
    figure.savefig(path, dpi=120)


def _figure(size: tuple[float, float]) -> tuple[Any, Any]:
    """A figure with one pair of axes."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("matplotlib", "viz") from error
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots()
