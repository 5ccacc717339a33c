"""G-Search and P-Sigmoid: "Accelerating Multimodal LLMs by Searching Optimal Vision Token Reduction", Zhao et al., CVPR 2025.

Keep rates per decoder layer, found offline on a calibration set: the least ones that do not cost accuracy (G-Search), or a sigmoid
over depth tuned under a budget (P-Sigmoid). No code was released; see ``foveate.search`` for the search itself.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from ..cuts import Cut, PromptTokens
from ..errors import InputError
from ..tokens import Budget
from .base import DecoderReducer
from .scoring import prompt_attention, question_attention
from .selection import best_of_images

PAPER = "https://arxiv.org/abs/2412.00556"
FILLED = "a reconstruction: neither code, nor scoring query, nor the exact search of the paper could be read"


@dataclass(kw_only=True)
class Schedule(DecoderReducer):
    """A keep rate for each decoder layer; tokens are ranked by the attention of the layer before, among those that are left.

    Parameters
    ----------
    first : the first decoder layer that may run fewer tokens, where no plan says it. Rankings by layer 0 differ from all others, so
        less than 2 is not advised.
    query : who attends: the "last" token of the prompt, or all of the "question".
    """

    first: int = 2
    query: Literal["last", "question"] = "last"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_range(first=1)

    def keep_rates(self, layers: int, tokens: int | None) -> tuple[float, ...]:
        """What each layer runs of the ``tokens`` of an image that entered the decoder; never more than the layer before.

        ``tokens`` is None where no image is known yet and the budget is a fraction.
        """
        raise TypeError(f"{type(self).__name__} does not implement keep_rates(layers, tokens)")

    def cuts(self, layers: int) -> tuple[int, ...]:
        rates = self.keep_rates(layers, None)
        return tuple(layer for layer in range(1, layers) if rates[layer] < rates[layer - 1])

    def cut(self, tokens: PromptTokens) -> Cut:
        if self.query == "last":
            scores = prompt_attention(tokens, tokens.last[:, None]).mean(1)[:, 0]
        else:
            scores = question_attention(tokens)
        counts = torch.zeros_like(tokens.initial)
        for number in tokens.initial.unique().tolist():  # sizes of images, not images
            rate = self.keep_rates(tokens.layers, number)[tokens.layer] if number else 0.0
            counts = counts.masked_fill(tokens.initial == number, math.ceil(rate * number - 1e-6))
        return Cut(best_of_images(scores, tokens.of_image, counts), scores)

    def share(self, tokens: int | None) -> float:
        """The budget as a fraction of the tokens of an image."""
        if isinstance(self.budget, int):
            return min(1.0, self.budget / tokens) if tokens else 1.0
        return 1.0 if self.budget is None else self.budget


@dataclass(kw_only=True)
class GSearch(Schedule, name="g-search", paper=PAPER, adaptive=False, reconstruction=FILLED):
    """Keep rates per decoder layer from a search on your model and data (``foveate search``), saved as a small JSON plan.

    Without a plan, ``budget`` is the rate of all layers from ``first`` on.

    Parameters
    ----------
    plan : the file that ``foveate search`` wrote.
    rates : the keep rates themselves, one for each decoder layer, not increasing.
    """

    plan: str | None = None
    rates: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.plan is not None and self.rates is None:
            self.rates = read_plan(self.plan)
        if self.rates is None and self.budget is None:
            raise InputError(f"{self.name} needs a plan: run 'foveate search' and give plan=, or budget= for one rate.")
        super().__post_init__()
        if self.rates is None:
            return
        falling = all(a >= b for a, b in itertools.pairwise(self.rates))
        if not self.rates or not falling or not all(0 <= rate <= 1 for rate in self.rates) or self.rates[0] < 1:
            raise InputError(
                f"{self.name}: rates={self.rates}; expected one rate in [0, 1] for each decoder layer, beginning with 1 and "
                "not increasing"
            )
        if self.budget is not None:
            raise InputError(f"{self.name}: a plan and budget={self.budget}; give one of them")

    def needs_budget(self) -> bool:
        return self.rates is None

    def cuts(self, layers: int) -> tuple[int, ...]:
        return (self.first,) if self.rates is None else super().cuts(layers)

    def keep_rates(self, layers: int, tokens: int | None) -> tuple[float, ...]:
        if self.rates is None:
            return tuple(1.0 if layer < self.first else self.share(tokens) for layer in range(layers))
        if len(self.rates) != layers:
            raise InputError(
                f"{self.name}: the plan has {len(self.rates)} rates and this decoder {layers} layers; search on this model"
            )
        return self.rates


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


def read_plan(path: str | Path) -> tuple[float, ...]:
    """The keep rates in a file that ``foveate search`` wrote.

    Raises
    ------
    InputError : there is no such file, or it is no plan.
    """
    try:
        rates = json.loads(Path(path).expanduser().read_text())["rates"]
        if not isinstance(rates, list) or not all(isinstance(rate, int | float) and not isinstance(rate, bool) for rate in rates):
            raise TypeError("rates is no list of numbers")
        return tuple(float(rate) for rate in rates)
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise InputError(f"{path} is no plan of 'foveate search': {type(error).__name__}: {error}") from error
