"""What a sample says of a mean loss: tests and one-sided bounds that hold on finite samples, and how many examples it takes.

The loss of an example is its score with all tokens minus its score with fewer, in [-1, 1]. A setting is accepted where the
hypothesis "it loses the tolerance or more" is rejected at 5 %.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]
LEVEL = 0.05
Z, POWER = 1.6449, 0.8416  # of 95 % and 80 % of a normal distribution
NUISANCES = 32  # shares of gains at which the exact test is computed
GUESSED = 4  # times the fewest examples, beyond which few examples tell nothing of how many are needed
USUAL = 30  # examples that what is usual counts for
BETS = (0.1, 0.2, 0.4, 0.7, 0.98)  # shares of what is held that are bet
WIDTH = 8  # standard deviations of a count that are summed over


@dataclass(frozen=True)
class Losses:
    """Losses of examples, and which of them belong together.

    Attributes
    ----------
    values : [N] in [-1, 1].
    groups : [N] numbers; examples about the same picture have the same.
    """

    values: Values
    groups: NDArray[np.int64]

    @property
    def mean(self) -> float:
        return float(self.values.mean())

    @cached_property
    def sums(self) -> tuple[Values, Values]:
        """Of each group, in order of appearance: the sum of its losses, and how many it has."""
        _, first, inverse = np.unique(self.groups, return_index=True, return_inverse=True)
        order = np.argsort(np.argsort(first))[inverse]
        return np.bincount(order, self.values).astype(float), np.bincount(order).astype(float)

    @property
    def is_plain(self) -> bool:
        """Whether examples stand alone and are only right or wrong, so that the exact test is for them."""
        return bool(np.isin(self.values, (-1, 0, 1)).all()) and len(self.sums[0]) == len(self.values)

    def first(self, number: int) -> Losses:
        """The first examples."""
        return Losses(self.values[:number], self.groups[:number])


# -- the exact test


def _statistic(losses: Values, gains: Values, number: int, tolerance: float) -> Values:
    """Tango's score of paired differences: how many standard errors the loss is below the tolerance.

    The variance is taken where the hypothesis is true and the counts are likeliest.
    """
    middle = losses * (1 + tolerance) + gains * (1 - tolerance) - 2 * number * tolerance
    share = (middle + np.sqrt(middle**2 + 8 * number * gains * tolerance * (1 - tolerance))) / (4 * number)
    spread = np.sqrt(np.maximum(2 * share + tolerance - tolerance**2, 1e-300) / number)
    found: Values = (tolerance - (losses - gains) / number) / spread
    return found


def _window(number: int, share: float) -> Values:
    """The counts of a binomial that have any weight."""
    middle, spread = number * share, math.sqrt(number * share * (1 - share))
    low, high = math.floor(middle - WIDTH * spread - WIDTH), math.ceil(middle + WIDTH * spread + WIDTH)
    return np.arange(max(0, low), min(number, high) + 1, dtype=float)


@lru_cache(100_000)
def exact_p_value(losses: int, gains: int, number: int, tolerance: float) -> float:
    """How likely so small a loss is, at most, where the true one is the tolerance: the exact unconditional test.

    Parameters
    ----------
    losses, gains : how many of ``number`` examples were right only with all tokens, and only with fewer.
    tolerance : in (0, 1).
    """
    factorials = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, number + 1)))])
    found = _statistic(np.array(float(losses)), np.array(float(gains)), number, tolerance) - 1e-9
    worst = 0.0
    for step in range(NUISANCES):
        gain = (1 - tolerance) / 2 * (step / NUISANCES) ** 2
        loss, same = gain + tolerance, 1 - 2 * gain - tolerance
        g = _window(number, gain)[:, None] if gain else np.zeros((1, 1))
        a = _window(number, loss)[None]
        rest = number - a - g
        ways = factorials[number] - sum(factorials[np.maximum(count, 0).astype(int)] for count in (a, g, rest))
        logs = ways + a * math.log(loss) + rest * math.log(same) + (g * math.log(gain) if gain else 0.0)
        inside = (rest >= 0) & (_statistic(a, g, number, tolerance) >= found)
        worst = max(worst, float(np.exp(logs, where=inside, out=np.zeros_like(logs)).sum()))
    return min(1.0, worst)


# -- the test by betting


def betting_p_value(losses: Losses, tolerance: float) -> float:
    """The same for losses of any kind and of groups of any size: one over the most that bets against the hypothesis won.

    Whoever bets, group after group, that the loss is below the tolerance cannot expect to win where it is not; 20 times the
    stake is had with at most 5 % (Ville; Waudby-Smith and Ramdas, arXiv 2010.09686). The stake is spread over bets of many
    sizes.
    """
    sums, sizes = losses.sums
    wins = (tolerance * sizes - sums) / sizes.max()
    bets = np.array(BETS)[:, None]
    held = np.cumsum(np.log1p(bets * wins), 1)
    most = held.max(0)
    capital = most + np.log(np.exp(held - most).mean(0))
    return float(min(1.0, math.exp(-max(0.0, float(capital.max())))))


def p_value(losses: Losses, tolerance: float) -> float:
    """Of the hypothesis that the mean loss is ``tolerance`` or more."""
    if not losses.is_plain:
        return betting_p_value(losses, tolerance)
    values = losses.values
    return exact_p_value(int((values > 0).sum()), int((values < 0).sum()), len(values), tolerance)


def upper_bound(losses: Losses, level: float = LEVEL) -> float:
    """The least tolerance that would be accepted: the mean loss is below it with a confidence of ``1 - level``; at least 0."""
    low, high = 0.0, 1.0
    for _ in range(14):
        middle = (low + high) / 2
        low, high = (low, middle) if p_value(losses, middle) <= level else (middle, high)
    return high


def hopeless(losses: Losses, tolerance: float, number: int, level: float = LEVEL) -> bool:
    """Whether the test on ``number`` examples fails even if no example of those that are not seen loses anything."""
    missing = number - len(losses.values)
    values = np.concatenate([losses.values, np.zeros(missing)])
    groups = np.concatenate([losses.groups, losses.groups.max(initial=0) + 1 + np.arange(missing)])
    return p_value(Losses(values, groups), tolerance) > level and losses.mean > 0


# -- what can be expected of more examples


@dataclass(frozen=True)
class Guess:
    """Mean loss and its spread, guessed from few examples: half a loss and half a gain are added, so that neither is 0.

    The mean is drawn towards what is usual, as much as if it had been seen on ``USUAL`` more examples: the best of many settings
    on few examples is mostly the luckiest.

    Attributes
    ----------
    mean : of an example.
    spread : standard deviation of an example, larger where examples that belong together lose together.
    number : of examples it was guessed from.
    """

    mean: float
    spread: float
    number: int

    @classmethod
    def of(cls, losses: Losses, usual: float | None = None) -> Guess:
        sums, sizes = losses.sums
        number = len(losses.values)
        mean = losses.mean * number / (number + 1)
        if usual is not None:
            mean = (number * mean + USUAL * usual) / (number + USUAL)
        within = float(((sums - mean * sizes) ** 2).sum()) + 1.0
        return cls(mean, math.sqrt(within / (number + 1)), number)

    def power(self, number: int, tolerance: float) -> float:
        """How likely a test on ``number`` other examples accepts."""
        if number < fewest(tolerance):
            return 0.0
        gap = tolerance - self.mean - Z * self.spread / math.sqrt(number)
        return _normal(gap / (self.spread * math.sqrt(1 / self.number + 1 / number)))

    def surely_loses(self, tolerance: float) -> bool:
        """Whether the loss is above the tolerance beyond reasonable doubt."""
        return self.mean - 1.3 * Z * self.spread / math.sqrt(self.number) > tolerance

    def needed(self, tolerance: float) -> int | None:
        """Examples with which a test accepts in four of five cases; None where the loss looks too large for any number.

        What was guessed from few examples is no more than a guess, and no more than ``GUESSED`` times the fewest are told.
        """
        gap = tolerance - self.mean
        if gap <= 0.05 * tolerance:
            return None
        wanted = math.ceil(((Z + POWER) * self.spread / gap) ** 2)
        most = wanted if self.number >= fewest(tolerance) else GUESSED * fewest(tolerance)
        return max(fewest(tolerance), min(wanted, most))


def fewest(tolerance: float) -> int:
    """Examples below which not even a setting that never changes an answer is accepted."""
    return math.ceil(math.log(LEVEL) / math.log1p(-tolerance)) if tolerance < 1 else 1


def _normal(value: float) -> float:
    return 0.5 * math.erfc(-value / math.sqrt(2))


def falling(values: list[float], weights: list[float]) -> list[float]:
    """The nearest values that never rise: least squares, neighbours that do are joined (isotonic regression)."""
    blocks: list[list[float]] = []  # mean, weight, length
    for value, weight in zip(values, weights, strict=True):
        blocks.append([value, weight, 1])
        while len(blocks) > 1 and blocks[-2][0] < blocks[-1][0]:
            mean, weight, length = blocks.pop()
            other = blocks[-1]
            other[0] = (other[0] * other[1] + mean * weight) / (other[1] + weight)
            other[1], other[2] = other[1] + weight, other[2] + length
    return [mean for mean, _, length in blocks for _ in range(int(length))]
