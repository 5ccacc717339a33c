"""The simulation of a fleet against queues whose waits are known, and against steps that are counted by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("simpy", reason="the simulation needs it: pip install 'foveate[dev]'")

from benchmarks import fleet, fleet_cell
from benchmarks.fleet import CellSize, Load, fitted, loads_of, sized
from benchmarks.fleet_cell import Cell, Times
from foveate.errors import InputError

ROOT = Path(__file__).parents[2]
TIMES = Times(encode=0.1, other=0.0, step=0.5, prompt=0.01, written=0.25, batched=100, running=16, pictures=1)


def test_one_request_by_hand():
    """0.1 s for the picture, prompts of 150 tokens in two steps (1.5 s, 1.0 s), two more tokens of the answer of 0.75 s each."""
    cell = Cell(TIMES, 1, 1, tokens=150, answer=3)
    rate, first = cell.closed(at_once=1, number=2)
    assert first == pytest.approx(0.1 + 1.5 + 1.0)
    assert rate == pytest.approx(1 / (2.6 + 1.5))


def test_two_requests_by_hand():
    """The second prompt is read in the step in which the first answer is written."""
    cell = Cell(TIMES, 1, 1, tokens=60, answer=2)
    cell.closed(at_once=2, number=2)
    # pictures are ready at 0.1 and 0.2; step to 1.2 reads 60; the next writes one and reads 60 for the second: 0.5 + 0.6 + 0.25
    assert cell.firsts == pytest.approx([1.2, 2.55])
    assert cell.ends == pytest.approx([2.55, 2.55 + 0.75])


def test_pictures_of_a_batch_are_done_together():
    times = Times(encode=0.1, other=0.0, step=0.5, prompt=0.0, written=0.0, pictures=3)
    cell = Cell(times, 1, 1, tokens=1, answer=1)
    cell.closed(at_once=4, number=4)
    assert sorted(cell.firsts) == pytest.approx([0.8, 0.8, 0.8, 1.3])


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_the_wait_of_a_queue_with_constant_service(load, monkeypatch):
    """One encoder, and an engine that takes no time: the mean wait of an M/D/1 queue, load / (2 (1 - load)) services."""
    monkeypatch.setattr(fleet_cell, "SIMULATED", 20_000)
    times = Times(encode=1.0, other=0.0, step=1e-9, prompt=0.0, written=0.0, running=1000, pictures=1)
    cell = Cell(times, 1, 1, tokens=1, answer=1)
    cell.open(load)
    assert np.mean(cell.firsts) - 1 == pytest.approx(load / (2 * (1 - load)), rel=0.15)


def test_requests_go_to_the_engine_with_the_fewest():
    times = Times(encode=0.0, other=0.0, step=1.0, prompt=0.0, written=0.0, running=1)
    cell = Cell(times, 8, 2, tokens=1, answer=4)
    rate, _ = cell.closed(at_once=2, number=8)
    assert rate == pytest.approx(2 / 4)


def test_times_are_found_again():
    """What was simulated with known times is fitted with times that predict other loads."""
    true = Times(encode=0.1, other=0.001, step=0.02, prompt=0.0018, written=0.004)
    loads = [Load(visual, at_once, 4 * at_once, 8, 1.0, 1.0) for visual in (40, 144, 576) for at_once in (1, 4, 16)]
    told = []
    for load in loads:
        rate, first = load.simulated(true)
        told.append(Load(load.visual, load.at_once, load.number, load.answer, rate, first))
    found = fitted([load for load in told if load.at_once != 4], true.encode)
    for load in told:
        rate, first = load.simulated(found)
        assert rate == pytest.approx(load.rate, rel=0.08)
        assert first == pytest.approx(load.first, rel=0.2)
    assert found.prompt == pytest.approx(true.prompt, rel=0.05)


def test_a_fleet_is_as_large_as_it_must_be():
    times = Times(encode=0.02, other=0.0, step=0.01, prompt=0.0005, written=0.001)
    many, few = (sized(times, 32 + visual, 16, 1.0) for visual in (576, 72))
    assert isinstance(many, CellSize)
    assert isinstance(few, CellSize)
    assert max(many.most, few.most) <= 1.0
    engines, encoders = many.fleet(10_000)
    assert few.fleet(10_000)[0] < engines / 2
    assert engines / many.engines * many.rate >= 10_000
    assert encoders * many.engines == engines * many.encoders
    # an engine cannot do more than its steps allow, and an encoder no more than its pictures
    assert many.rate / many.engines < 1 / (608 * 0.0005)
    assert few.rate / few.encoders < 1 / 0.02
    assert sized(times, 608, 16, 0.1) is None  # the prompt alone takes longer


def test_predictions_of_the_measured_load():
    """Requests per second that the ledger has for 4 and 8 at once, from times fitted to 1 and 16: within 15 %."""
    loads, encode = loads_of(fleet.LEDGER)
    times = fitted([load for load in loads if load.at_once in (1, 16)], encode)
    between = [load for load in loads if load.at_once in (4, 8)]
    assert len(between) == 6
    for load in between:
        assert load.simulated(times)[0] == pytest.approx(load.rate, rel=0.15), load


@pytest.mark.parametrize(
    "wrong", [{"encode": -1}, {"prompt": float("nan")}, {"running": 0}, {"step": 0, "prompt": 0}, {"batched": "many"}]
)
def test_times_that_cannot_be(wrong):
    with pytest.raises(InputError):
        Times(**{"encode": 0.1, "other": 0, "step": 0.01, "prompt": 0.001, "written": 0.001, **wrong})


def test_what_is_no_ledger(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"rows": []}))
    for name in ("a.json", "gone.json"):
        with pytest.raises(InputError, match=r"no ledger of benchmarks\.serving"):
            loads_of(tmp_path / name)
        with pytest.raises(InputError, match="expected a JSON object with encode"):
            fleet._read(tmp_path / name)


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (["--rate", "nan"], "--rate nan"),
        (["--rate", "inf"], "--rate inf"),
        (["--rate", "0"], "--rate 0"),
        (["--rate", "-1"], "--rate -1"),
        (["--tokens", "many"], "--tokens 'many'"),
        (["--tokens", "-5"], "--tokens '-5'"),
        (["--times", "/gone.json"], "no service times"),
        (["--json", "/dev/null/out.json"], "cannot be written"),
    ],
)
def test_bad_options_are_refused_at_once(asked, told):
    """One sentence on stderr, before anything is simulated."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.fleet", *asked], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert told in done.stderr
