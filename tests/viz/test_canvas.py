"""Names in pictures are shown as they are, whatever they mean to matplotlib."""

from __future__ import annotations

import pytest
from matplotlib.figure import Figure

import foveate
from foveate.viz.canvas import write_figure
from foveate.viz.charts import draw_layers
from foveate.viz.curves import comparison_figure
from foveate.viz.roofline_chart import roofline_figure

NAMES = ("a_$5_and_$_", "_mine")  # of files: broken formulas, and labels that legends leave out


def compared() -> Figure:
    row = {"kind": "before the projector", "budget": 64, "mean_tokens": 64, "accuracy": 0.5, "low": 0.4, "high": 0.6}
    rows = [{**row, "method": NAMES[0]}, {**row, "method": NAMES[1], "kind": "baseline"}]
    return comparison_figure({"model": NAMES[0], "rows": rows, "all": row, "total": 576, "questions": 2, "scenes": 1})


def priced() -> Figure:
    return roofline_figure({name: foveate.cost(visual=9) for name in NAMES})


def layered() -> Figure:
    figure = Figure()
    draw_layers(figure.subplots(), dict.fromkeys(NAMES, (9, 3)))
    return figure


@pytest.mark.parametrize("drawn", [compared, priced, layered])
def test_names_are_shown_as_they_are(drawn, tmp_path):
    figure = drawn()
    write_figure(figure, tmp_path / "a.png", 50)
    shown = [text.get_text().strip().replace("\\$", "$") for text in figure.axes[0].get_legend().get_texts()]
    assert set(NAMES) <= set(shown)
