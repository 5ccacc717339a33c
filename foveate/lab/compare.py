"""Registered methods at several budgets on the pocket test set: what ``foveate compare`` runs.

Every method answers the same questions, so that differences are paired. Methods that never see the question run on whole scenes
(``Evaluator``), all others on one prompt for each question (``Asker``). Baselines before the projector stand beside every row, at
the tokens that decoder layers run on average, which is what the decoder pays for.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError, UnsupportedModelError
from ..methods.base import EncoderReducer, Method
from ..methods.baselines import Random
from ..methods.registry import get, presets, registered
from ..pocket import WEIGHTS, load_pocket
from ..pocket.questions import READING
from .evaluate import SEED, Evaluator, Scores, TestSet
from .store import Store, key_of, weights_of
from .studies.inside import Asker, nearby

BESIDE = ("random", "spatial", "resize")  # run beside everything
BASELINES = (*BESIDE, "sequential", "pool")
SEEDS = (0, 1, 2)  # of random, whose row is their mean
KINDS = ("baseline", "inside the encoder", "before the projector", "inside the decoder")
COUNTS = (16, 36, 64, 144, 288)
TOTAL = 576  # visual tokens of a picture
Tell = Callable[[str, int, int], None]  # what comes next, how many are done, of how many


@dataclass(frozen=True)
class Outcome:
    """How one method did: ``right`` [questions] in [0, 1], visual tokens per image that enter the decoder, and on average over its
    layers.
    """

    right: NDArray[np.float64]
    tokens: float
    mean: float
    seconds: float


class Runner:
    """Answers the questions of one test set with any method; what the store holds is not computed again.

    Parameters
    ----------
    scenes, each, seed : of the test set: how many pictures, and questions about each.
    store : file of results so far; None = none.
    """

    def __init__(self, scenes: int = 501, each: int = 2, seed: int = SEED, store: Path | None = None) -> None:
        from .. import __version__

        test = {"scenes": scenes, "each": each, "seed": seed, "split": "test"}
        self.setting: dict[str, Any] = {**test, "foveate": __version__, "weights": weights_of(WEIGHTS)}
        self.store = Store(store, self.setting)
        self.asker = Asker(load_pocket()[0], TestSet.draw(scenes, seed), each, seed)
        asked = [[question for number, question in self.asker.asked if number == scene] for scene in range(scenes)]
        self.data = TestSet(self.asker.data.scenes, asked)
        self.scores = Scores.of(self.data)

    @functools.cached_property
    def evaluator(self) -> Evaluator:
        """Encodes all pictures."""
        return Evaluator(self.asker.model, self.data)

    def outcome(self, method: Method | None) -> Outcome:
        """Answer all questions; None keeps all tokens, and a random choice is the mean over ``SEEDS``.

        Raises
        ------
        InputError, UnsupportedModelError : the method cannot do that.
        """
        runs = [replace(method, seed=seed) for seed in SEEDS] if isinstance(method, Random) else [method]
        found = []
        for run in runs:
            key = key_of(run)
            result = self.store.get(key)
            if result is None:
                result = self._answer(run)
                self.store.put(key, result)
            found.append(result)
        right = np.mean([[int(digit) for digit in result["right"]] for result in found], axis=0)
        return Outcome(right, *(float(np.mean([result[part] for result in found])) for part in ("tokens", "mean", "seconds")))

    def _answer(self, method: Method | None) -> dict[str, Any]:
        begin = time.perf_counter()
        if method is None or self.sees_no_question(method):
            _ = self.evaluator  # encoding once is nobody's time
            begin = time.perf_counter()
            found = self.evaluator.run(None if method is None else method.before_decoder())
            right, layers = found.right.tolist(), [float(np.mean(found.tokens))]
        else:
            asked = self.asker.run(method)
            right, layers = asked["right"], asked["layers"]
        return {
            "right": "".join(str(int(value)) for value in right),
            "tokens": layers[0],
            "mean": float(np.mean(layers)),
            "seconds": time.perf_counter() - begin,
        }

    @staticmethod
    def sees_no_question(method: Method) -> bool:
        """Whether all questions about a picture get the same tokens, at the places that the evaluator gives them."""
        front = method.before_decoder()
        return not method.inside_decoder() and not front.reads_question and front.positions == "compact"


def check_methods(names: Sequence[str]) -> tuple[str, ...]:
    """The names without repetition, each a registered method or ``name:preset``.

    Raises
    ------
    InputError : one is not.
    """
    known = registered()
    for name in names:
        base, _, preset = name.partition(":")
        if base not in known:
            raise InputError(f"unknown method {base!r}; available: {', '.join(known)}")
        if preset and preset not in presets(known[base]):
            raise InputError(f"{base!r} has no preset {preset!r}; available: {', '.join(presets(known[base])) or 'none'}")
    return tuple(dict.fromkeys(names))


def at_count(name: str, count: int) -> Method:
    """A method with a budget of ``count`` tokens: what enters the decoder or, inside it, what is left in the last layer.

    Staged methods keep equal shares at each stage. P-Sigmoid's budget is its mean over layers, AIM's what enters the decoder.

    Raises
    ------
    InputError : the method cannot do that.
    """
    share, base = count / TOTAL, name.partition(":")[0]
    if base == "aim-prune":
        raise InputError("aim-prune: its schedule says how many tokens stay, and a budget changes nothing. Use aim.")
    if base == "pyramiddrop":
        return get(name, ratio=share ** (1 / 3))
    if base == "sparsevlm" and not name.endswith(":released"):
        return get(name, counts=tuple(round(TOTAL * share ** (stage / 3)) for stage in (1, 2, 3)))
    if base == "iti":
        return get(name, budget=share**0.5, second=share**0.5)
    return each_alone(get(name, budget=count))


def at_own_rule(name: str) -> Method | None:
    """A method with its own adaptive rule; None where it has none."""
    try:
        method = get(name)
    except InputError:
        return None
    return each_alone(method) if method.budget is None else None


def each_alone(method: Method) -> Method:
    """The method as it is on one picture at a time, where it would let a picture depend on its batch."""
    return replace(method, iqr_scope="image") if getattr(method, "iqr_scope", "image") == "batch" else method  # type: ignore[call-arg]


def kind_of(method: Method) -> str:
    """Where a method acts; one of ``KINDS``."""
    if method.name in BASELINES:
        return "baseline"
    if method.inside_decoder():
        return "inside the decoder"
    return "inside the encoder" if isinstance(method.before_decoder(), EncoderReducer) else "before the projector"


@dataclass
class Table:
    """What was found: outcomes of cells (name, budget), and why others are empty. A budget of None is the method's own rule."""

    runner: Runner
    methods: dict[tuple[str, int | None], Method] = field(default_factory=dict)
    outcomes: dict[tuple[str, int | None], Outcome] = field(default_factory=dict)
    missing: dict[tuple[str, int | None], str] = field(default_factory=dict)

    def run(self, name: str, budget: int | None, method: Method | None = None) -> None:
        """Fill a cell, or say why it stays empty."""
        if (name, budget) in self.outcomes or (name, budget) in self.missing:
            return
        try:
            method = method or at_count(name, budget or TOTAL)
            self.outcomes[name, budget] = self.runner.outcome(method)
            self.methods[name, budget] = method
        except (InputError, UnsupportedModelError) as error:
            self.missing[name, budget] = str(error)

    def beside(self, name: str, mean: float) -> Outcome | None:
        """The run of a baseline nearest to a mean over layers; None where none is near."""
        runs = [outcome for (found, _), outcome in self.outcomes.items() if found == name]
        best = min(runs, key=lambda outcome: abs(outcome.mean - mean), default=None)
        return best if best is not None and abs(best.mean - mean) <= max(6.0, 0.1 * mean) else None

    def row(self, name: str, budget: int | None) -> dict[str, Any]:
        """One line of the long table."""
        outcome, method, scores = self.outcomes[name, budget], self.methods[name, budget], self.runner.scores
        accuracy, low, high = scores.interval(outcome.right)
        reading = np.isin(scores.families, READING)
        row: dict[str, Any] = {
            "method": name,
            "kind": kind_of(method),
            "budget": budget,
            "tokens": outcome.tokens,
            "mean_tokens": outcome.mean,
            "accuracy": accuracy,
            "low": low,
            "high": high,
            "reading": float(outcome.right[reading].mean()) if reading.any() else None,
            "minus_all": scores.difference(outcome.right, self.runner.outcome(None).right),
        }
        for base in BESIDE:
            other = None if name == base else self.beside(base, outcome.mean)
            row[f"minus_{base}"] = None if other is None else scores.difference(outcome.right, other.right)
            row[f"{base}_tokens"] = None if other is None else other.mean
        row["families"] = scores.per_family(outcome.right)
        row["seconds"] = outcome.seconds
        row["settings"] = method.settings() | ({"seed": list(SEEDS)} if isinstance(method, Random) else {})
        return row


def compare(
    runner: Runner, names: Sequence[str], budgets: Sequence[int], *, own: bool = True, tell: Tell = lambda *_: None
) -> dict[str, Any]:
    """All methods at all budgets and at their own rules, with baselines beside each; a JSON-able report.

    Parameters
    ----------
    runner : with the test set and the store.
    names : as ``check_methods`` returned them.
    budgets : visual tokens of ``TOTAL``.
    own : whether methods that have a rule of their own also follow it.
    tell : is told what comes next.
    """
    table, names = Table(runner), tuple(dict.fromkeys((*names, *BESIDE)))
    jobs: list[tuple[str, int | None, Method | None]] = [(name, budget, None) for name in names for budget in budgets]
    for name in names if own else ():
        rule = at_own_rule(name)
        if rule is not None:
            jobs.append((name, None, rule))
    tell("all tokens", 0, len(jobs) + 1)
    whole = runner.outcome(None)
    for number, (name, budget, method) in enumerate(jobs, 1):
        tell(f"{name}, {budget or 'own rule'}", number, len(jobs) + 1)
        table.run(name, budget, method)
    means = [outcome.mean for (name, budget), outcome in table.outcomes.items() if outcome.mean != budget and name not in BASELINES]
    counts = sorted({min(TOTAL, nearby(mean)) for mean in means} - set(budgets))
    beside = [(name, count) for count in counts for name in BESIDE]
    for number, (name, count) in enumerate(beside):
        tell(f"{name} beside, {count}", len(jobs) + 1 + number, len(jobs) + 1 + len(beside))
        table.run(name, count)
    asked = {(name, budget) for name, budget, _ in jobs}
    notes = {note: None for method in table.methods.values() for note in method.notes()}
    return {
        **runner.setting,
        "questions": len(whole.right),
        "budgets": list(budgets),
        "all": dict(zip(("accuracy", "low", "high"), runner.scores.interval(whole.right), strict=True))
        | {"families": runner.scores.per_family(whole.right), "reading": _reading(runner, whole)},
        "rows": [table.row(name, budget) | {"asked": (name, budget) in asked} for name, budget in table.outcomes],
        "missing": [
            {"method": name, "budget": budget, "reason": reason}
            for (name, budget), reason in table.missing.items()
            if (name, budget) in asked
        ],
        "notes": list(notes),
    }


def _reading(runner: Runner, outcome: Outcome) -> float | None:
    reading = np.isin(runner.scores.families, READING)
    return float(outcome.right[reading].mean()) if reading.any() else None
