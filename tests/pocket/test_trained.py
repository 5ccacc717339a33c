"""The weights that come with the package: they load, fit the pocket model, and answer."""

from __future__ import annotations

import pytest

import foveate
from foveate.lab.exam import Asker
from foveate.lab.testset import TestSet
from foveate.loading import base_of, load
from foveate.methods.registry import registered, shipped
from foveate.pocket import ADAPTERS

WEIGHTS = [(name, weights) for name, cls in registered().items() for weights in shipped(cls).values()]


@pytest.fixture(scope="module")
def data() -> TestSet:
    return TestSet.draw(12, seed=5, split="validation").picked(2, seed=5)


@pytest.mark.parametrize(("name", "weights"), WEIGHTS)
def test_shipped_weights_answer(name, weights, data):
    folder = ADAPTERS / weights.partition("/")[2]
    loaded = load(f"pocket+{folder.name}" if folder.is_dir() else "pocket")
    method = foveate.get(name, weights=weights)
    if method.needs_budget():
        method = method.with_budget(36)
    asker = Asker(loaded, data)
    with method(loaded.model) as session:
        loaded.model.generate(**asker.prompts.inputs([0, 1]), max_new_tokens=1)
        assert not [warning for warning in session.report.warnings if "trained" in warning]
        assert sum(session.report.layers) < 2 * 576 * len(session.report.layers)
    assert asker.run(method).right.sum() >= 11  # of 24; guessing gives about 9


def test_all_are_there():
    assert {name for name, _ in WEIGHTS} >= {"dyvte", "fovea", "quecc", "setok", "vistog", "crossget+"}


@pytest.mark.parametrize("name", sorted(path.name for path in ADAPTERS.iterdir()))
def test_adapters_say_what_they_belong_to(name):
    assert base_of(ADAPTERS / name) == "pocket"
    assert load(f"pocket+{name}").model.active_adapter == "default"
