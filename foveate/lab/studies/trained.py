"""Methods with the weights and adapters that they were trained with, side by side: ``python -m foveate.lab.studies.trained``.

What docs/trained.md says of methods that are trained on answers. Every row answers the same questions, so that differences are
paired.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ...errors import InputError
from ...loading import POCKET, load
from ...methods.base import Method
from ...places import ready_folder, write_text
from ...pocket.questions import READING
from ...tokens import Question, VisualTokens
from ..progress import bar
from ..runner import Outcome, Runner
from ..scores import Scores
from ..tables import markdown_table, points
from .selectors import method_of


def row_of(text: str) -> tuple[Method | None, str]:
    """Method and model of a row: ``pool budget=36 @ FOLDER-OF-AN-ADAPTER``; the model is pocket where none is named."""
    first, _, model = text.partition("@")
    return None if first.strip() == "full" else method_of(first.strip()), model.strip() or POCKET


@contextmanager
def other_questions(method: Method) -> Iterator[Method]:
    """A method that reads, of each prompt, the question of another one of its batch; the decoder answers the right one.

    Raises
    ------
    InputError : it reads no question.
    """
    front: Any = method.before_decoder()
    if not front.reads_question:
        raise InputError(f"{front.name} reads no question, so that it can read no wrong one")
    kind: Any = type(front)
    original = kind.reduce

    def reduce(self: Any, tokens: VisualTokens) -> Any:
        return original(self, replace(tokens, question=turned(tokens.question)))

    kind.reduce = reduce
    try:
        yield method
    finally:
        kind.reduce = original


def turned(question: Question | None) -> Question | None:
    """Each question in the place of the next one.

    Raises
    ------
    InputError : there is no next one.
    """
    if question is None:
        return None
    if len(question.text) < 2:
        raise InputError("a batch of one question has no other one that could be read instead. Ask about other numbers of scenes.")
    state = None if question.state is None else question.state.roll(1, 0)
    return replace(question, text=question.text.roll(1, 0), valid=question.valid.roll(1, 0), state=state)


@torch.no_grad()
def outcomes(
    rows: list[str], wrong: list[str], scenes: int, each: int, split: str, store: Path
) -> tuple[dict[str, Outcome], Scores]:
    """By row, how it did. Rows of one model follow one another, as its pictures are encoded once."""
    found: dict[str, Outcome] = {}
    models = dict.fromkeys(row_of(row)[1] for row in (*rows, *wrong))
    scores: Scores | None = None
    for model in models:
        name = re.sub(r"\W+", "-", model).strip("-")
        runner = Runner(scenes, each, store=store / f"{name}.json", model=load(model, dtype="float32"), split=split)
        scores = runner.scores
        for row in bar([row for row in rows if row_of(row)[1] == model], model):
            found[row] = runner.outcome(row_of(row)[0])
        for row in bar([row for row in wrong if row_of(row)[1] == model], f"{model}, with other questions"):
            method = row_of(row)[0]
            if method is None:
                raise InputError("all tokens read no question, so that they can read no wrong one")
            with other_questions(method):
                result = runner.asker.run(method)
            found[f"{row}, wrong question"] = Outcome(result.right.astype(float), tuple(result.layers), 0.0)
    if scores is None:
        raise InputError("there is no row. Name some, separated by semicolons.")
    return {row: found[row] for row in sorted(found, key=lambda row: place(row, rows))}, scores


def place(row: str, rows: list[str]) -> tuple[int, int]:
    """Where a row stands; one with wrong questions after that with the right ones."""
    plain = row.removesuffix(", wrong question")
    return (rows.index(plain) if plain in rows else len(rows), int(plain != row))


def main(
    rows: Annotated[str, typer.Argument(help="Rows separated by semicolons: method, its fields, and after @ a model.")],
    wrong: Annotated[str, typer.Option(help="Rows that are also asked with the question of another prompt.")] = "",
    scenes: Annotated[int, typer.Option(min=2, help="Scenes to draw.")] = 501,
    each: Annotated[int, typer.Option(min=1, help="Questions about each.")] = 2,
    split: Annotated[str, typer.Option(help="test or validation.")] = "test",
    store: Annotated[Path, typer.Option(help="Folder of results so far.")] = Path("foveate-trained"),
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all numbers as JSON.")] = None,
) -> None:
    """Accuracies with intervals, and paired differences to the first row."""
    names, others = ([part.strip() for part in text.split(";") if part.strip()] for text in (rows, wrong))
    found, scores = outcomes(names, others, scenes, each, split, ready_folder(store))
    first = next(iter(found))
    table, document = [], {}
    for row, outcome in found.items():
        accuracy, families = scores.interval(outcome.right), scores.per_family(outcome.right)
        difference = None if row == first else scores.difference(outcome.right, found[first].right)
        read = [families[family] for family in READING if family in families]
        reading = sum(read) / len(read) if read else math.nan
        shown = "{:.1f} [{:.1f}, {:.1f}]".format(*(100 * value for value in accuracy))
        table.append([f"`{row}`", f"{outcome.mean:.1f}", shown, points(difference), f"{100 * reading:.1f}"])
        document[row] = {"tokens": outcome.mean, "accuracy": accuracy, "families": families}
    pairs = {f"{a} - {b}": scores.difference(found[a].right, found[b].right) for a in found for b in found if a != b}
    typer.echo(f"{len(scores.families)} questions about {scenes} scenes ({split})\n")
    typer.echo("\n".join(markdown_table(["", "tokens", "right, % [95 %]", f"minus {first}", "reading, %"], table)))
    if json_file is not None:
        write_text(json_file, json.dumps({"rows": document, "differences": pairs}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
