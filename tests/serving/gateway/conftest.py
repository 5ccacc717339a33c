"""A stand-in for vLLM and a gateway in front of it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from foveate.loading import load_encoder
from foveate.serving.encoding import PictureEncoder
from tests.serving_fakes import FakeEngine

from .asked import started


@pytest.fixture(scope="module")
def encoder() -> PictureEncoder:
    return PictureEncoder(load_encoder("pocket"))


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def gateway(engine: FakeEngine, encoder: PictureEncoder) -> Iterator[str]:
    with started(engine, encoder) as url:
        yield url
