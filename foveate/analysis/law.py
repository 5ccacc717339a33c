"""The law of QueCC (arXiv 2411.03312): how the error of a model falls with its size and with its visual tokens.

``Y = a N^-alpha V^-beta + D``: Y is 1 - mean score, N the size of the language model in billions of weights, V the visual tokens of
a picture. A prompt costs N (Q + V), where Q are its text tokens that no cache holds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError, first_line, shown
from ..jsonl import parsed

Array = NDArray[np.float64]
PUBLISHED = Path(__file__).with_name("law.json")
DRAWS = 200  # of the bootstrap
STEEPEST = 4.0  # alpha and beta that are looked at
SMALLEST, LARGEST = 1e-6, 1e12  # sizes, tokens and costs that are taken: beyond these, powers of them leave what floats hold
LEAST = 5  # points, for four unknowns
SHAPE = '{"tasks": {"NAME": [{"size": 7, "tokens": 144, "score": 0.52}, ...]}}'


@dataclass(frozen=True)
class Points:
    """Measured scores of one mix of tasks, in ascending order of size and tokens.

    Attributes
    ----------
    sizes : [P] billions of weights.
    tokens : [P] visual tokens of a picture.
    scores : [P] mean scores, shares of 1.

    Raises
    ------
    InputError : the law cannot be fitted to them.
    """

    sizes: Array
    tokens: Array
    scores: Array

    def __post_init__(self) -> None:
        order = np.lexsort((self.tokens, self.sizes))
        for name in ("sizes", "tokens", "scores"):
            object.__setattr__(self, name, np.asarray(getattr(self, name), float)[order])
        for what, values in (("size", self.sizes), ("number of tokens", self.tokens)):
            if len(set(values.tolist())) < 2:
                raise InputError(f"all points have one {what}, so that nothing tells what it does. Give at least two.")
        if len(self) and np.ptp(self.scores) == 0:
            raise InputError("all scores are the same, so that nothing tells what size and tokens do.")
        if len(self) < LEAST:
            raise InputError(f"{len(self)} points for a law of four numbers. Give at least {LEAST}.")
        twice = next((pair for pair in self.pairs if self.pairs.count(pair) > 1), None)
        if twice is not None:
            raise InputError(f"size {twice[0]:g} with {twice[1]:g} tokens is there twice. Give the mean of both.")

    def __len__(self) -> int:
        return len(self.sizes)

    @cached_property
    def pairs(self) -> list[tuple[float, float]]:
        """Size and tokens of each point."""
        return list(zip(self.sizes.tolist(), self.tokens.tolist(), strict=True))

    @property
    def errors(self) -> Array:
        """[P] what the law is about: 1 - score."""
        return 1 - self.scores

    def without(self, size: float) -> Points:
        """The points of other sizes."""
        left = self.sizes != size
        return Points(self.sizes[left], self.tokens[left], self.scores[left])

    def best(self, text: float, budget: float) -> int | None:
        """Number of the point with the highest score that costs at most ``budget``; None where all cost more."""
        fits = self.sizes * (text + self.tokens) <= budget
        return int(np.where(fits, self.scores, -1).argmax()) if fits.any() else None


@dataclass(frozen=True)
class Law:
    """``a N^-alpha V^-beta + floor``."""

    a: float
    alpha: float
    beta: float
    floor: float

    def error(self, sizes: Any, tokens: Any) -> Any:
        """Error of models of these sizes with these visual tokens."""
        return self.a * np.asarray(sizes, float) ** -self.alpha * np.asarray(tokens, float) ** -self.beta + self.floor

    def optimum(self, text: float) -> float:
        """V*, the visual tokens of the least error at a fixed cost N (text + V), where a model of any size can be had.

        ``text beta / (alpha - beta)``, and at least 1. Infinite where tokens help as much as size: no number below all is best.
        """
        if self.beta >= self.alpha:
            return math.inf
        return max(1.0, text * self.beta / (self.alpha - self.beta))

    def affordable(self, sizes: Sequence[float], text: float, budget: float, most: int) -> list[tuple[float, int, float]]:
        """(size, visual tokens, error) of the sizes that can be had, each with as many tokens as the budget allows.

        Parameters
        ----------
        sizes : of the models there are.
        text : tokens of a prompt beside the visual ones.
        budget : the most that N (text + V) may be.
        most : visual tokens of a picture without reduction.
        """
        tokens = [min(most, math.floor(budget / size - text + 1e-9)) for size in sizes]
        pairs = [(size, count) for size, count in zip(sizes, tokens, strict=True) if count >= 1]
        return [(size, count, float(self.error(size, count))) for size, count in pairs]


def fit(points: Points, floor: float | None = None) -> Law:
    """Least squares of the error over all four numbers; alpha and beta to 1e-6.

    For each alpha and beta, a and the floor follow exactly, the floor at least 0. A grid of alpha and beta is laid ever closer
    around its best pair.

    Parameters
    ----------
    points : what was measured.
    floor : the error that stays however large all is; None = fitted. It is hardly identified: alpha rises with it, and V* stays.
    """
    logs = np.stack([np.log(points.sizes), np.log(points.tokens)])
    middle, half, steps = np.array([0.5, 0.5]), 1.0, np.linspace(-1, 1, 17)
    for _ in range(100):  # some tables have their best pair at infinity
        alphas, betas = middle[0] + half * steps, middle[1] + half * steps
        powers = np.exp(-alphas[:, None, None] * logs[0] - betas[:, None] * logs[1])
        loss, _, _ = _linear(powers, points.errors, floor)
        row, column = np.unravel_index(int(loss.argmin()), loss.shape)
        middle = np.clip([alphas[row], betas[column]], -STEEPEST, STEEPEST)
        if 0 < row < len(steps) - 1 and 0 < column < len(steps) - 1:
            half *= 0.4  # three steps to each side, as the valley may lie across the grid
        if half < 1e-6:
            break
    alpha, beta = middle.tolist()
    _, a, rest = _linear(np.exp(-alpha * logs[0] - beta * logs[1]), points.errors, floor)
    return Law(float(a), alpha, beta, float(rest))


def _linear(powers: Array, errors: Array, floor: float | None) -> tuple[Array, Array, Array]:
    """Sum of squares [...], a [...] and floor [...] of the best ``a powers + floor``; powers are [..., P]."""
    given = 0.0 if floor is None else floor
    a = (powers * (errors - given)).sum(-1) / (powers**2).sum(-1)
    rest = np.full_like(a, given)
    if floor is None:
        spread = powers - powers.mean(-1, keepdims=True)
        free = np.maximum((spread * errors).sum(-1) / np.maximum((spread**2).sum(-1), 1e-300), 0)
        over = errors.mean() - free * powers.mean(-1)
        a, rest = np.where(over > 0, free, a), np.where(over > 0, over, rest)
    loss = ((a[..., None] * powers + rest[..., None] - errors) ** 2).sum(-1)
    return loss, a, rest


@dataclass(frozen=True)
class Study:
    """A law and how well the points hold it.

    Attributes
    ----------
    points, law : what was fitted, and the fit.
    draws : laws of a bootstrap: residuals are drawn anew and added to what the law says.
    """

    points: Points
    law: Law
    draws: tuple[Law, ...]

    @property
    def rmse(self) -> float:
        """Root of the mean squared residual."""
        return float(((self.law.error(self.points.sizes, self.points.tokens) - self.points.errors) ** 2).mean() ** 0.5)

    def interval(self, name: str) -> tuple[float, float]:
        """95 % interval of one of the four numbers."""
        return _interval([getattr(law, name) for law in self.draws])

    def optimum_interval(self, text: float) -> tuple[float, float]:
        """95 % interval of V*; its end is infinite where draws have no optimum."""
        return _interval([law.optimum(text) for law in self.draws])

    def left_out(self) -> dict[float, float]:
        """For each size the largest relative error that a law of the other sizes makes on it; {} where two are not left."""
        sizes = sorted(set(self.points.sizes.tolist()))
        return {size: _worst(self.points, size) for size in sizes if len(sizes) > 2 and (self.points.sizes != size).sum() >= LEAST}


def _worst(points: Points, size: float) -> float:
    law, held = fit(points.without(size)), points.sizes == size
    errors = points.errors[held]
    return float(np.abs(law.error(size, points.tokens[held]) / np.maximum(errors, 1e-12) - 1).max())


def _interval(values: list[float]) -> tuple[float, float]:
    low, high = np.quantile(values, [0.025, 0.975], method="inverted_cdf").tolist()
    return low, high


def study(points: Points, *, draws: int = DRAWS, seed: int = 0) -> Study:
    """Fit the law, and refit it to ``draws`` tables with residuals drawn anew."""
    law, random = fit(points), np.random.default_rng(seed)
    said = law.error(points.sizes, points.tokens)
    residuals = points.errors - said
    drawn = (said + random.choice(residuals, len(points)) for _ in range(draws))
    return Study(points, law, tuple(fit(Points(points.sizes, points.tokens, 1 - errors)) for errors in drawn))


# -- tables in files


def read_points(path: Path = PUBLISHED) -> dict[str, Points]:
    """Points by tasks from a JSON file: ``{"tasks": {"NAME": [{"size": 7, "tokens": 144, "score": 0.52}, ...]}}``.

    Raises
    ------
    InputError : the file cannot be read, has another form, or a number is out of range.
    """
    try:
        document = parsed(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{path} is no JSON ({first_line(error)}). Expected {SHAPE}") from error
    tasks = document.get("tasks") if isinstance(document, Mapping) else None
    if not isinstance(tasks, Mapping) or not tasks:
        raise InputError(f"{path} has no tasks. Expected {SHAPE}")
    found = {}
    for name, rows in tasks.items():
        where = f"{path}, {shown(name)}"
        if not isinstance(rows, list):
            raise InputError(f"{where}: expected a list of points. The form is {SHAPE}")
        numbers = [_point(f"{where}, point {number}", row) for number, row in enumerate(rows, 1)]
        try:
            found[name] = Points(*(np.array(numbers, float).reshape(-1, 3).T))
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
    return found


def _point(where: str, row: Any) -> tuple[float, float, float]:
    """Size, tokens and score of a point."""
    if not isinstance(row, Mapping) or not {"size", "tokens", "score"} <= set(row):
        raise InputError(f"{where}: expected an object with size, tokens and score. The form is {SHAPE}")
    for name in ("size", "tokens", "score"):
        value = row[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise InputError(f"{where}: {name} is {value!r}; expected a finite number. Leave out points that were not measured.")
    size, tokens, score = (float(row[name]) for name in ("size", "tokens", "score"))
    if not SMALLEST <= size <= LARGEST or not 1 <= tokens <= LARGEST:
        raise InputError(
            f"{where}: size {size:g}, tokens {tokens:g}; expected billions of weights from {SMALLEST:g} to {LARGEST:g}, and tokens "
            f"from 1 to {LARGEST:g}."
        )
    if not 0 <= score <= 1:
        how = "It looks like percent: divide all scores by 100." if 1 < score <= 100 else "Give mean scores as shares."
        raise InputError(f"{where}: the score is {score:g}; expected 0 to 1. {how}")
    return size, tokens, score
