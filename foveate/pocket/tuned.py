"""What fine-tuning with a method attached gains: ``python -m foveate.pocket.tuned``.

Table 6 of arXiv 2403.15388 in small, on thousands of questions about unseen scenes: the shipped model and the fine-tuned one, each
with all visual tokens and with the method.
"""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from ..engine.anatomy import innermost
from ..evaluation.loading import load
from ..methods.base import get
from . import NAME
from .claims import GROUPS
from .evaluate import SEED, Evaluator, Result, Scores, TestSet

HEADS = ("questions", "number", "all tokens", "{method}", "tuned, all tokens", "tuned, {method}", "gain", "gain, all tokens")


def results(model: str, method: str, data: TestSet) -> list[Result]:
    """Answers of the shipped model and of another one, each with all tokens and with a method."""
    found = []
    for name in (NAME, model):
        evaluator = Evaluator(innermost(load(name, dtype="float32").model), data)
        found += [evaluator.run(None), evaluator.run(get(method).before_decoder())]
    return found


def table(found: list[Result], data: TestSet, method: str) -> Table:
    """Right answers in %, and what fine-tuning gains in points, paired, with 95 % intervals."""
    tokens = [sum(result.tokens) / len(result.tokens) for result in (found[1], found[3])]
    shown = Table(title=f"{len(data.scenes)} scenes; {method} leaves {tokens[0]:.1f} tokens, {tokens[1]:.1f} of the tuned model's")
    for number, head in enumerate(HEADS):
        shown.add_column(head.format(method=method), justify="left" if number == 0 else "right")
    families = data.column(lambda _, q: q.family)
    for group, members in GROUPS.items():
        mine = [name in members for name in families]
        scores = Scores.of(data)
        part = Scores(scores.families[mine], scores.scene[mine], scores.resamples)
        right = [result.right[mine] for result in found]
        gains = [part.difference(right[3], right[1]), part.difference(right[2], right[0])]
        cells = [f"{100 * each.mean():.1f}" for each in right]
        cells += ["{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * value for value in gain)) for gain in gains]
        shown.add_row(group, str(len(right[0])), *cells)
    return shown


def tuned(
    model: Annotated[str, typer.Option(help="Folder of an adapter; the shipped one by default.")] = f"{NAME}+prumerge",
    method: Annotated[str, typer.Option(help="Name of the method, as listed by 'foveate methods'.")] = "prumerge",
    scenes: Annotated[int, typer.Option(min=2, help="Test scenes to draw.")] = 501,
    seed: Annotated[int, typer.Option(help="Seed of the test set.")] = SEED,
) -> None:
    """Compare the shipped model with a fine-tuned one, with all tokens and with a method."""
    data = TestSet.draw(scenes, seed)
    out = Console(highlight=False)
    (out if out.is_terminal else Console(width=150, highlight=False)).print(table(results(model, method, data), data, method))


if __name__ == "__main__":
    typer.run(tuned)
