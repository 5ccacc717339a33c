"""What ``foveate tune`` chose, on test scenes that no tuning saw: ``python -m benchmarks.tuning plan-1.json plan-5.json``.

Beside each plan stands the best fixed choice in hindsight: of all settings that any of the tunings looked at closely, the one that
saves most of those that lose no more than the tolerance on the test scenes. It is no method anybody could use, and takes the
luckiest. All costs are measured together, in the same rounds.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from foveate.lab.own import drawn_examples
from foveate.lab.scores import Scores
from foveate.lab.scoring import score_of
from foveate.lab.tables import markdown_table
from foveate.loading import load
from foveate.measuring import ledger
from foveate.methods.base import Method
from foveate.methods.saved import restored
from foveate.places import write_text
from foveate.tuning.answers import AnswerBook
from foveate.tuning.costs import Costs

SEED = 2403  # of the test scenes
PROMPTS = 3  # on which costs are measured
HEADS = (
    "tolerance",
    "plan",
    "loss promised",
    "loss on the test",
    "saves",
    "hindsight",
    "its loss",
    "saves",
    "share of it",
    "minutes",
)


def looked_at(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """By label, the settings of a tuning whose cost was measured in rounds enough for an interval: those that came last."""
    closely = (trial for trial in document["trials"] if trial["cost"] is not None and trial["cost"]["interval"])
    return {trial["setting"]: trial["method"] for trial in closely}


def main(
    documents: Annotated[list[Path], typer.Argument(help="What 'foveate tune --json' printed, for one model.")],
    scenes: Annotated[int, typer.Option(min=10, help="Test scenes, with one question each.")] = 1500,
    rounds: Annotated[int, typer.Option(min=6)] = 9,
    batch: Annotated[int, typer.Option(min=1, help="Questions that are answered together.")] = 16,
    store: Annotated[Path | None, typer.Option(help="Results so far.")] = None,
    out: Annotated[Path | None, typer.Option("--json", help="Where to write the ledger.")] = None,
) -> None:
    """Losses and savings of plans on the test set."""
    console = Console(highlight=False)
    told = [json.loads(path.read_text()) for path in documents]
    told.sort(key=lambda document: document["tolerance"])
    loaded, about = load(told[0]["model"]["name"]), told[0]["about"]
    examples = drawn_examples(loaded, scenes, SEED, "test").items
    book = AnswerBook(loaded, examples, score_of(about["score"]), store, batch, about["max_tokens"])
    everything = [*range(len(examples))]
    settings: dict[str, Method] = {}
    for document in told:
        settings |= {label: restored(method) for label, method in looked_at(document).items()}
    full = book.ask(None, everything).scores
    losses = {}
    for number, (label, method) in enumerate(settings.items(), 1):
        console.print(f"{number} of {len(settings)}: {label}", style="dim")
        losses[label] = book.losses(method, everything)[0].values
    prompts = [book.questions.prompts.inputs([int(number)]) for number in np.linspace(0, len(examples) - 1, PROMPTS)]
    costs = Costs(loaded.model, prompts, told[0]["saving"]["objective"], 2).measure(settings, rounds)
    scores = Scores.grouped(np.array([each.kind for each in examples]), np.arange(len(examples)), len(examples))
    rows, cells = [], []
    for document in told:
        row = _row(document, losses, {label: cost.median for label, cost in costs.items()}, scores)
        rows.append(row)
        cells.append(_cells(row))
    table = Table(*HEADS)
    for line in cells:
        table.add_row(*line)
    console.print(table)
    console.print("\n".join(markdown_table(HEADS, cells, 2)), soft_wrap=True)
    if out is not None:
        about = {"benchmark": "tuning", "command": ledger.command("python -m benchmarks.tuning"), "versions": ledger.versions()}
        about |= {"machine": ledger.machine(loaded.model.device), "scenes": scenes, "all": float(full.mean()), "rows": rows}
        write_text(out, json.dumps(about, indent=1) + "\n")


def _row(document: dict[str, Any], losses: dict[str, Any], costs: dict[str, float], scores: Scores) -> dict[str, Any]:
    tolerance, label = document["tolerance"], document["about"]["setting"]
    kept = label not in losses
    within = [name for name, values in losses.items() if values.mean() <= tolerance and costs.get(name, 1.0) < 1]
    best = min(within, key=lambda name: costs[name], default=None)
    return {
        "model": document["model"]["name"],
        "tolerance": tolerance,
        "plan": label,
        "bound": document["bound"],
        "loss": (0.0, 0.0, 0.0) if kept else scores.interval(losses[label], paired=True),
        "saving": 0.0 if kept else 1 - costs[label],
        "hindsight": best,
        "hindsight_loss": None if best is None else float(losses[best].mean()),
        "hindsight_saving": 0.0 if best is None else 1 - costs[best],
        "minutes": document["about"]["seconds"] / 60,
        "examples": document["about"]["data"]["examples"],
    }


def _cells(row: dict[str, Any]) -> list[str]:
    mean, low, high = (100 * value for value in row["loss"])
    best, saves, most = row["hindsight"], row["saving"], row["hindsight_saving"]
    return [
        f"{100 * row['tolerance']:g}",
        row["plan"],
        f"< {100 * (row['bound'] or 0):.2f}",
        f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]",
        f"{saves:.0%}",
        best or "none",
        "" if best is None else f"{100 * row['hindsight_loss']:+.2f}",
        f"{most:.0%}",
        f"{saves / most:.0%}" if most > 0 else "",
        f"{row['minutes']:.1f}",
    ]


if __name__ == "__main__":
    typer.run(main)
