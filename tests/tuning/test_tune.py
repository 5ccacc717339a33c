"""The search and its promise, on made-up settings whose losses are known."""

from __future__ import annotations

import numpy as np
import pytest

import foveate
from foveate.measuring.noise import Ratio
from foveate.tuning.answers import Answered
from foveate.tuning.bounds import Losses
from foveate.tuning.space import Setting, Space
from foveate.tuning.trial import Tuned
from foveate.tuning.tune import Tuner

SHARES = (0.9, 0.75, 0.6, 0.5, 0.4, 0.33, 0.25, 0.15, 0.08)
COARSE = (0.6, 0.4, 0.25, 0.15, 0.08)


class Book:
    """Answers that are drawn: a setting of a kind loses what ``loss`` says of its share, and gains a part of that, too."""

    def __init__(self, number: int, seed: int, scale: dict[str, float], gain: float = 0.3) -> None:
        self.examples = [None] * number
        self.groups = np.arange(number)
        self.chunks = [tuple(range(8))]
        self.random, self.scale, self.gain = np.random.default_rng(seed), scale, gain
        self.drawn: dict[str, np.ndarray] = {}
        self.asked: list[tuple[str, int]] = []

    def loss(self, kind: str, share: float) -> float:
        return min(0.55, self.scale[kind] * (1 - share) ** 3)

    def ask(self, method, numbers, watch=None):
        assert method is None
        return Answered([""] * len(numbers), np.ones(len(numbers)), 1.0, 1.0)

    def losses(self, method, numbers, watch=None):
        name = f"{method.name}/{method.budget}"
        if name not in self.drawn:
            mean = self.loss(method.name, method.budget)
            chances = [mean * (1 + self.gain), mean * self.gain, 1 - mean * (1 + 2 * self.gain)]
            self.drawn[name] = self.random.choice([1.0, -1.0, 0.0], size=len(self.examples), p=chances)
        self.asked.append((name, len(numbers)))
        values = self.drawn[name][list(numbers)]
        answered = Answered([""] * len(numbers), 1 - values, method.budget, 1.0)
        return Losses(values, self.groups[list(numbers)]), answered


class Cost:
    is_timed = True

    def __init__(self, book: Book, overhead: dict[str, float] | None = None) -> None:
        self.overhead = overhead or {}
        self.measured: list[str] = []

    def measure(self, methods, rounds, tell=None, seed=0):
        self.measured += methods
        found = {}
        for name, method in methods.items():
            value = method.budget + self.overhead.get(method.name, 0.0)
            found[name] = Ratio(value, (value - 0.01, value + 0.01))
        return found


def space(*kinds: str) -> Space:
    first, further = [], {}
    for kind in kinds:
        for place, share in enumerate(SHARES):
            setting = Setting(foveate.get(kind, budget=share), kind, f"{kind} {share}", place)
            (first if share in COARSE else further.setdefault(kind, [])).append(setting)
    return Space(first, further, {})


def tune(number: int, tolerance: float, seed: int, scale: dict[str, float], **overhead: float) -> tuple[Tuned, Book]:
    book = Book(number, seed, scale)
    tuner = Tuner(book, Cost(book, overhead), tolerance, lambda _: None)  # type: ignore[arg-type]
    return tuner.run(space(*scale)), book


def true_loss(tuned: Tuned, book: Book) -> float:
    assert tuned.chosen is not None
    method = tuned.chosen.setting.method
    return book.loss(method.name, method.budget)


def test_the_promise_holds():
    """200 tunings: what is chosen loses more than the tolerance in at most 5 % of them, and something is chosen mostly."""
    broken, chosen, savings = 0, 0, []
    scale = {"spatial": 0.3, "divprune": 0.12, "random": 0.5, "pool": 0.25}
    for seed in range(200):
        tuned, book = tune(600, 0.04, seed, scale)
        if tuned.chosen is not None:
            chosen += 1
            broken += true_loss(tuned, book) > 0.04
            savings.append(tuned.chosen.saving)
    assert broken <= 0.05 * 200 + 3 * (0.05 * 0.95 * 200) ** 0.5
    assert broken / max(1, chosen) <= 0.1
    assert chosen >= 150
    assert (
        np.median(savings) >= 0.5
    )  # 300 examples cannot tell the one that saves 67 %, and loses 3.6 points, from one that loses 4


def test_where_everything_loses_too_much_nothing_is_chosen():
    wrong = sum(tune(400, 0.02, seed, {"spatial": 4.0, "random": 4.0})[0].chosen is not None for seed in range(40))
    assert wrong <= 4  # a share of 90 % loses 0.4 points: some of these are right to be taken
    tuned, _ = tune(400, 0.02, 0, {"random": 0.62})
    assert tuned.impossible == {}


def test_few_examples_keep_all_tokens_and_say_how_many_would_do():
    tuned, _ = tune(100, 0.01, 0, {"spatial": 0.05, "divprune": 0.01})
    assert tuned.chosen is None
    assert "299 examples that the search has not seen" in tuned.reason
    assert tuned.needed is not None
    assert 399 <= tuned.needed <= 2000
    enough = sum(tune(tuned.needed, 0.01, seed, {"spatial": 0.05, "divprune": 0.01})[0].chosen is not None for seed in range(20))
    assert enough >= 15


def test_what_saves_nothing_is_not_chosen():
    tuned, _ = tune(400, 0.05, 0, {"divprune": 0.01}, divprune=1.0)
    assert tuned.chosen is None
    assert all("costs" in trial.verdict or trial.verdict.startswith(("dropped", "not")) for trial in tuned.trials if trial.cost)


def test_a_machine_that_was_busy_for_a_moment_drops_nothing():
    """The first look finds everything dear."""

    class Busy(Cost):
        def measure(self, methods, rounds, tell=None, seed=0):
            busy = not self.measured
            found = super().measure(methods, rounds, tell, seed)
            return {name: Ratio(9.0, None) for name in found} if busy else found

    book = Book(600, 3, {"spatial": 0.3, "divprune": 0.05})
    tuner = Tuner(book, Busy(book, {"spatial": 2.0}), 0.05, lambda _: None)  # type: ignore[arg-type]
    tuned = tuner.run(space("spatial", "divprune"))
    assert tuned.chosen is not None
    assert tuned.chosen.setting.kind == "divprune"


def test_the_test_never_sees_the_examples_of_the_search():
    book = Book(600, 3, {"spatial": 0.3, "divprune": 0.05})
    seen: list[tuple[str, frozenset[int]]] = []
    draw = book.losses

    def losses(method, numbers, watch=None):
        seen.append((f"{method.name}/{method.budget}", frozenset(numbers)))
        return draw(method, numbers, watch)

    book.losses = losses  # type: ignore[method-assign]
    tuner = Tuner(book, Cost(book), 0.05, lambda _: None)  # type: ignore[arg-type]
    tuned = tuner.run(space("spatial", "divprune"))
    assert tuned.chosen is not None
    assert not set(tuned.searched) & set(tuned.confirmed)
    for _, numbers in seen:
        assert numbers <= set(tuned.searched) or numbers <= set(tuned.confirmed)
    assert tuned.chosen.confirmed is not None
    assert len(tuned.chosen.confirmed.values) == len(tuned.confirmed)


def test_tests_share_one_level():
    """What passes hands its level on, what fails does not: all levels that were lost add up to no more than 5 %."""
    for seed in range(30):
        tuned, _ = tune(600, 0.05, seed, {"spatial": 0.3, "divprune": 0.2})
        tested = [trial for trial in tuned.trials if trial.confirmed is not None]
        failed = [trial for trial in tested if trial.verdict.startswith("failed")]
        assert sum(trial.level for trial in failed) <= 0.05 + 1e-12
        assert max((trial.level for trial in tested), default=0) <= 0.05 + 1e-12
        passed = [trial for trial in tested if trial not in failed]
        assert all(trial.verdict in ("accepted", "chosen") for trial in passed)
        if tuned.chosen is not None:
            assert tuned.bound is not None
            assert tuned.bound <= 0.05


def test_few_examples_are_not_divided():
    """Where the level can only be used once, the first test has all of it, and its failure ends everything."""
    for seed in range(20):
        tuned, _ = tune(130, 0.05, seed, {"spatial": 0.3, "divprune": 0.2})
        assert len(tuned.confirmed) < 2 * 59
        tested = [trial for trial in tuned.trials if trial.confirmed is not None]
        assert all(trial.level == 0.05 for trial in tested)
        assert sum(trial.verdict.startswith("failed") for trial in tested) <= 1


def test_hopeless_settings_get_few_examples():
    _, book = tune(800, 0.02, 0, {"divprune": 0.02, "random": 3.0})
    most = {name: max(number for other, number in book.asked if other == name) for name, _ in book.asked}
    assert most["random/0.08"] <= 32
    assert max(most.values()) > 300


def test_examples_of_one_picture_stay_together():
    book = Book(200, 0, {"spatial": 0.1})
    book.groups = np.arange(200) // 7
    tuner = Tuner(book, Cost(book), 0.05, lambda _: None)  # type: ignore[arg-type]
    assert not set(book.groups[tuner.searched]) & set(book.groups[tuner.confirmed])


def test_too_few_examples_at_all():
    book = Book(19, 0, {"spatial": 0.1})
    with pytest.raises(foveate.InputError, match="19 examples can be used; expected 20 or more"):
        Tuner(book, Cost(book), 0.05, lambda _: None)  # type: ignore[arg-type]


def test_a_time_limit_that_is_too_short():
    book = Book(200, 0, {"spatial": 0.1})
    tuner = Tuner(book, Cost(book), 0.05, lambda _: None, minutes=1e-9)  # type: ignore[arg-type]
    with pytest.raises(foveate.InputError, match="a quarter of the time limit is over"):
        tuner.run(space("spatial"))
