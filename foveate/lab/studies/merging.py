"""Does merging help? ``python -m foveate.lab.studies.merging``: PruMerge with and without it, beside uniform and random tokens.

A first study, on an earlier checkpoint of the pocket model, found that a selection without merging beats PruMerge's merging by 1 to
3 points at every budget, that PruMerge+ without merging is best from 16 tokens up, that uniform tokens win at half of all tokens,
and that PruMerge loses at reading. Here the same is asked of the shipped model, with paired intervals: every pair answers the same
questions.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from ...methods.base import Method
from ...methods.registry import get
from ...places import write_text
from ...pocket.questions import READING
from ..compare import COUNTS
from ..progress import bar
from ..runner import Outcome, Runner
from ..tables import points

SETTINGS = ("prumerge", "prumerge:paper", "prumerge:released", "prumerge+", "prumerge+:paper", "prumerge+:released")
Difference = tuple[float, float, float]


class Study:
    """Answers, and paired differences of them."""

    def __init__(self, runner: Runner, budgets: tuple[int, ...]) -> None:
        self.runner, self.budgets = runner, budgets
        self.reading = np.isin(runner.scores.families, READING)

    def outcome(self, name: str, budget: int | None, **fields: Any) -> Outcome:
        method: Method = get(name, budget=budget, **fields).per_image()
        return self.runner.outcome(method)

    def difference(self, a: Outcome, b: Outcome, reading: bool = False) -> Difference:
        """How much more of the questions a gets right than b, with its 95 % interval."""
        scores = self.runner.scores
        if reading:
            return scores.part(self.reading).difference(a.right[self.reading], b.right[self.reading])
        return scores.difference(a.right, b.right)

    def merging(self, name: str, budget: int | None) -> dict[str, Any]:
        """One setting with and without merging. Both keep equal counts, but where the sum of all dropped tokens is one more."""
        merged, chosen = self.outcome(name, budget), self.outcome(name, budget, merge=False)
        return {
            "method": name,
            "budget": budget,
            "tokens": merged.tokens,
            "accuracy": float(merged.right.mean()),
            "accuracy_unmerged": float(chosen.right.mean()),
            "merging": self.difference(merged, chosen),
            "merging_reading": self.difference(merged, chosen, reading=True),
        }

    def beside(self, budget: int) -> dict[str, Any]:
        """Selections without merging against uniform and random tokens at the same count."""
        row: dict[str, Any] = {"budget": budget}
        base = {name: self.outcome(name, budget) for name in ("spatial", "random")}
        for name in ("prumerge", "prumerge+"):
            for merge in (True, False):
                mine = self.outcome(name, budget, merge=merge)
                label = name + ("" if merge else ", unmerged")
                row[label] = {other: self.difference(mine, outcome) for other, outcome in base.items()}
                row[label]["spatial, reading"] = self.difference(mine, base["spatial"], reading=True)
        return row


def main(
    scenes: Annotated[int, typer.Option(help="Test scenes to draw.")] = 501,
    budgets: Annotated[str, typer.Option(help="Visual tokens to keep.")] = ",".join(map(str, COUNTS)),
    store: Annotated[Path, typer.Option(help="Results so far, as of 'foveate compare'.")] = Path("foveate-compare.json"),
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all numbers as JSON.")] = None,
) -> None:
    """Paired differences, in points [95 %]."""
    console = Console(width=160)
    study = Study(Runner(scenes, each=99, store=store), tuple(map(int, budgets.split(","))))
    jobs = [(name, budget) for name in SETTINGS for budget in (*study.budgets, None)]
    rows = [study.merging(*job) for job in bar(jobs, "merging")]
    beside = [study.beside(budget) for budget in bar(study.budgets, "beside")]
    table = Table(title=f"what merging adds to the same choice of tokens, points [95 %], {len(study.runner.data.asked)} questions")
    for head in ("method", "tokens", "unmerged, %", "merging adds", "to reading"):
        table.add_column(head, justify="left" if head == "method" else "right")
    for row in rows:
        shown = row["method"] + ("" if row["budget"] else " (own count)")
        cells = [f"{row['tokens']:.0f}", f"{100 * row['accuracy_unmerged']:.1f}"]
        table.add_row(shown, *cells, points(row["merging"]), points(row["merging_reading"]))
    console.print(table)
    table = Table(title="against uniform and random tokens, points [95 %]")
    for head in ("tokens", "method", "minus spatial", "minus random", "minus spatial at reading"):
        table.add_column(head, justify="left" if head == "method" else "right")
    for line in beside:
        for label, found in line.items():
            if label != "budget":
                differences = [points(found[name]) for name in ("spatial", "random", "spatial, reading")]
                table.add_row(str(line["budget"]), label, *differences)
    console.print(table)
    if json_file is not None:
        write_text(json_file, json.dumps({**study.runner.setting, "merging": rows, "beside": beside}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
