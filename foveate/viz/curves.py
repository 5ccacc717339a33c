"""Curves: accuracy against kept tokens."""

from __future__ import annotations

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
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("matplotlib", "viz") from error
    figure = Figure(figsize=(8, 5.2), layout="constrained")
    axes = figure.subplots()
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
