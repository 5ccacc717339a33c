"""A tuning from its options to its plan."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from ..engine.model.anatomy import anatomy
from ..lab.own import Example, Examples, drawn_examples, read_examples
from ..lab.scoring import Score
from ..loading import Loaded, load
from ..measuring import ledger
from ..methods.base import KeepAll
from .answers import AnswerBook
from .bounds import fewest
from .costs import Costs
from .plan import TunedPlan, marks_of
from .space import space_of, usual
from .trial import Tuned
from .tune import Tuner

MEASURED = 3  # prompts on which costs are measured


@dataclass(frozen=True)
class Options:
    """Of a tuning, as the command line has them.

    Attributes
    ----------
    model, data, tolerance, objective : what is tuned, on what, for what; a tolerance of 0.01 is one point.
    score, judge : how right an answer is: by name, and as a function.
    methods : names; None = the usual ones.
    examples, max_tokens, frames, minutes, batch, seed, store : limits and places.
    """

    model: str
    data: Path | None
    tolerance: float
    objective: str
    score: str
    judge: Score
    methods: Sequence[str] | None
    examples: int
    max_tokens: int
    frames: int
    minutes: float | None
    batch: int
    seed: int
    store: Path | None


@dataclass(frozen=True)
class Found:
    """All that a tuning leaves: for the plan, the page and the terminal."""

    plan: TunedPlan
    tuned: Tuned
    book: AnswerBook
    loaded: Loaded
    notes: list[str]
    document: dict[str, Any]


def tuned_plan(options: Options, command: str, tell: Callable[[str], None], loaded: Loaded | None = None) -> Found:
    """Load, search, confirm.

    Raises
    ------
    InputError : the model or the examples cannot be used, or there are too few of them.
    """
    loaded, begun = loaded or load(options.model), time.monotonic()
    if options.data is None:
        examples = drawn_examples(loaded, options.examples, options.seed)
    else:
        examples = read_examples(
            options.data,
            loaded,
            options.frames,
            options.examples,
            lambda done, total: tell(f"opening pictures: {done} of {total}"),
            seed=options.seed,
        )
    notes = examples.notes()
    items = ordered(examples.items, options.seed)
    book = AnswerBook(loaded, items, options.judge, options.store, options.batch, options.max_tokens)
    parts = anatomy(loaded.model)
    videos = any(item.shape[1] for item in items)
    names = options.methods or usual(loaded.name == "pocket", videos)
    space = space_of(parts, names)
    first = [*range(min(len(items), 16))]
    tell("all tokens")
    lengths = [len(loaded.processor.tokenizer(text).input_ids) for text in book.ask(None, first).texts]
    measured = np.linspace(0, len(items) // 8, MEASURED).astype(int)  # of the search: the test sees nothing before its time
    prompts = [book.questions.prompts.inputs([int(number)]) for number in measured]
    costs = Costs(loaded.model, prompts, options.objective, round(float(np.median(lengths))) + 1)
    tuner = Tuner(book, costs, options.tolerance, tell, options.minutes, begun)
    if len(tuner.confirmed) < fewest(options.tolerance):
        notes.append(
            f"{len(items)} examples cannot show a loss below {100 * options.tolerance:g} points, whatever is tried: the test needs "
            f"{fewest(options.tolerance)} that the search has not seen"
        )
    tuned = tuner.run(space)
    plan = _plan(options, loaded, examples, tuned, command)
    return Found(plan, tuned, book, loaded, notes, _document(plan, tuned, notes))


def ordered(items: Sequence[Example], seed: int) -> list[Example]:
    """In random order; those about the same pictures stay together."""
    groups = [*dict.fromkeys(item.group for item in items)]
    Random(f"tune/{seed}").shuffle(groups)
    place = {group: number for number, group in enumerate(groups)}
    return sorted(items, key=lambda item: place[item.group])


def _plan(options: Options, loaded: Loaded, examples: Examples, tuned: Tuned, command: str) -> TunedPlan:
    told = _summary(tuned, options.objective)
    method = KeepAll() if tuned.chosen is None else tuned.chosen.setting.method
    about = {
        "setting": told["setting"],
        "data": {
            "name": str(examples.path),
            "digest": examples.digest,
            "examples": len(examples.items),
            "skipped": examples.skipped,
        },
        "right": "the answers of the data" if examples.answered else "the model's own answers with all tokens",
        "score": options.score,
        "score_with_all_tokens": tuned.full,
        "searched": len(tuned.searched),
        "confirmed": len(tuned.confirmed),
        "max_tokens": options.max_tokens,
        "seconds": round(tuned.seconds, 1),
        "command": command,
        "date": time.strftime("%Y-%m-%d %H:%M:%S%z"),
        "versions": ledger.versions(),
        "machine": ledger.machine(loaded.model.device),
    }
    model = {"name": loaded.name, "weights": loaded.weights, "signature": marks_of(loaded.model)}
    saving = {name: told[name] for name in ("objective", "saving", "interval")}
    plan = TunedPlan(method.described(), model, tuned.reason, tuned.tolerance, told["loss"], told["bound"], saving, tuned.needed)
    return replace(plan, about=about)


def _document(plan: TunedPlan, tuned: Tuned, notes: list[str]) -> dict[str, Any]:
    """What ``--json`` prints: the plan, and everything that was tried."""

    def losses(found: Any) -> dict[str, Any] | None:
        return None if found is None else {"mean": found.mean, "examples": len(found.values)}

    trials = [
        {
            "setting": trial.setting.label,
            "method": trial.setting.method.described(),
            "tokens": trial.share,
            "cost": None if trial.cost is None else {"ratio": trial.cost.median, "interval": trial.cost.interval},
            "searched": losses(trial.losses),
            "confirmed": losses(trial.confirmed),
            "verdict": trial.verdict,
        }
        for trial in tuned.trials
    ]
    found = {
        name: getattr(plan, name)
        for name in ("method", "model", "reason", "tolerance", "loss", "bound", "saving", "needed", "about")
    }
    return {**found, "trials": trials, "impossible": tuned.impossible, "notes": notes}


def _summary(tuned: Tuned, objective: str) -> dict[str, Any]:
    """What is told of the chosen setting: loss with its bound, saving with its interval."""
    chosen = tuned.chosen
    if chosen is None or chosen.confirmed is None or chosen.cost is None:
        return {"setting": "all tokens", "loss": 0.0, "bound": 0.0, "saving": 0.0, "interval": None, "objective": objective}
    low, high = chosen.cost.interval or (chosen.cost.median, chosen.cost.median)
    return {
        "setting": chosen.setting.label,
        "loss": chosen.confirmed.mean,
        "bound": tuned.bound,
        "saving": 1 - chosen.cost.median,
        "interval": [1 - high, 1 - low],
        "objective": objective,
    }
