"""Medians, quartiles, and ratios of paired rounds with an interval that says what is noise."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

COVERAGE = 0.95


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def median_interval(values: Sequence[float], coverage: float = COVERAGE) -> tuple[float, float] | None:
    """The narrowest interval between two of the values, as far from either end, that holds the median of what they are drawn from.

    It inverts the sign test: nothing is assumed about the noise but that rounds are independent. None where so few values reach
    the coverage with no pair; 95 % takes 6.
    """
    ordered, number = sorted(values), len(values)
    missed, best = 0.0, None
    for rank in range(number // 2):
        missed += 2 * math.comb(number, rank) / 2**number  # the median lies outside of the values of this rank from either end
        if 1 - missed < coverage:
            break
        best = ordered[rank], ordered[-1 - rank]
    return best


@dataclass(frozen=True)
class Ratio:
    """Time of a method over that of the unreduced model, from paired rounds.

    Attributes
    ----------
    median : of the ratios of the rounds.
    interval : of the median, None where there are too few rounds for one.
    """

    median: float
    interval: tuple[float, float] | None

    @property
    def verdict(self) -> str:
        """One of "faster", "slower", "no difference beyond noise" and "too few rounds to tell"."""
        if self.interval is None:
            return "too few rounds to tell"
        low, high = self.interval
        return "faster" if high < 1 else "slower" if low > 1 else "no difference beyond noise"

    def realised(self, ideal: float | None) -> tuple[float, float, float] | None:
        """Measured speed-up over the one that an ``ideal`` ratio promises: median and interval. None without an ideal, or where
        nothing beyond noise was gained.
        """
        if ideal is None or self.interval is None or self.verdict != "faster":
            return None
        low, high = self.interval
        return ideal / self.median, ideal / high, ideal / low


def paired(times: Sequence[float], base: Sequence[float]) -> Ratio | None:
    """The ratio of two ways of running, round by round: what both saw of the machine's noise cancels. None where ``base`` took no
    time.
    """
    if not min(base) > 0:
        return None
    ratios = [a / b for a, b in zip(times, base, strict=True)]
    return Ratio(statistics.median(ratios), median_interval(ratios))
