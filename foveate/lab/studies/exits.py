"""What learnt exits of visual tokens cost and save: ``python -m foveate.lab.studies.exits``. What docs/trained.md says of DyVTE.

Every prompt is read once in full, and goes on after each decoder layer with its text alone: the answers of all exits are then
known, and with them those of any gates, of fixed exits, and of the same exits dealt out among the questions at random, which tells
whether the gates know something of the question.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from torch.utils.data import Dataset

from ...api import attach
from ...loading import POCKET, load
from ...methods.registry import get
from ...pocket.questions import QUESTION_KINDS
from ...training.batches import Collator, Sample
from ...training.prepared import Prepared
from ..progress import bar
from ..scores import Scores
from ..tables import markdown_table, points
from ..testset import SEED, TestSet

GATES = "dyvte"


class Asked(Dataset[Sample]):
    """The questions of a test set with their answers, each a conversation of its own."""

    def __init__(self, data: TestSet) -> None:
        self.data, self.asked = data, data.asked

    def __len__(self) -> int:
        return len(self.asked)

    def __getitem__(self, index: int) -> Sample:
        scene, question = self.asked[index]
        parts = [{"type": "image"}, {"type": "text", "text": question.text}]
        answer = [{"type": "text", "text": question.answer}]
        messages = ({"role": "user", "content": parts}, {"role": "assistant", "content": answer})
        return Sample(messages, (Image.fromarray(self.data.scenes[scene].image),), f"question {index}")


def prepared(weights: str, data: TestSet, folder: Path, model: str = POCKET) -> tuple[NDArray[Any], NDArray[Any]]:
    """Probabilities [Q, L - 1] that visual tokens leave before layers 1 to L - 1, and right answers [Q, L], all tokens first.

    Parameters
    ----------
    weights : of gates.
    folder : keeps what was computed; it belongs to one test set.
    """
    loaded, err = load(model), Console(stderr=True, highlight=False)
    method: Any = get(GATES, weights=weights)
    with attach(loaded.model, method):
        rows = Prepared(method, loaded.model, Asked(data), Collator(loaded), folder, err.print).rows
        layers = range(1, rows["inputs"].shape[1] + 1)
        with torch.no_grad():
            leave = [method.module(rows["inputs"][:, layer - 1], layer).softmax(-1)[:, 1] for layer in bar(layers, "gates")]
    return torch.stack(leave, 1).numpy(), rows["right"].numpy()


def first_exits(leave: NDArray[Any], threshold: float) -> NDArray[Any]:
    """[Q] the first layer before which a gate lets tokens leave; 0 = none does."""
    fires = leave > threshold
    return np.where(fires.any(1), 1 + fires.argmax(1), 0)


def outcome(exits: NDArray[Any], right: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """[Q] whether answers are right, and [Q] how many decoder layers run with pictures."""
    layers = right.shape[1]
    return right[np.arange(len(right)), exits], np.where(exits == 0, layers, exits)


def lines(leave: NDArray[Any], right: NDArray[Any], thresholds: dict[str, float], scores: Scores) -> list[str]:
    """The table in Markdown."""
    layers, whole = right.shape[1], right[:, 0]
    rows = [("all tokens", np.zeros(len(right), int))]
    rows += [(f"all leave before layer {layer}", np.full(len(right), layer)) for layer in range(1, layers)]
    for name, threshold in thresholds.items():
        exits = first_exits(leave, threshold)
        rows.append((f"gates, {name}", exits))
        rows.append(("the same exits, shuffled", np.random.default_rng(0).permutation(exits)))
    cells = []
    for name, exits in rows:
        correct, ran = outcome(exits, right)
        right_of = "{:.1f} [{:.1f}, {:.1f}]".format(*(100 * value for value in scores.interval(correct.astype(float))))
        change = points(scores.difference(correct, whole)) if exits.any() else ""
        share = f"{100 * (1 - ran.mean() / layers):.1f} %"
        cells.append([name, right_of, change, f"{ran.mean():.2f}", share])
    found = markdown_table(["", "right, %", "points [95 %]", "layers with pictures", "fewer"], cells)
    ran = outcome(first_exits(leave, next(iter(thresholds.values()))), right)[1]
    families = [family for family in QUESTION_KINDS if (scores.families == family).any()]
    mean = [f"{ran[scores.families == family].mean():.1f}" for family in families]
    return [*found, "", *markdown_table(["layers with pictures of", *families], [["gates", *mean]])]


def main(
    folder: Annotated[Path, typer.Argument(help="Keeps what was computed.")],
    weights: Annotated[str, typer.Option(help="Of gates: a folder, or pocket for those that are shipped.")] = POCKET,
    scenes: Annotated[int, typer.Option(min=2, help="Scenes to draw.")] = 501,
    each: Annotated[int, typer.Option(min=1, help="Questions about each.")] = 2,
    seed: Annotated[int, typer.Option(help="Seed of the scenes.")] = SEED,
    split: Annotated[str, typer.Option(help="test or validation.")] = "test",
) -> None:
    """Gates, fixed exits and shuffled exits on one set of questions."""
    data = TestSet.draw(scenes, seed, split).picked(each, seed)
    leave, right = prepared(weights, data, folder)
    threshold = getattr(get(GATES, weights=weights), "threshold", 0.5)
    thresholds = {f"threshold {threshold}": threshold, "argmax": 0.5}
    print("\n".join(lines(leave, right, thresholds, Scores.of(data))))


if __name__ == "__main__":
    typer.run(main)
