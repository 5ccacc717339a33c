"""``python -m benchmarks.tuning``: plans on test scenes, beside the best choice in hindsight."""

from __future__ import annotations

import json
from typing import Any

import foveate
from benchmarks.tuning import main

SETTINGS = {
    "nearly all": ("spatial", 0.9),
    "half": ("divprune", 0.5),
    "five tokens": ("sequential", 5),
    "seen early": ("random", 3),
}


def document(tolerance: float, plan: str) -> dict[str, Any]:
    trials = []
    for label, (method, budget) in SETTINGS.items():
        interval = None if label == "seen early" else [0.5, 0.9]
        described = foveate.get(method, budget=budget).described()
        trials.append({"setting": label, "method": described, "cost": {"ratio": 0.7, "interval": interval}})
    about = {"setting": plan, "seconds": 120, "data": {"examples": 100}, "score": "exact", "max_tokens": 5}
    saving = {"objective": "tokens", "saving": 0.1}
    return {"model": {"name": "pocket"}, "tolerance": tolerance, "bound": tolerance / 2, "saving": saving, "about": about} | {
        "trials": trials
    }


def test_hindsight_saves_most_of_what_is_within_the_tolerance(tmp_path):
    """Five tokens in a corner lose far more than 10 points of 30 questions, half of the tokens do not."""
    asked = {"small": document(0.1, "nearly all"), "large": document(0.99, "five tokens"), "none": document(0.001, "all tokens")}
    files = []
    for name, each in asked.items():
        files.append(tmp_path / f"{name}.json")
        files[-1].write_text(json.dumps(each))
    ledger = tmp_path / "ledger.json"
    main(files, scenes=30, rounds=6, store=tmp_path / "store", out=ledger)
    rows = {row["tolerance"]: row for row in json.loads(ledger.read_text())["rows"]}
    assert [*rows] == [0.001, 0.1, 0.99]
    small, large, none = rows[0.1], rows[0.99], rows[0.001]
    assert (small["plan"], small["hindsight"]) == ("nearly all", "half")
    assert abs(small["saving"] - 0.1) < 0.01
    assert abs(small["hindsight_saving"] - 0.5) < 0.01
    assert small["hindsight_loss"] <= 0.1
    assert (large["plan"], large["hindsight"]) == ("five tokens", "five tokens")
    assert large["loss"][0] > 0.1
    assert (none["plan"], none["saving"], none["loss"]) == ("all tokens", 0.0, [0.0, 0.0, 0.0])
