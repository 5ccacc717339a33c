"""Accuracy of methods that act inside the decoder: ``python -m foveate.lab.studies.inside``.

Such methods choose by the question, so every question is a prompt of its own, answered by ``generate`` with the method attached.
Baselines before the projector stand beside each at the count that reaches the last layer, and at the mean count over layers, which
is what the decoder pays for.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from ...errors import InputError
from ...loading import POCKET
from ...methods.base import Method
from ...methods.compose import Compose
from ...methods.registry import get
from ...places import write_text
from ...pocket.questions import READING
from ..progress import bar
from ..runner import Outcome, Runner, nearby
from ..testset import SEED

SHARES = (0.125, 0.25, 0.5)
COMPARED = ("spatial", "random")  # run beside every setting
BESIDE = (*COMPARED, "pool", "vtc-cls", "fastervlm", "inflection", "aim-merge", "prumerge+")  # before the projector
RESIZED = (64, 144, 289)  # squares
INSIDE = ("fastv", "text-relevance", "pyramiddrop", "sparsevlm", "iti", "aim")
OWN = ("iti", "iti:paper", "text-relevance", "sparsevlm", "sparsevlm:paper", "pyramiddrop", "aim", "yopo")


@dataclass(frozen=True)
class Setting:
    """One row of the table: ``share`` of the visual tokens is left in the last layer, None = the method's own rule."""

    name: str
    share: float | None
    method: Method


def settings(runner: Runner, plan: Path | None) -> list[Setting]:
    """Everything that acts inside the decoder, at fixed shares and at its own rule."""
    rows = []
    for share in SHARES:
        count = round(runner.total * share)
        rows += [Setting(name, share, get(name).at_budget(count, runner.total, runner.layers, at="last")) for name in INSIDE]
        if share < 0.5:
            rows.append(Setting("prumerge+ & fastv", share, Compose(get("prumerge+", budget=2 * share), get("fastv", budget=0.5))))
    rows += [Setting(name, None, get(name)) for name in OWN]
    rows += [Setting("yopo, window only", None, get("yopo", layer_cut=runner.layers, neurons=1.0))]
    rows += [Setting("yopo, neurons only", None, get("yopo", layer_cut=runner.layers, window=None))]
    rows += [Setting("p-sigmoid", None, get("p-sigmoid", budget=budget)) for budget in (0.375, 0.5)]
    if plan is not None:
        rows.append(Setting("g-search", None, get("g-search", plan=str(plan))))
    return rows


def measure(runner: Runner, plan: Path | None) -> list[dict[str, Any]]:
    """One entry per setting, with baselines at the counts of every row: accuracy, its interval, and paired differences."""
    found: list[tuple[str, float | None, Outcome]] = []
    for setting in bar(settings(runner, plan), "inside the decoder"):
        found.append((setting.name, setting.share, runner.outcome(setting.method)))
    shares = {round(runner.total * share) for share in SHARES}
    means = shares | {nearby(outcome.mean) for *_, outcome in found}
    jobs = [(name, count) for name in BESIDE for count in sorted(means if name in COMPARED else shares)]
    jobs += [("resize", count) for count in RESIZED]
    beside = {}
    for name, count in bar(jobs, "beside"):
        beside[name, count] = runner.outcome(get(name, budget=count))
    found += [(name, None, outcome) for (name, _), outcome in beside.items()]
    full, scores = runner.outcome(None), runner.scores
    found.append(("all tokens", None, full))
    reading = np.isin(scores.families, READING)

    def entry(name: str, share: float | None, outcome: Outcome) -> dict[str, Any]:
        row: dict[str, Any] = {"name": name, "share": share, "first": outcome.tokens, "last": outcome.layers[-1]}
        row["mean"] = outcome.mean
        row["accuracy"], row["low"], row["high"] = scores.interval(outcome.right)
        row["minus_full"] = scores.difference(outcome.right, full.right)
        row["reading"] = float(outcome.right[reading].mean())
        for base in COMPARED:
            other = beside.get((base, nearby(outcome.mean)))
            row[f"minus_{base}"] = None if other is None else scores.difference(outcome.right, other.right)
        return row

    return sorted((entry(*each) for each in found), key=lambda row: (row["mean"], row["name"]))


def show(rows: list[dict[str, Any]]) -> Table:
    shown = Table(title="accuracy in % [95 %]; differences are paired, in points")
    columns = ("method", "layer 0", "last layer", "mean", "accuracy", "minus all", "minus random", "minus spatial", "reading")
    for column in columns:
        shown.add_column(column, justify="left" if column == "method" else "right")
    for row in rows:
        cells = [row["name"] + ("" if row["share"] is None else f" {row['share']:.1%}")]
        cells += [f"{row[part]:.0f}" for part in ("first", "last", "mean")]
        cells.append(f"{100 * row['accuracy']:.1f} [{100 * row['low']:.1f}, {100 * row['high']:.1f}]")
        for part in ("minus_full", "minus_random", "minus_spatial"):
            cells.append("" if row[part] is None else "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * d for d in row[part])))
        shown.add_row(*cells, f"{100 * row['reading']:.1f}")
    return shown


def main(
    scenes: Annotated[int, typer.Option(help="Test scenes to draw.")] = 501,
    each: Annotated[int, typer.Option(help="Questions per scene.")] = 2,
    seed: Annotated[int, typer.Option(help="Seed of the test set.")] = SEED,
    split: Annotated[str, typer.Option(help="test or validation.")] = "test",
    model: Annotated[str, typer.Option(help="Hub id or folder.")] = POCKET,
    plan: Annotated[Path | None, typer.Option(help="Plan of 'foveate search' for g-search.")] = None,
    store: Annotated[Path, typer.Option(help="Results so far; an interrupted run goes on from there.")] = Path("inside.jsonl"),
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the table as JSON.")] = None,
) -> None:
    """Accuracy of methods inside the decoder on the pocket model, beside baselines."""
    if split not in ("test", "validation"):
        raise InputError(f"--split {split!r}; choose test or validation")
    runner = Runner(scenes, each, seed, store, model=model, split=split)
    rows = measure(runner, plan)
    Console(width=160).print(show(rows))
    if json_file is not None:
        document = {"scenes": scenes, "questions": len(runner.data.asked), "rows": rows}
        write_text(json_file, json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
