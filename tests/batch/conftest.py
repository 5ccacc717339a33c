"""Pictures and engines of the tests of ``foveate batch``."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
from PIL import Image

from foveate.pocket.scenes import draw_scene
from foveate.serving import engines
from foveate.serving.engines import TransformersEngine
from foveate.serving.export import export
from foveate.serving.rows import Wanted


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """A folder of scenes, with a white picture."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(4):
        Image.fromarray(draw_scene(Random(number), split="test", level=number % 3).image).save(folder / f"{number}.png")
    Image.new("RGB", (192, 192), "white").save(folder / "white.png")
    return folder


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "text"
    export("pocket", folder)
    return folder


@pytest.fixture(scope="module")
def engine() -> TransformersEngine:
    return TransformersEngine("pocket", Wanted())


@pytest.fixture
def shared(monkeypatch, engine):
    """The command line with a model that is loaded once."""
    monkeypatch.setattr(engines, "load", lambda name: engine.loaded)
