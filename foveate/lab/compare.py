"""Registered methods at several budgets on a test set: what ``foveate compare`` runs.

Every method answers the same questions, so that differences are paired. Baselines before the projector stand beside every row, at
the tokens that decoder layers run on average, which is what the decoder pays for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import InputError, UnsupportedModelError
from ..methods.base import EncoderReducer, Method
from ..methods.baselines import BASELINES, BESIDE
from ..methods.pixels import PixelReducer
from ..methods.registry import get, look_up
from ..pocket.native.questions import READ
from .runner import Outcome, Runner, Tell

KINDS = ("baseline", "inside the encoder", "before the projector", "inside the decoder")
COUNTS = (16, 36, 64, 144, 288)
SHARES = (0.1, 0.22, 0.33, 0.5)  # where pictures have different numbers of tokens
TOTAL = 576  # visual tokens of a picture of the pocket model
Budget = int | float  # a count, or a share where pictures differ


def check_methods(names: Sequence[str]) -> tuple[str, ...]:
    """The names without repetition, each a registered method, ``name:preset``, or the JSON file of a method.

    Raises
    ------
    InputError : one is not.
    """
    for name in names:
        if name.endswith(".json"):
            Method.load(name)
        else:
            look_up(name)
    return tuple(dict.fromkeys(names))


def at_count(name: str, count: int, total: int = TOTAL, layers: int = 6) -> Method:
    """A method with ``count`` tokens: what enters the decoder or, inside it, what is left in the last layer.

    Raises
    ------
    InputError : the method cannot do that.
    """
    return _built(name, count).per_image().at_budget(count, total, layers, at="last")


def budgets_for(runner: Runner, asked: Sequence[Budget] | None, table: int | None = None) -> tuple[Budget, ...]:
    """The budgets to run; the usual ones of the test set where none were asked for.

    Raises
    ------
    InputError : pictures of this test set have different numbers of tokens, so that counts and tables of the paper mean nothing.
    """
    if not runner.shares:
        return COUNTS if asked is None else tuple(asked)
    if table is not None:
        raise InputError(
            "the tables of the paper are in counts of 576 visual tokens; pictures of this model have different numbers."
        )
    if any(isinstance(budget, int) for budget in asked or ()):
        raise InputError(
            "pictures of this model have different numbers of tokens. Give shares of them, such as --budgets 0.1,0.33."
        )
    return SHARES if asked is None else tuple(asked)


def at_share(name: str, share: float, layers: int) -> Method:
    """As ``at_count``, with a share of the tokens of each picture."""
    return _built(name, share).per_image().at_share(share, layers, at="last")


def _built(name: str, budget: Budget | None) -> Method:
    if not name.endswith(".json"):
        return get(name, **({} if budget is None else {"budget": budget}))
    method = Method.load(name)
    return method if budget is None else method.with_budget(budget)


def at_own_rule(name: str) -> Method | None:
    """A method with its own adaptive rule; None where it has none."""
    try:
        method = _built(name, None)
    except InputError:
        return None
    return method.per_image() if method.budget is None or method.made_for is not None else None


def kind_of(method: Method) -> str:
    """Where a method acts; one of ``KINDS``."""
    if method.name in BASELINES:
        return "baseline"
    if method.inside_decoder():
        return "inside the decoder"
    inside = isinstance(method.before_decoder(), EncoderReducer | PixelReducer)
    return "inside the encoder" if inside else "before the projector"


@dataclass
class Table:
    """What was found: outcomes of cells (name, budget), and why others are empty. A budget of None is the method's own rule."""

    runner: Runner
    methods: dict[tuple[str, Budget | None], Method] = field(default_factory=dict)
    outcomes: dict[tuple[str, Budget | None], Outcome] = field(default_factory=dict)
    missing: dict[tuple[str, Budget | None], str] = field(default_factory=dict)

    def run(self, name: str, budget: Budget | None, method: Method | None = None) -> None:
        """Fill a cell, or say why it stays empty."""
        if (name, budget) in self.outcomes or (name, budget) in self.missing:
            return
        try:
            method = method or self._at(name, budget or self.runner.total)
            self.outcomes[name, budget] = self.runner.outcome(method)
            self.methods[name, budget] = method
        except (InputError, UnsupportedModelError) as error:
            self.missing[name, budget] = str(error)

    def _at(self, name: str, budget: Budget) -> Method:
        if isinstance(budget, float):
            return at_share(name, budget, self.runner.layers)
        return at_count(name, budget, self.runner.total, self.runner.layers)

    def beside(self, name: str, mean: float) -> Outcome | None:
        """The run of a baseline nearest to a mean over layers; None where none is near."""
        runs = [outcome for (found, _), outcome in self.outcomes.items() if found == name]
        best = min(runs, key=lambda outcome: abs(outcome.mean - mean), default=None)
        return best if best is not None and abs(best.mean - mean) <= max(6.0, 0.1 * mean) else None

    def row(self, name: str, budget: Budget | None) -> dict[str, Any]:
        """One line of the long table."""
        outcome, method, scores = self.outcomes[name, budget], self.methods[name, budget], self.runner.scores
        accuracy, low, high = scores.interval(outcome.right)
        reading = np.isin(scores.families, READ)
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
        row["parts"] = self.runner.parts(outcome)
        row["seconds"] = outcome.seconds
        row["settings"] = method.settings() | _seeds(method)
        return row


def compare(
    runner: Runner, names: Sequence[str], budgets: Sequence[Budget], *, own: bool = True, tell: Tell = lambda *_: None
) -> dict[str, Any]:
    """All methods at all budgets and at their own rules, with baselines beside each; a JSON-able report.

    Parameters
    ----------
    runner : with the test set and the store.
    names : as ``check_methods`` returned them.
    budgets : visual tokens of ``TOTAL``, or shares of them.
    own : whether methods that have a rule of their own also follow it.
    tell : is told what comes next.
    """
    table, names = Table(runner), tuple(dict.fromkeys((*names, *BESIDE)))
    rules = {name: at_own_rule(name) for name in names}
    plans = {name for name, rule in rules.items() if rule is not None and rule.made_for is not None}  # have one setting
    jobs: list[tuple[str, Budget | None, Method | None]]
    jobs = [(name, budget, None) for name in names if name not in plans for budget in budgets]
    for name in names if own else plans:
        rule = rules[name]
        if rule is not None:
            jobs.append((name, None, rule))
    tell("all tokens", 0, len(jobs) + 1)
    whole = runner.outcome(None)
    for number, (name, budget, method) in enumerate(jobs, 1):
        tell(f"{name}, {budget or 'own rule'}", number, len(jobs) + 1)
        table.run(name, budget, method)
    means = [outcome.mean for (name, budget), outcome in table.outcomes.items() if outcome.mean != budget and name not in BASELINES]
    near = {runner.nearby(mean) for mean in means}
    counts = sorted(near - set(budgets))
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
        "total": runner.total,
        "all": dict(zip(("accuracy", "low", "high"), runner.scores.interval(whole.right), strict=True))
        | {"families": runner.scores.per_family(whole.right), "reading": _reading(runner, whole), "parts": runner.parts(whole)},
        "rows": [table.row(name, budget) | {"asked": (name, budget) in asked} for name, budget in table.outcomes],
        "missing": [
            {"method": name, "budget": budget, "reason": reason}
            for (name, budget), reason in table.missing.items()
            if (name, budget) in asked
        ],
        "notes": list(notes),
    }


def _seeds(method: Method) -> dict[str, Any]:
    """What differs between the runs that a row is the mean of."""
    each = [setting.settings() for setting in method.repeats()]
    varied = [name for name, value in each[0].items() if any(other[name] != value for other in each)]
    return {name: [setting[name] for setting in each] for name in varied}


def _reading(runner: Runner, outcome: Outcome) -> float | None:
    reading = np.isin(runner.scores.families, READ)
    return float(outcome.right[reading].mean()) if reading.any() else None
