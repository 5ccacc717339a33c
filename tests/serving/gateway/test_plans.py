"""A gateway whose method is a plan of ``foveate tune``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import foveate
from foveate.cli.common import asked_of
from foveate.errors import InputError
from foveate.serving.encoding import PictureEncoder
from foveate.serving.gateway.app import create_app
from foveate.serving.gateway.gateway import GatewaySettings
from foveate.tuning.plan import TunedPlan, marks_of
from tests.serving_fakes import FakeEngine

from .asked import body, post, started


def settings(model: str, place: Path) -> dict[str, object]:
    """Of a gateway, from a plan for one of the shipped models, as ``foveate serve --plan`` makes them."""
    loaded, _ = foveate.load_pocket(model)
    method = foveate.get("divprune", budget=31).described()
    plan = TunedPlan(method, {"name": model, "signature": marks_of(loaded)}, "it is a test", 0.01, 0.0, 0.005, {})
    plan.save(place)
    assert json.loads(place.read_text())["tolerance"] == 0.01
    name, budget, config = asked_of(None, None, None, None, place)
    return {"method": name, "budget": budget, "config": config}


def test_requests_get_the_plan(engine: FakeEngine, encoder: PictureEncoder, tmp_path: Path) -> None:
    """Of a model without decoder layers, which is what a gateway has."""
    with started(engine, encoder, **settings("pocket", tmp_path / "plan.json")) as url:
        answer = post(url, body(1))
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["foveate"]["visual_tokens"] == 31


def test_the_plan_of_another_model_stops_the_start(encoder: PictureEncoder, tmp_path: Path) -> None:
    given = settings("qwen", tmp_path / "plan.json")
    with pytest.raises(InputError, match="was tuned for 'qwen', and this is a model with other weights"):
        create_app(GatewaySettings("pocket", "http://127.0.0.1:1", **given), [encoder])  # type: ignore[arg-type]
