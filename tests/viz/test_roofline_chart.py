"""The roofline as a picture."""

from __future__ import annotations

import numpy as np
import pytest

import foveate
from foveate.viz.roofline_chart import roofline_figure


@pytest.mark.parametrize("counts", [(576,), (576, 144, 40)])
def test_points_lie_on_a_roof_that_is_drawn(counts):
    """Read back from the figure: every point is on a line, the points of the first run on a black one."""
    figure = roofline_figure({str(count): foveate.cost("llava-1.5-7b", hardware="a100", visual=count) for count in counts})
    axes = figure.axes[0]
    lines = [np.log(np.array(line.get_data(), float)) for line in axes.get_lines() if len(line.get_xdata()) == 3]
    points = [np.log(point) for group in axes.collections for point in np.asarray(group.get_offsets(), float) if len(point)]
    assert len(points) > 10 * len(counts)
    for x, y in points:
        assert min(abs(np.interp(x, *line) - y) for line in lines) < 1e-6
    assert len(lines) % len(counts) == 0
