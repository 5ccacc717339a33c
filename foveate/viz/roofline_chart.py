"""The roofline: the operators of runs under the memory and the arithmetic of a processor."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..analysis.roofline import PHASES, Cost, CostLine
from ..errors import InputError
from .canvas import new_figure, plain, write_figure

COLORS = ("#1f5fbf", "#c0392b", "#27ae60", "#8e44ad", "#e67e22", "#16a2b8")
LOWER = 0.6  # of the speed, per run, so that points of several runs can be told apart
GROUPS = {  # what a line belongs to: its marker, and its shade in the bars
    "vision tower": ("^", "#f1c40f"),
    "projector": ("P", "#e67e22"),
    "question": ("v", "#d98880"),
    "linear layers": ("o", "#34495e"),
    "attention": ("s", "#16a2b8"),
    "lm_head": ("D", "#b39ddb"),
    "the rest": ("x", "#bdc3c7"),
}


def group(line: CostLine) -> str:
    """The key of ``GROUPS`` that an operator belongs to."""
    if line.part != "decoder":
        return line.part
    if line.name in ("attention", "scores", "softmax", "values"):
        return "attention"
    if line.name == "lm_head":
        return line.name
    return "linear layers" if line.name.endswith("_proj") else "the rest"


def save_roofline(costs: Mapping[str, Cost], path: str | Path) -> None:
    """Draw runs on the same processor to a file, as ``roofline_figure`` does.

    Raises
    ------
    InputError : there are too many runs, or they are on several processors.
    MissingExtraError : matplotlib is not installed.
    """
    write_figure(roofline_figure(costs), path, 140)


def roofline_figure(costs: Mapping[str, Cost]) -> Any:
    """Runs on the same processor: every operator under its roof, and where the time of the prefill and of a step goes.

    Parameters
    ----------
    costs : by the name of the run; six of them at most.

    Raises
    ------
    InputError : there are too many runs, or they are on several processors.
    MissingExtraError : matplotlib is not installed.
    """
    processors = {cost.hardware for cost in costs.values()}
    if len(processors) != 1 or len(costs) > len(COLORS):
        raise InputError(
            f"{len(costs)} runs on {len(processors)} processors; a picture takes 1 to {len(COLORS)} runs on one processor"
        )
    figure = new_figure(figsize=(13, 5.4), layout="constrained")
    roof, bars = figure.subplots(1, 2, width_ratios=(1.15, 1))
    _roof(roof, costs)
    _bars(bars, costs)
    first = next(iter(costs.values()))
    figure.suptitle(
        plain(f"{first.model} on {first.hardware.name}, batch {first.work.run.batch}, {first.work.text} text tokens"), fontsize=12
    )
    return figure


def _roof(axes: Any, costs: Mapping[str, Cost]) -> None:
    """Intensity against speed. All points lie on their roof; each further run has a roof of its own, drawn a step lower."""
    lines = [line for cost in costs.values() for line in cost.lines if line.flops]
    hardware = next(iter(costs.values())).hardware
    low, high = 0.5 * min(line.intensity for line in lines), 3 * max(line.intensity for line in lines)
    peaks = {hardware.peak(line.bits) for line in lines if line.bits}
    top = max(peaks)
    high = max(high, 10 * top / hardware.bandwidth)
    for peak in sorted(peaks):
        bend = peak / hardware.bandwidth
        axes.plot([low, bend, high], [low * hardware.bandwidth, peak, peak], color="black", linewidth=1.3, zorder=1)
        for number, color in zip(range(1, len(costs)), COLORS[1:], strict=False):
            lower = LOWER**number
            roof = [lower * low * hardware.bandwidth, lower * peak, lower * peak]
            axes.plot([low, bend, high], roof, color=color, linewidth=0.8, alpha=0.6, zorder=1)
        axes.text(0.9 * high, peak * 1.3, f"{peak / 1e12:,.4g} TFLOPS, bends at {bend:.0f}", ha="right", fontsize=8)
    axes.text(low * 1.5, low * 6 * hardware.bandwidth, f"{hardware.bandwidth / 1e9:,.4g} GB/s", fontsize=8)
    slowest = max(line.seconds for line in lines)
    for number, (cost, color) in enumerate(zip(costs.values(), COLORS, strict=False)):
        for line in cost.lines:
            if not line.flops:
                continue
            marker = GROUPS[group(line)][0]
            prefill = line.phase == "prefill"
            steps = 1 if prefill else cost.work.new_tokens - 1
            size = 25 + 200 * (line.seconds / steps / slowest) ** 0.5
            face = {"color": color} if marker == "x" else {"facecolors": color if prefill else "white", "edgecolors": color}
            speed = LOWER**number * line.flops / line.seconds
            axes.scatter(line.intensity, speed, s=size, marker=marker, alpha=0.65, zorder=2, **face)
    axes.set(xscale="log", yscale="log", xlabel="FLOPs per byte moved", ylabel="FLOPs per second", xlim=(low, high))
    axes.set_ylim(top=3 * top)
    axes.grid(alpha=0.25)
    for name, color in zip(costs, COLORS, strict=False):
        axes.scatter([], [], marker="o", color=color, label=plain(name))
    for name, (marker, _) in GROUPS.items():
        if any(group(line) == name for line in lines):
            axes.scatter([], [], marker=marker, color="#555555", label=name)
    if any(line.phase == "decode" for line in lines):
        axes.scatter([], [], marker="o", facecolors="white", edgecolors="#555555", label="hollow: decode")
    axes.legend(fontsize=8, loc="lower right", title="larger: takes longer", title_fontsize=8)
    told = ", each further run and its roof a step lower" if len(costs) > 1 else ""
    axes.set_title(f"operators under the roof{told}", fontsize=10)


def _bars(axes: Any, costs: Mapping[str, Cost]) -> None:
    """Milliseconds of the prefill and of one step, by group."""
    rows = [(name, cost, phase) for phase in PHASES for name, cost in costs.items() if cost.select(phase)]
    for place, (_, cost, phase) in enumerate(rows):
        left, steps = 0.0, (1 if phase == "prefill" else cost.work.new_tokens - 1)
        for kind, (_, color) in GROUPS.items():
            width = 1e3 * sum(line.seconds for line in cost.select(phase) if group(line) == kind) / steps
            axes.barh(place, width, left=left, color=color, height=0.65, edgecolor="white", linewidth=0.4)
            left += width
        axes.text(left, place, f" {left:.3g} ms", va="center", fontsize=9)
    for kind, (_, color) in GROUPS.items():
        axes.barh(0, 0, color=color, label=kind)
    names = [f"{plain(name)}\n{'prefill' if phase == 'prefill' else 'one new token'}" for name, _, phase in rows]
    axes.set_yticks(range(len(rows)), names, fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.15 * axes.get_xlim()[1])
    axes.set_xlabel("milliseconds, at least")
    axes.set_title("where the time goes", fontsize=10)
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.11), ncols=3, frameon=False)
