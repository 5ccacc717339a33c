"""P-Sigmoid, the second scenario of arXiv 2412.00556 (Zhao et al., CVPR 2025): a keep rate that falls over depth as a sigmoid."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Literal

from typing_extensions import Self

from ..errors import InputError
from ..tokens import Budget
from .tools.schedule import FILLED, PAPER, Schedule


@dataclass(kw_only=True)
class PSigmoid(Schedule, name="p-sigmoid", paper=PAPER, adaptive=False, reconstruction=FILLED):
    """Keep rates that fall over depth as a sigmoid whose mean over layers is the budget.

    ``rate(l) = low + (high - low) / (1 + exp(steepness * (l - centre)))`` for layers l = 1 ... L; the budget gives the centre.

    Parameters
    ----------
    budget : mean keep rate over all decoder layers; 0.125 in the paper ("87.5 % fewer").
    steepness : per layer; None = 16 / L.
    low, high : what the sigmoid falls to, and from.
    """

    searched = "sigmoid"

    budget: Budget = 0.125
    steepness: float | None = None
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.low < self.high <= 1:
            raise InputError(f"{self.name}: low={self.low}, high={self.high}; expected 0 <= low < high <= 1")
        if self.steepness is not None and not self.steepness > 0:
            raise InputError(f"{self.name}: steepness={self.steepness}; it must be above 0")

    def at_budget(self, tokens: float, total: int, layers: int, at: Literal["mean", "last"] = "mean") -> Self:
        """As of any method; the last layer follows from the sigmoid, so that the mean is meant in any case."""
        return super().at_budget(tokens, total, layers)

    def cuts(self, layers: int) -> tuple[int, ...]:
        if isinstance(self.budget, int):  # the rates depend on the size of the image
            return tuple(range(self.first, layers))
        return super().cuts(layers)

    def keep_rates(self, layers: int, tokens: int | None) -> tuple[float, ...]:
        budget = self.share(tokens)
        least, most = ((self.first + (layers - self.first) * end) / layers for end in (self.low, self.high))
        if budget < least - 1e-9 or (budget > most + 1e-9 and budget < 1):
            raise InputError(
                f"{self.name}: budget={self.budget} is a mean over {layers} layers, and the first {self.first} run all tokens: "
                f"with low={self.low} and high={self.high} it is between {least:.1%} and {most:.1%} of the tokens."
            )
        steepness = 16 / layers if self.steepness is None else self.steepness
        return _sigmoid(min(budget, most), layers, self.first, steepness, self.low, self.high)


@functools.lru_cache(maxsize=1024)
def _sigmoid(budget: float, layers: int, first: int, steepness: float, low: float, high: float) -> tuple[float, ...]:
    """Rates whose mean is the budget, by bisection of the centre."""

    def rates(centre: float) -> tuple[float, ...]:
        def rate(layer: int) -> float:
            return low + (high - low) / (1 + math.exp(min(steepness * (layer + 1 - centre), 700.0)))

        return tuple(1.0 if layer < first else rate(layer) for layer in range(layers))

    below, above = -40.0 * layers - 800 / steepness, 40.0 * layers + 800 / steepness
    for _ in range(100):
        centre = (below + above) / 2
        below, above = (centre, above) if sum(rates(centre)) / layers < budget else (below, centre)
    return rates(below)
