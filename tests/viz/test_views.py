"""Ways of looking at what was kept, read back from the pixels."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from foveate.report import ImageReport
from foveate.viz.charts import layers_figure, scores_figure
from foveate.viz.views import HEAT, MEANINGS, VIEWS, heat_colors, ranks

CELL = 40
KEPT = [1, 4, 6]
SOURCE = [0, 0, -1, 1, 1, -1, 2, -1, -1]
SCORES = [0.1, 0.5, 0.2, 0.05, 0.9, 0.01, 0.3, 0.02, 0.03]


def report(scores: list[float] | None = SCORES, threshold: float | None = None) -> ImageReport:
    return ImageReport(0, 9, 3, (3, 3), KEPT, SOURCE, scores, threshold)


def cells(view: str, found: ImageReport) -> np.ndarray:
    """[9, CELL, CELL, 3] what is drawn over a white picture."""
    image = VIEWS[view](Image.new("RGB", (30, 30), "white"), found, 3 * CELL)
    assert image.size == (3 * CELL, 3 * CELL)
    return np.asarray(image, float).reshape(3, CELL, 3, CELL, 3).swapaxes(1, 2).reshape(9, CELL, CELL, 3)


def test_every_view_is_explained():
    assert set(VIEWS) == set(MEANINGS)


def test_kept_and_merged():
    """Inside its edge a kept cell is as it was; merged ones are tinted in one view and dark in the other."""
    both = {view: cells(view, report())[:, 1:-1, 1:-1] for view in ("merged sources", "kept only")}
    for inner in both.values():
        assert set(np.nonzero((inner == 255).all((1, 2, 3)))[0]) == set(KEPT)
    grey = {view: {n for n in range(9) if np.ptp(inner[n].mean((0, 1))) < 1} for view, inner in both.items()}
    assert set(range(9)) - grey["merged sources"] == {0, 3}, "cells that were merged into others"
    assert grey["kept only"] == set(range(9))


def test_merged_into_another_frame():
    """Neither as dark as what was dropped nor in the colour of a kept token."""
    found = replace(report(), source=[0, 0, -1, 1, 1, -2, 2, -1, -2])
    middle = cells("merged sources", found)[:, CELL // 2, CELL // 2]
    assert all(np.ptp(middle[cell]) < 1 for cell in (2, 5, 7, 8)), "grey"
    assert middle[2, 0] == middle[7, 0] < middle[5, 0] == middle[8, 0] < 255
    assert np.array_equal(cells("kept only", found), cells("kept only", report()))


def test_heat_follows_the_scores():
    middle = cells("scores as heat", report())[:, CELL // 2, CELL // 2].sum(1)
    assert list(np.argsort(middle)) == list(np.argsort(SCORES))
    edges = cells("scores as heat", report())[:, 0, 0]
    assert set(np.nonzero((edges == 255).all(1))[0]) == set(KEPT)


def test_heat_of_odd_scores():
    assert np.array_equal(heat_colors(np.array([math.nan, math.nan])), np.array([HEAT[0]] * 2, np.float32))
    assert np.isfinite(heat_colors(np.full(4, 0.3))).all()
    assert np.isfinite(heat_colors(np.zeros(4))).all()
    below = heat_colors(np.array([-3.0, -1.0, 2.0, math.nan]))
    assert np.allclose(below[0], HEAT[0])
    assert np.allclose(below[2], HEAT[-1])
    assert np.allclose(below[3], HEAT[0])


def test_ranks():
    assert ranks(report()) == [2, 1, 3], "by score"
    assert ranks(report(scores=None)) == [1, 2, 3], "as the model reads them"
    assert ranks(report(scores=[math.nan] * 9)) == [1, 2, 3]


def test_order_is_bright_to_dark():
    drawn = cells("order", report())[:, 2, 2].sum(1)
    assert drawn[4] > drawn[1] > drawn[6]


@pytest.mark.parametrize("scores", [None, SCORES])
def test_views_without_scores_are_those_of_the_kept(scores):
    same = np.array_equal(cells("scores as heat", report(scores)), cells("kept only", report(scores)))
    assert same is (scores is None)


def test_charts():
    axis = scores_figure("x", report(threshold=0.25)).axes[0]
    curve = axis.get_lines()[0]
    assert list(curve.get_ydata()) == sorted(SCORES, reverse=True)
    assert sorted(axis.collections[0].get_offsets()[:, 1].tolist()) == sorted(SCORES[cell] for cell in KEPT)
    assert axis.get_lines()[1].get_ydata()[0] == 0.25
    missing = [math.nan if n == 2 else score for n, score in enumerate(SCORES)]
    assert len(scores_figure("x", report(missing)).axes[0].get_lines()[0].get_ydata()) == 8
    assert scores_figure("x", report([-score for score in SCORES])).axes[0].get_yscale() == "linear"


def test_equal_curves_stay_visible():
    """One over the other, each is thinner than the one below it."""
    axis = layers_figure({"full": [9, 9], "a": [9, 9], "b": [9, 9]}).axes[0]
    widths = [patch.get_linewidth() for patch in axis.patches]
    assert widths == sorted(set(widths), reverse=True)
    assert len({str(patch.get_edgecolor()) for patch in axis.patches}) == 3
