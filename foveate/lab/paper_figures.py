"""Figures 1, 3a, 3b, 4 and 5 of LLaVA-PruMerge (arXiv 2403.15388) on the pocket world: ``foveate figure``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from ..analysis.flops import prefill_flops
from ..chat import make_inputs
from ..errors import InputError
from ..loading import Loaded, load
from ..methods.base import Method
from ..methods.registry import get
from ..pictures import Pictures
from ..pocket.scenes import LEVELS
from ..report import ImageReport
from ..viz.canvas import new_figure
from ..viz.views import kept
from .examples import examples
from .testset import TestSet

SEED = 7  # of the scenes that are shown
SCENES = 60  # that distributions are of
QUESTION = "what color is the star ?"  # its words are the text whose prefill is counted
DARK, RED, BLUE = "#3c4043", "#c0392b", "#1f5fbf"
PATTERNS = ((6, 6), (5, 8), (8, 5), (5, 7), (7, 5), (4, 4))  # of figure 4, d to h, rows and columns
TITLES = {
    "1": "Main idea: each picture keeps a number of tokens of its own, and the language model does less",
    "3a": "Attention of [CLS] to visual tokens is sparse",
    "3b": "What PruMerge and PruMerge+ keep",
    "4": "Token sampling strategies",
    "5": "Positions of the selected tokens",
}


class Reducer:
    """Reduces pictures of the pocket world by methods that act before the decoder."""

    def __init__(self, loaded: Loaded) -> None:
        self.loaded = loaded

    def __call__(self, picture: Image.Image, methods: Sequence[Method]) -> list[ImageReport]:
        """What each method keeps of a picture."""
        inputs, _ = make_inputs(self.loaded.processor, self.loaded.model, picture, QUESTION)
        pictures = Pictures(self.loaded.model, **inputs)
        return [pictures.reduce(method).report.images[0] for method in methods]

    def flops(self, visual: int) -> int:
        """Of the decoder's prefill, with so many visual tokens beside the question."""
        inputs, _ = make_inputs(self.loaded.processor, self.loaded.model, Image.new("RGB", (192, 192)), QUESTION)
        text = inputs["input_ids"].shape[1] - self.total
        config = self.loaded.model.config
        return prefill_flops(config, [text + visual] * config.get_text_config().num_hidden_layers)

    @property
    def total(self) -> int:
        """Visual tokens of a picture."""
        vision = self.loaded.model.config.vision_config
        return (vision.image_size // vision.patch_size) ** 2


def paper_figure(number: str) -> tuple[Any, dict[str, Any]]:
    """A figure of the paper, drawn by matplotlib with the pocket model, and the numbers in it.

    Parameters
    ----------
    number : "1", "3a", "3b", "4" or "5".

    Raises
    ------
    InputError : there is no such figure.
    MissingExtraError : matplotlib is not installed.
    """
    if number not in DRAWN:
        raise InputError(f"there is no figure {number!r} here. Choose one of {', '.join(DRAWN)}.")
    reducer = Reducer(load())
    figure, numbers = DRAWN[number](reducer)
    figure.suptitle(f"Figure {number} of LLaVA-PruMerge, with the pocket model\n{TITLES[number]}", fontsize=12)
    return figure, {"figure": number, "title": TITLES[number], **numbers}


def scenes(reducer: Reducer) -> list[tuple[str, Image.Image]]:
    """A plain, a medium and a crowded scene."""
    found = examples(reducer.loaded, SEED)
    return [(name, picture) for name, picture, _ in found if isinstance(picture, Image.Image)]


def many(reducer: Reducer) -> list[tuple[str, ImageReport]]:
    """The levels of many unseen scenes, and what PruMerge keeps of each by its own rule."""
    drawn = TestSet.draw(SCENES, SEED).scenes
    return [(LEVELS[scene.level], reducer(Image.fromarray(scene.image), [get("prumerge")])[0]) for scene in drawn]


def _show(axis: Any, image: Image.Image, title: str) -> None:
    axis.imshow(image.resize((480, 480), Image.Resampling.NEAREST) if image.width < 300 else image)
    axis.set_title(title, fontsize=10)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.set_frame_on(False)


def figure_1(reducer: Reducer) -> tuple[Any, dict[str, Any]]:
    """Three scenes, what PruMerge keeps of them, and how many tokens and operations of the prefill that is on average."""
    figure = new_figure(figsize=(12.5, 6.4), layout="constrained")
    axes = figure.subplots(2, 4)
    for column, (name, picture) in enumerate(scenes(reducer)):
        report = reducer(picture, [get("prumerge")])[0]
        _show(axes[0, column], picture, f"{name}: all {report.before} tokens")
        _show(axes[1, column], kept(picture, report), f"{report.after} tokens stay ({report.after / report.before:.0%})")
    counts: dict[str, list[int]] = {}
    for level, report in many(reducer):
        counts.setdefault(level, []).append(report.after)
    tokens = {"all tokens": float(reducer.total), **{level: float(np.mean(each)) for level, each in counts.items()}}
    flops = {name: reducer.flops(round(count)) / 1e9 for name, count in tokens.items()}
    for axis, values, label in (
        (axes[0, 3], tokens, "visual tokens"),
        (axes[1, 3], flops, "GFLOPs of its prefill"),
    ):
        bars = axis.barh([*values], [*values.values()], color=[DARK, *[RED] * len(counts)])
        axis.bar_label(bars, fmt="%.3g", padding=3, fontsize=9)
        axis.invert_yaxis()
        axis.set_xlim(right=1.2 * max(values.values()))
        axis.set_title(label, fontsize=10)
    axes[1, 3].set_xlabel(f"means of {SCENES} unseen scenes", fontsize=9)
    return figure, {"tokens": tokens, "gflops": flops}


def figure_3a(reducer: Reducer) -> tuple[Any, dict[str, Any]]:
    """Sorted scores of many scenes: the middle one, the middle 80 %, and the fence beyond which tokens are outliers."""
    reports = [report for _, report in many(reducer)]
    scores = np.array([sorted(report.scores or [], reverse=True) for report in reports])
    scores = scores / scores.sum(1, keepdims=True)
    low, middle, high = np.quantile(scores, (0.1, 0.5, 0.9), axis=0)
    place = np.arange(1, scores.shape[1] + 1)
    figure = new_figure(figsize=(8, 5), layout="constrained")
    axis = figure.subplots()
    axis.fill_between(place, low, high, color=BLUE, alpha=0.2, linewidth=0, label="80 % of the scenes")
    axis.semilogy(place, middle, color=BLUE, linewidth=1.8, label="median")
    axis.axhline(1 / len(place), color="0.5", linestyle=":", label=f"even: 1 / {len(place)}")
    outliers = float(np.median([sum(score > (report.threshold or 0) for score in report.scores or []) for report in reports]))
    axis.axvline(outliers, color=RED, linestyle="--", label=f"outliers, median: {outliers:g}")
    axis.set(xlabel="visual tokens, sorted by attention", ylabel="share of the attention of [CLS]", xlim=(1, len(place)))
    axis.grid(alpha=0.25)
    axis.legend()
    share = float(np.median(scores[:, : round(outliers)].sum(1)))
    axis.set_title(
        f"{len(reports)} unseen scenes; {outliers:g} of {len(place)} tokens get {share:.0%} of it (medians)", fontsize=10
    )
    return figure, {"scenes": len(reports), "outliers": outliers, "share_of_outliers": share, "median": middle.tolist()}


def figure_3b(reducer: Reducer) -> tuple[Any, dict[str, Any]]:
    """Three scenes, and what both methods keep of each by their own rules."""
    names = ("prumerge", "prumerge+")
    figure = new_figure(figsize=(9.2, 9.8), layout="constrained")
    axes = figure.subplots(3, 3)
    counts: dict[str, list[int]] = {name: [] for name in names}
    for column, (level, picture) in enumerate(scenes(reducer)):
        _show(axes[0, column], picture, level)
        for row, (name, report) in enumerate(zip(names, reducer(picture, [get(name) for name in names]), strict=True), 1):
            counts[name].append(report.after)
            _show(axes[row, column], kept(picture, report), f"{name}: {report.after} of {report.before}")
    return figure, {"levels": [*LEVELS], "tokens": counts}


def figure_4(reducer: Reducer) -> tuple[Any, dict[str, Any]]:
    """One scene: PruMerge, the first tokens, and even patterns of the paper's shapes."""
    picture = scenes(reducer)[-1][1]
    ways: dict[str, Method] = {"(b) PruMerge": get("prumerge"), "(c) sequential": get("sequential", budget=40)}
    ways |= {f"spatial, {rows} x {columns}": get("spatial", shape=(rows, columns)) for rows, columns in PATTERNS}
    reports = reducer(picture, [*ways.values()])
    figure = new_figure(figsize=(9.2, 10), layout="constrained")
    axes = [*figure.subplots(3, 3).flat]
    _show(axes[0], picture, "(a) the picture")
    for axis, (name, report) in zip(axes[1:], zip(ways, reports, strict=True), strict=True):
        _show(axis, kept(picture, report), f"{name}: {report.after} tokens")
    return figure, {"tokens": {name: report.after for name, report in zip(ways, reports, strict=True)}}


def figure_5(reducer: Reducer) -> tuple[Any, dict[str, Any]]:
    """Where PruMerge's tokens lie: in three scenes, and how often each place is chosen in many."""
    figure = new_figure(figsize=(14, 4.3), layout="constrained")
    axes = figure.subplots(1, 4)
    for axis, (name, picture) in zip(axes, scenes(reducer), strict=False):
        report = reducer(picture, [get("prumerge")])[0]
        _show(axis, picture, f"{name}: {report.after} tokens")
        rows, columns = report.grid
        y, x = np.divmod(np.array(report.kept), columns)
        axis.scatter((x + 0.5) * 480 / columns, (y + 0.5) * 480 / rows, s=14, color="#ff3b30", edgecolors="white", linewidths=0.5)
    reports = [report for _, report in many(reducer)]
    often = np.zeros(reports[0].grid[0] * reports[0].grid[1])
    for report in reports:
        often[report.kept] += 1 / len(reports)
    shown = axes[3].imshow(100 * often.reshape(reports[0].grid), cmap="magma", vmin=0)
    axes[3].set_title(f"chosen in % of {len(reports)} scenes", fontsize=10)
    axes[3].set_xticks([])
    axes[3].set_yticks([])
    figure.colorbar(shown, ax=axes[3], shrink=0.85)
    return figure, {"scenes": len(reports), "frequency": often.tolist()}


DRAWN: dict[str, Callable[[Reducer], tuple[Any, dict[str, Any]]]] = {
    "1": figure_1,
    "3a": figure_3a,
    "3b": figure_3b,
    "4": figure_4,
    "5": figure_5,
}
