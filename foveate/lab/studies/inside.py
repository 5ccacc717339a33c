"""Accuracy of methods that act inside the decoder: ``python -m foveate.lab.studies.inside``.

Such methods choose by the question, so every question is a prompt of its own, answered by ``generate`` with the method attached.
Baselines before the projector stand beside each at the count that reaches the last layer, and at the mean count over layers, which
is what the decoder pays for.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from ...methods.base import Method
from ...methods.compose import Compose
from ...methods.registry import get
from ...pocket import load_pocket
from ...pocket.batches import normalise
from ...pocket.questions import PocketQuestion
from ...pocket.vocabulary import EOS, PAD, encode
from ..evaluate import SEED, Evaluator, Scores, TestSet

LONGEST = 5  # tokens of an answer, its end included
SHARES = (0.125, 0.25, 0.5)
COMPARED = ("spatial", "random")  # run beside every setting
BESIDE = (*COMPARED, "pool", "vtc-cls", "fastervlm", "inflection", "aim-merge", "prumerge+")  # before the projector
RESIZED = (64, 144, 289)  # squares


@dataclass(frozen=True)
class Setting:
    """One row of the table: ``share`` of the visual tokens is left in the last layer, None = the method's own rule."""

    name: str
    share: float | None
    method: Method


def settings(plan: Path | None) -> list[Setting]:
    """Everything that acts inside the decoder, at fixed shares and at its own rule."""
    rows = []
    for share in SHARES:
        stage = [round(576 * share ** (k / 3)) for k in (1, 2, 3)]
        rows += [
            Setting("fastv", share, get("fastv", budget=share)),
            Setting("text-relevance", share, get("text-relevance", budget=share)),
            Setting("pyramiddrop", share, get("pyramiddrop", ratio=share ** (1 / 3))),
            Setting("sparsevlm", share, get("sparsevlm", counts=tuple(stage))),
            Setting("iti", share, get("iti", budget=share**0.5, second=share**0.5)),
            Setting("aim", share, get("aim", budget=share)),
        ]
        if share < 0.5:
            both = Compose(get("prumerge+", budget=2 * share), get("fastv", budget=0.5))
            rows.append(Setting("prumerge+ & fastv", share, both))
    rows += [Setting(name, None, get(name)) for name in ("iti", "iti:paper", "text-relevance", "sparsevlm", "sparsevlm:paper")]
    rows += [Setting(name, None, get(name)) for name in ("pyramiddrop", "aim", "yopo")]
    rows += [Setting("yopo, window only", None, get("yopo", layer_cut=6, neurons=1.0))]
    rows += [Setting("yopo, neurons only", None, get("yopo", layer_cut=6, window=None))]
    rows += [Setting("p-sigmoid", None, get("p-sigmoid", budget=budget)) for budget in (0.375, 0.5)]
    if plan is not None:
        rows.append(Setting("g-search", None, get("g-search", plan=str(plan))))
    return rows


class Asker:
    """Some questions about each scene, as prompts of their own."""

    def __init__(self, model: Any, data: TestSet, each: int, seed: int, chunk: int = 16) -> None:
        self.model, self.data, self.chunk = model, data, chunk
        self.tokens = int(model.config.image_seq_length)
        random, first = Random(f"ask/{seed}"), 0
        self.picked: list[int] = []  # among all questions of the test set
        self.asked: list[tuple[int, PocketQuestion]] = []
        for number, questions in enumerate(data.questions):
            for i in sorted(random.sample(range(len(questions)), min(each, len(questions)))):
                self.picked.append(first + i)
                self.asked.append((number, questions[i]))
            first += len(questions)

    def inputs(self, part: Sequence[tuple[int, PocketQuestion]]) -> dict[str, Tensor]:
        """Prompts, padded on the left."""
        front, image = encode("<s> user:"), [int(self.model.config.image_token_id)] * self.tokens
        rows = [[*front, *image, *encode(f"{question.text} assistant:")] for _, question in part]
        width = max(map(len, rows))
        ids = torch.tensor([[PAD] * (width - len(row)) + row for row in rows], device=self.model.device)
        pixels = normalise([self.data.scenes[number].image for number, _ in part]).to(self.model.device, self.model.dtype)
        return {"input_ids": ids, "attention_mask": (ids != PAD).long(), "pixel_values": pixels}

    def run(self, method: Method) -> dict[str, Any]:
        """Answers right [questions], visual tokens per image in the first and last layer, on average over layers, and seconds."""
        right: list[bool] = []
        layers = np.zeros(int(self.model.config.text_config.num_hidden_layers))
        begin = time.perf_counter()
        with method(self.model) as session:
            for start in range(0, len(self.asked), self.chunk):
                part = self.asked[start : start + self.chunk]
                inputs = self.inputs(part)
                out = self.model.generate(**inputs, max_new_tokens=LONGEST, do_sample=False)[:, inputs["input_ids"].shape[1] :]
                wanted = [[*encode(question.answer), EOS] for _, question in part]
                right += [row[: len(answer)].tolist() == answer for row, answer in zip(out, wanted, strict=True)]
                layers += session.report.layers
        each = (layers / len(self.asked)).tolist()
        return {
            "right": [int(value) for value in right],
            "layers": each,
            "mean": float(np.mean(each)),
            "seconds": time.perf_counter() - begin,
        }


def nearby(mean: float) -> int:
    """The count at which baselines are run beside a mean over layers: the nearest multiple of 12."""
    return max(12, 12 * round(mean / 12))


def measure(asker: Asker, plan: Path | None, store: Path, console: Console) -> dict[str, Any]:
    """Run what ``store`` does not hold yet, and baselines at the counts of every row."""
    held: dict[str, Any] = json.loads(store.read_text()) if store.exists() else {}

    def keep(key: str, value: Any) -> None:
        held[key] = value
        store.parent.mkdir(parents=True, exist_ok=True)
        store.write_text(json.dumps(held))

    rows, evaluator = settings(plan), Evaluator(asker.model, asker.data)
    for row in track(rows, "inside the decoder", console=console, transient=True):
        key = f"{row.name}@{row.share or 'own'}@{json.dumps(row.method.settings(), sort_keys=True)}"
        if key not in held:
            keep(key, asker.run(row.method))
        held[key] |= {"name": row.name, "share": row.share}
    used = [held[f"{row.name}@{row.share or 'own'}@{json.dumps(row.method.settings(), sort_keys=True)}"] for row in rows]
    shares = {round(576 * share) for share in SHARES}
    means = shares | {nearby(row["mean"]) for row in used}
    picked = np.array(asker.picked)
    for name in BESIDE:
        for count in track(sorted(means if name in COMPARED else shares), name, console=console, transient=True):
            if f"{name}@{count}" not in held:
                result = evaluator.run(get(name, budget=count).before_decoder())
                keep(f"{name}@{count}", result.right[picked].astype(int).tolist())
    for count in RESIZED:
        if f"resize@{count}" not in held:
            result = evaluator.run(get("resize", budget=count).before_decoder())
            keep(f"resize@{count}", result.right[picked].astype(int).tolist())
    if "all" not in held:
        keep("all", evaluator.run(None).right[picked].astype(int).tolist())
    return {"rows": used, "held": held}


def table(asker: Asker, found: dict[str, Any], resamples: int = 2000) -> list[dict[str, Any]]:
    """One entry per setting: accuracy with its interval, and paired differences to all tokens and to baselines."""
    scenes = np.array([number for number, _ in asker.asked])
    _, scene = np.unique(scenes, return_inverse=True)
    number = int(scene.max()) + 1
    drawn = np.random.default_rng(0).multinomial(number, np.full(number, 1 / number), size=resamples)
    scores = Scores(np.array([question.family for _, question in asker.asked]), scene, drawn)
    held, full = found["held"], np.array(found["held"]["all"], bool)
    reading = np.isin(scores.families, ("word", "number", "digit"))

    def entry(name: str, share: float | None, right: NDArray[np.bool_], layers: list[float]) -> dict[str, Any]:
        mean = float(np.mean(layers))
        row: dict[str, Any] = {"name": name, "share": share, "first": layers[0], "last": layers[-1], "mean": mean}
        row["accuracy"], row["low"], row["high"] = scores.interval(right)
        row["minus_full"], row["reading"] = scores.difference(right, full), float(right[reading].mean())
        for base in COMPARED:
            beside = held.get(f"{base}@{nearby(mean)}")
            row[f"minus_{base}"] = None if beside is None else scores.difference(right, np.array(beside, bool))
        return row

    rows = [entry(row["name"], row["share"], np.array(row["right"], bool), row["layers"]) for row in found["rows"]]
    for key, value in held.items():
        name, _, count = key.partition("@")
        if name in (*BESIDE, "resize"):
            rows.append(entry(name, None, np.array(value, bool), [float(count)] * 6))
    rows.append(entry("all tokens", None, full, [576.0] * 6))
    return sorted(rows, key=lambda row: (row["mean"], row["name"]))


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
    plan: Annotated[Path | None, typer.Option(help="Plan of 'foveate search' for g-search.")] = None,
    store: Annotated[Path, typer.Option(help="Results so far; an interrupted run goes on from there.")] = Path("inside-store.json"),
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the table as JSON.")] = None,
) -> None:
    """Accuracy of methods inside the decoder on the pocket model, beside baselines."""
    asker = Asker(load_pocket()[0], TestSet.draw(scenes, seed, split), each, seed)
    rows = table(asker, measure(asker, plan, store, Console(stderr=True)))
    Console(width=160).print(show(rows))
    if json_file is not None:
        json_file.write_text(json.dumps({"scenes": scenes, "questions": len(asker.asked), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
