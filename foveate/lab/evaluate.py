"""Accuracy of the pocket model against kept tokens: ``python -m foveate.lab.evaluate``.

The paper's comparison of sampling strategies and of its two modules (Tables 4 and 5 of arXiv 2403.15388) in small, at equal counts,
on unseen scenes. Pictures are encoded and reduced by the engine; all questions of a picture are then answered in one forward,
which is right exactly where greedy decoding gives the expected answer (a test compares the two).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
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

from ..engine.model.anatomy import Anatomy, anatomy
from ..engine.vision.encoding import EncodedPictures, encode, reduce, unchanged
from ..engine.vision.front import check_front, encode_and_reduce
from ..errors import InputError
from ..methods.base import FrontReducer, ProjectorReducer
from ..methods.prumerge import PruMerge
from ..methods.registry import get
from ..methods.tools.scoring import cls_attention
from ..pocket import load_pocket
from ..pocket.answers import text_states
from ..pocket.batches import IGNORE, collate_text, normalise, text_rows
from ..pocket.questions import QUESTION_KINDS, PocketQuestion, exam
from ..pocket.scenes import LEVELS, Scene, draw_scene
from ..report import Clock
from ..tokens import resolve_budget

BUDGETS = (16, 36, 64, 144, 288)
SEED = 2403
Variant = tuple[str, str, dict[str, Any]]  # shown name, registered name, fields
ADAPTIVE: tuple[Variant, ...] = (
    ("prumerge", "prumerge", {}),
    ("prune-only", "prumerge", {"merge": False}),
    ("prumerge+", "prumerge+", {}),
    ("prune-only+", "prumerge+", {"merge": False}),
    ("prumerge:paper", "prumerge:paper", {}),
    ("prumerge:released", "prumerge:released", {"iqr_scope": "image"}),
    ("prumerge+:released", "prumerge+:released", {"iqr_scope": "image"}),
)
COMPARED: tuple[Variant, ...] = (
    *ADAPTIVE[:4],
    ("random", "random", {}),
    ("spatial", "spatial", {}),
    ("sequential", "sequential", {}),
    ("pool", "pool", {}),
)


@dataclass(frozen=True)
class TestSet:
    """Scenes of one split with their questions; a function of (number, seed, split)."""

    __test__ = False  # for pytest

    scenes: list[Scene]
    questions: list[list[PocketQuestion]]

    @classmethod
    def draw(cls, number: int, seed: int = SEED, split: str = "test") -> TestSet:
        """``number`` scenes, a third of them plain, medium and crowded."""
        scenes, questions = [], []
        for i in range(number):
            random = Random(f"{split}/{seed}/{i}")
            scenes.append(draw_scene(random, split=split, level=i % len(LEVELS)))
            questions.append(exam(scenes[-1], random))
        return cls(scenes, questions)

    def chunks(self, size: int) -> Iterator[slice]:
        for start in range(0, len(self.scenes), size):
            yield slice(start, min(start + size, len(self.scenes)))

    def column(self, pick: Callable[[int, PocketQuestion], Any]) -> NDArray[Any]:
        """One value per question, scene by scene."""
        return np.array([pick(i, q) for i, asked in enumerate(self.questions) for q in asked])


@dataclass
class Result:
    """How one method did: ``right`` [questions] bool, ``tokens`` [scenes] visual tokens."""

    right: NDArray[np.bool_]
    tokens: list[int] = field(default_factory=list)


class Evaluator:
    """Encodes the pictures of a test set once, and answers all questions for any method that acts before the decoder."""

    def __init__(self, model: Any, data: TestSet, chunk: int = 12) -> None:
        self.model, self.data, self.chunk = model, data, chunk
        self.parts: Anatomy = anatomy(model)
        self.depth = len(self.parts.layers)
        self.clock = Clock(model.device)
        self.encoded: list[EncodedPictures] = []  # with the taps of all layers, by index
        self.text: list[dict[str, Tensor]] = []
        with torch.no_grad():
            for part in data.chunks(chunk):
                images = {"pixel_values": self.pixels(part)}
                encoded = encode(self.parts, tuple(range(self.depth)), images, project=True)
                # the query of [CLS] alone, and not with it those of all patches
                taps = {i: tap if tap.query is None else replace(tap, query=tap.query.clone()) for i, tap in encoded.taps.items()}
                self.encoded.append(replace(encoded, taps=taps))
                rows = collate_text([text_rows(asked) for asked in data.questions[part]])
                self.text.append({name: value.to(model.device) for name, value in rows.items()})

    def pixels(self, part: slice) -> Tensor:
        """The pictures of a chunk."""
        return normalise([scene.image for scene in self.data.scenes[part]]).to(self.model.device, self.model.dtype)

    @torch.no_grad()
    def run(self, method: FrontReducer | None, *, wrong_picture: bool = False) -> Result:
        """Answer everything with the tokens a method leaves; None = all of them.

        With ``wrong_picture`` each question is asked about another picture of the chunk: what remains is what can be guessed.

        Raises
        ------
        InputError : the method reads the question, and all questions of a picture share one reduction here.
        """
        if method is not None:
            if method.reads_question:
                raise InputError(
                    f"{method.name} reads the question, and here all questions of a picture share its tokens. Use Asker."
                )
            check_front(self.parts, method)
        right, tokens = [], []
        for part, encoded, text in zip(self.data.chunks(self.chunk), self.encoded, self.text, strict=True):
            embeds = self.reduced(method, encoded, part)
            if wrong_picture:
                embeds = embeds[1:] + embeds[:1]
            tokens += [len(visual) for visual in embeds]
            right += self.answers(embeds, text)
        return Result(np.array(right, bool), tokens)

    def reduced(self, method: FrontReducer | None, encoded: EncodedPictures, part: slice) -> list[Tensor]:
        """Per picture of a chunk the tokens that a method leaves; pictures are encoded anew only where it acts before their end."""
        number = encoded.grid[0] * encoded.grid[1]
        if method is None or resolve_budget(method.budget, number) == number:
            return unchanged(self.parts, encoded).embeds
        if not isinstance(method, ProjectorReducer) or method.picture(encoded.grid) is not None:
            return encode_and_reduce(self.parts, method, {"pixel_values": self.pixels(part)}, self.clock).embeds
        named = {"last": self.depth - 1, "aligned": self.parts.feature_layer()}
        asked = {name: named[name] if isinstance(name, str) else name % self.depth for name in method.encoder_layers(self.depth)}
        taps = {name: encoded.taps[index] for name, index in asked.items()}
        return reduce(self.parts, method, replace(encoded, taps=taps), self.clock).embeds

    def answers(self, embeds: list[Tensor], text: dict[str, Tensor]) -> list[bool]:
        """Per question of a chunk whether every token of the answer, its end included, is the most likely one."""
        visual = torch.nn.utils.rnn.pad_sequence(embeds, batch_first=True)
        counts = torch.tensor([len(each) for each in embeds], device=visual.device)
        real = torch.arange(visual.shape[1], device=visual.device) < counts[:, None]
        hidden = text_states(self.model, visual, real, text)[-1]
        labels, block = text["labels"], text["block"]
        asked = labels != IGNORE
        wrong = torch.zeros_like(asked)
        wrong[asked] = self.model.lm_head(hidden[asked]).argmax(-1) != labels[asked]
        return [
            not bool(wrong[row][block[row] == question].any())
            for row in range(len(block))
            for question in range(int(block[row].max()) + 1)
        ]


@dataclass(frozen=True)
class Scores:
    """Accuracies of results on a test set, with intervals from resampling scenes (questions of a scene belong together)."""

    families: NDArray[Any]
    scene: NDArray[np.int64]
    resamples: NDArray[np.int64]  # [R, scenes] how often each scene was drawn

    @classmethod
    def of(cls, data: TestSet, resamples: int = 2000) -> Scores:
        number = len(data.scenes)
        drawn = np.random.default_rng(0).multinomial(number, np.full(number, 1 / number), size=resamples)
        return cls(data.column(lambda _, q: q.family), data.column(lambda i, _: i), drawn)

    def per_family(self, right: NDArray[Any]) -> dict[str, float]:
        return {f: float(right[self.families == f].mean()) for f in QUESTION_KINDS if (self.families == f).any()}

    def interval(self, values: NDArray[Any]) -> tuple[float, float, float]:
        """Mean over questions, and its 95 % interval."""
        number = self.resamples.shape[1]
        totals = np.bincount(self.scene, values.astype(float), minlength=number)
        counts = np.bincount(self.scene, minlength=number)
        asked = self.resamples @ counts
        means = (self.resamples @ totals)[asked > 0] / asked[asked > 0]
        low, high = np.quantile(means, [0.025, 0.975])
        return float(values.mean()), float(low), float(high)

    def difference(self, a: NDArray[Any], b: NDArray[Any]) -> tuple[float, float, float]:
        """Accuracy of a minus accuracy of b on the same questions, with its paired 95 % interval."""
        return self.interval(a.astype(float) - b.astype(float))


def majority(data: TestSet) -> dict[str, float]:
    """Accuracy of always giving the most frequent answer of a family."""
    families, answers = data.column(lambda _, q: q.family), data.column(lambda _, q: q.answer)
    found = {}
    for family in QUESTION_KINDS:
        mine = Counter(answers[families == family].tolist())
        if mine:
            found[family] = max(mine.values()) / sum(mine.values())
    return found


def attention_facts(evaluator: Evaluator) -> dict[str, Any]:
    """How sparse [CLS] attention is, and whether the number of outliers follows the number of objects."""
    reducer = PruMerge()
    counts, scores = [], []
    for encoded in evaluator.encoded:
        scores.append(cls_attention(encoded.taps[evaluator.depth - 1], reducer.attn_mode))
        counts += reducer.outliers(scores[-1])[0].tolist()
    share = torch.cat(scores)
    share = share / share.sum(-1, keepdim=True)
    data = evaluator.data
    items = [len(scene.items) for scene in data.scenes]
    covered = [int((scene.owner >= 0).sum()) for scene in data.scenes]
    level = np.array([scene.level for scene in data.scenes])
    kinds = np.stack([_kinds(scene) for scene in data.scenes])
    mass = {
        kind: round(float((share.numpy() * (kinds == number)).sum(-1).mean()), 4)
        for number, kind in enumerate(("background", "shape", "word", "number", "digit"))
    }
    return {
        "outliers": float(np.mean(counts)),
        "outliers_by_level": {name: float(np.mean(np.array(counts)[level == i])) for i, name in enumerate(LEVELS)},
        "correlation_with_items": float(np.corrcoef(counts, items)[0, 1]),
        "correlation_with_covered_patches": float(np.corrcoef(counts, covered)[0, 1]),
        "share_of_top_16_tokens": float(share.sort(-1, descending=True).values[:, :16].sum(-1).mean()),
        "share_by_kind": mass,
    }


def _kinds(scene: Scene) -> NDArray[np.int64]:
    """[N] what each patch shows: 0 background, then shape, word, number, digit."""
    names = ("shape", "word", "number", "digit")
    of_item = np.array([names.index(item.kind) + 1 for item in scene.items] + [0])
    return of_item[scene.owner]


def compare(evaluator: Evaluator, budgets: Sequence[int], console: Console) -> dict[str, Any]:
    """All methods at all budgets, adaptive methods, and baselines at the counts that adaptive methods chose."""
    data, scores = evaluator.data, Scores.of(evaluator.data)
    full, blind = evaluator.run(None), evaluator.run(None, wrong_picture=True)
    results: dict[tuple[str, int | None], Result] = {}
    jobs: list[tuple[Variant, int | None]] = [(variant, None) for variant in ADAPTIVE]
    jobs += [(variant, budget) for budget in budgets for variant in COMPARED]
    for (shown, name, fields), budget in track(jobs, "evaluating", console=console, transient=True):
        results[shown, budget] = evaluator.run(get(name, budget=budget, **fields).before_decoder())
    for shown in ("prumerge", "prumerge+"):  # baselines at the mean count of the adaptive rule
        count = round(float(np.mean(results[shown, None].tokens)))
        for name in ("random", "spatial", "pool"):
            results.setdefault((name, count), evaluator.run(get(name, budget=count).before_decoder()))
    rows = []
    for (name, budget), result in results.items():
        accuracy, low, high = scores.interval(result.right)
        spatial = results.get(("spatial", budget if budget is not None else round(float(np.mean(result.tokens)))))
        rows.append(
            {
                "name": name,
                "budget": budget,
                "mean_tokens": float(np.mean(result.tokens)),
                "accuracy": accuracy,
                "low": low,
                "high": high,
                "minus_full": scores.difference(result.right, full.right),
                "minus_spatial": None if spatial is None else scores.difference(result.right, spatial.right),
                "families": scores.per_family(result.right),
            }
        )
    rows.sort(key=lambda row: (row["mean_tokens"], row["name"]))
    unmerged = {b: scores.difference(results["prumerge", b].right, results["prune-only", b].right) for b in (None, *budgets)}
    unmerged_plus = {b: scores.difference(results["prumerge+", b].right, results["prune-only+", b].right) for b in (None, *budgets)}
    return {
        "scenes": len(data.scenes),
        "questions": len(full.right),
        "full": scores.per_family(full.right),
        "full_accuracy": scores.interval(full.right),
        "blind": scores.per_family(blind.right),
        "majority": majority(data),
        "merging": {
            "prumerge_minus_prune_only": {str(b or "adaptive"): d for b, d in unmerged.items()},
            "prumerge_plus_minus_prune_only_plus": {str(b or "adaptive"): d for b, d in unmerged_plus.items()},
        },
        "attention": attention_facts(evaluator),
        "methods": rows,
    }


def family_table(report: dict[str, Any]) -> Table:
    """Accuracy by family of the full model and its controls."""
    table = Table(title=f"all visual tokens, {report['scenes']} test scenes, {report['questions']} questions")
    for column in ("family", "full", "wrong picture", "most frequent answer"):
        table.add_column(column, justify="left" if column == "family" else "right")
    for family in report["full"]:
        table.add_row(family, *(f"{100 * report[part][family]:.1f}" for part in ("full", "blind", "majority")))
    return table


def method_table(report: dict[str, Any]) -> Table:
    """Accuracy against kept tokens."""
    table = Table(title="accuracy in % [95 %] at equal counts; differences are paired, in points")
    for column in ("tokens", "method", "accuracy", "minus full", "minus spatial", "reading"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for row in report["methods"]:
        reading = np.mean([row["families"][family] for family in ("word", "number", "digit")])
        shown = row["name"] + (" (adaptive)" if row["budget"] is None else "")
        cells = [
            f"{row['mean_tokens']:.1f}",
            shown,
            f"{100 * row['accuracy']:.1f} [{100 * row['low']:.1f}, {100 * row['high']:.1f}]",
        ]
        for difference in (row["minus_full"], row["minus_spatial"]):
            cells.append("" if difference is None else "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * d for d in difference)))
        table.add_row(*cells, f"{100 * reading:.1f}")
    return table


def evaluate(
    scenes: Annotated[int, typer.Option(help="Test scenes to draw.")] = 501,
    budgets: Annotated[str, typer.Option(help="Visual tokens to keep, separated by commas.")] = ",".join(map(str, BUDGETS)),
    seed: Annotated[int, typer.Option(help="Seed of the test set.")] = SEED,
    model: Annotated[Path | None, typer.Option(help="Folder of another pocket model.")] = None,
    save: Annotated[Path | None, typer.Option(help="Write the curves as a PNG.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all numbers as JSON; - prints them.")] = None,
) -> None:
    """Accuracy per question family, and of every method against kept tokens."""
    console = Console(stderr=str(json_file) == "-")
    loaded = load_pocket() if model is None else load_pocket(folder=model)
    report = compare(Evaluator(loaded[0], TestSet.draw(scenes, seed)), [int(b) for b in budgets.split(",")], console)
    console.print(family_table(report), method_table(report), sep="\n")
    if save:
        from ..viz.curves import save_accuracy_curves

        save_accuracy_curves(report, save)
        console.print(f"curves: {save}")
    if json_file and str(json_file) == "-":
        print(json.dumps(report))
    elif json_file:
        json_file.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    typer.run(evaluate)
