"""What fine-tuning with a method attached gains: ``python -m foveate.lab.studies.tuned``.

Table 6 of arXiv 2403.15388 in small, on thousands of questions about unseen scenes: the shipped model and the fine-tuned one, each
with all visual tokens, with the method, and with as many tokens that are uniformly spread (``spatial``).
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from ...loading import load
from ...methods.registry import get
from ...pocket import NAME
from ...pocket.questions import QUESTION_KINDS
from ..claims import GROUPS
from ..evaluate import EVERY
from ..progress import bar
from ..runner import Outcome, Runner
from ..scores import Scores
from ..testset import SEED


def results(model: str, method: str, scenes: int, seed: int) -> tuple[dict[str, list[Outcome]], Scores]:
    """By what was kept, the answers of the shipped model and of another one; and how they are scored."""
    found: dict[str, list[Outcome]] = {}
    for name in bar((NAME, model), "models"):
        runner = Runner(scenes, EVERY, seed, model=load(name, dtype="float32"))
        mine = {"all tokens": runner.outcome(None), method: runner.outcome(get(method))}
        mine["spatial"] = runner.outcome(get("spatial", budget=round(mine[method].tokens)))
        for kept, outcome in mine.items():
            found.setdefault(kept, []).append(outcome)
    return found, runner.scores


def table(found: dict[str, list[Outcome]], scores: Scores, scenes: int) -> Table:
    """Right answers in % of both models, and what fine-tuning gains in points: paired, with 95 % intervals."""
    shown = Table(title=f"{scenes} scenes, {len(scores.families)} questions: right before -> after, in %", title_justify="left")
    shown.add_column("questions")
    for kept, (_, after) in found.items():
        shown.add_column(f"{kept}, {after.tokens:.0f}", justify="right")
    for group, members in {**{family: (family,) for family in QUESTION_KINDS}, **GROUPS}.items():
        mask = np.isin(scores.families, members)
        part, cells = Scores(scores.families[mask], scores.scene[mask], scores.resamples), []
        for before, after in found.values():
            old, new = before.right[mask], after.right[mask]
            gain = "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * value for value in part.difference(new, old)))
            cells.append(f"{100 * old.mean():.1f} -> {100 * new.mean():.1f}  {gain}")
        shown.add_row(group, *cells)
    return shown


def tuned(
    model: Annotated[str, typer.Option(help="Folder of an adapter; the shipped one by default.")] = f"{NAME}+prumerge",
    method: Annotated[str, typer.Option(help="Name of the method, as listed by 'foveate methods'.")] = "prumerge",
    scenes: Annotated[int, typer.Option(min=2, help="Test scenes to draw.")] = 501,
    seed: Annotated[int, typer.Option(help="Seed of the test set.")] = SEED,
) -> None:
    """Compare the shipped model with a fine-tuned one, with all tokens and with a method."""
    out = Console(highlight=False)
    (out if out.is_terminal else Console(width=150, highlight=False)).print(table(*results(model, method, scenes, seed), scenes))


if __name__ == "__main__":
    typer.run(tuned)
