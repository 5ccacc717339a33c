"""Accuracy of a pocket model against kept tokens: ``python -m foveate.lab.evaluate``; of the second one with all tokens:
``python -m foveate.lab.evaluate --model pocket-qwen --scenes 800``.

The paper's comparison of sampling strategies and of its two modules (Tables 4 and 5 of arXiv 2403.15388) in small, at equal counts,
on unseen scenes. Pictures are encoded and reduced by the engine; all questions of a picture are then answered in one forward,
which is right exactly where greedy decoding gives the expected answer (a test compares the two).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from ..errors import InputError
from ..loading import POCKET, load
from ..methods.prumerge import PruMerge
from ..methods.registry import get
from ..places import write_text
from ..pocket.scenes import LEVELS, Scene
from ..pocket.worlds import world_of
from .exam import Evaluator
from .native_exam import NativeEvaluator
from .progress import bar
from .runner import Outcome, Runner
from .scores import majority
from .testset import SEED

EVERY = 99  # questions about a scene, which has about 16
BUDGETS = (16, 36, 64, 144, 288)
Variant = tuple[str, str, dict[str, Any]]  # shown name, registered name, fields
ADAPTIVE: tuple[Variant, ...] = (
    ("prumerge", "prumerge", {}),
    ("prune-only", "prumerge", {"merge": False}),
    ("prumerge+", "prumerge+", {}),
    ("prune-only+", "prumerge+", {"merge": False}),
    ("prumerge:paper", "prumerge:paper", {}),
    ("prumerge:released", "prumerge:released", {}),
    ("prumerge+:released", "prumerge+:released", {}),
)
COMPARED: tuple[Variant, ...] = (
    *ADAPTIVE[:4],
    ("random", "random", {}),
    ("spatial", "spatial", {}),
    ("sequential", "sequential", {}),
    ("pool", "pool", {}),
)


def attention_facts(evaluator: Evaluator) -> dict[str, Any]:
    """How sparse [CLS] attention is, and whether the number of outliers follows the number of objects."""
    reducer = PruMerge()
    counts, scores = [], []
    for pictures in evaluator.pictures:
        reduction = pictures.reduce(reducer).reduction
        if reduction is not None and reduction.scores is not None:
            scores.append(reduction.scores)
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


def compare(runner: Runner, budgets: Sequence[int]) -> dict[str, Any]:
    """All methods at all budgets, adaptive methods, and baselines at the counts that adaptive methods chose."""
    data, scores, evaluator = runner.data, runner.scores, runner.evaluator
    if not isinstance(evaluator, Evaluator):
        raise InputError("these tables are of the first pocket model")
    full, blind = runner.outcome(None), evaluator.run(None, wrong_picture=True)
    results: dict[tuple[str, int | None], Outcome] = {}
    jobs: list[tuple[Variant, int | None]] = [(variant, None) for variant in ADAPTIVE]
    jobs += [(variant, budget) for budget in budgets for variant in COMPARED]
    for (shown, name, fields), budget in bar(jobs, "evaluating"):
        results[shown, budget] = runner.outcome(get(name, budget=budget, **fields).per_image())
    for shown in ("prumerge", "prumerge+"):  # baselines at the mean count of the adaptive rule
        count = round(results[shown, None].tokens)
        for name in ("random", "spatial", "pool"):
            results.setdefault((name, count), runner.outcome(get(name, budget=count)))
    rows = []
    for (name, budget), result in results.items():
        accuracy, low, high = scores.interval(result.right)
        spatial = results.get(("spatial", budget if budget is not None else round(result.tokens)))
        rows.append(
            {
                "name": name,
                "budget": budget,
                "mean_tokens": result.tokens,
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


def families(runner: Runner) -> dict[str, Any]:
    """The second pocket model with all tokens, about a wrong picture or clip, and what the most frequent answers give."""
    full, scores = runner.outcome(None), runner.scores
    blind = NativeEvaluator(runner.loaded, runner.data.wrong()).run(None)
    return {
        "scenes": len(runner.data.scenes),
        "questions": len(full.right),
        "tokens": full.tokens,
        "full": scores.per_family(full.right),
        "full_accuracy": scores.interval(full.right),
        "blind": scores.per_family(blind.right),
        "blind_accuracy": scores.interval(blind.right),
        "majority": majority(runner.data),
        "asked": {family: int((scores.families == family).sum()) for family in scores.per_family(full.right)},
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
    model: Annotated[str, typer.Option(help="pocket, pocket-qwen, or the folder of another pocket model.")] = POCKET,
    save: Annotated[Path | None, typer.Option(help="Write the curves as a PNG.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all numbers as JSON; - prints them.")] = None,
) -> None:
    """Accuracy per question family, and of every method against kept tokens."""
    console = Console(stderr=str(json_file) == "-")
    loaded = load(model)
    native = world_of(loaded.processor) == "native"
    runner = Runner(scenes, EVERY, seed, model=loaded)
    report = families(runner) if native else compare(runner, [int(b) for b in budgets.split(",")])
    console.print(family_table(report))
    if not native:
        console.print(method_table(report))
    if save and not native:
        from ..viz.curves import save_accuracy_curves

        save_accuracy_curves(report, save)
        console.print(f"curves: {save}")
    if json_file and str(json_file) == "-":
        print(json.dumps(report))
    elif json_file:
        write_text(json_file, json.dumps(report, indent=1))


if __name__ == "__main__":
    typer.run(evaluate)
