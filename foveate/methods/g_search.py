"""G-Search and P-Sigmoid: "Accelerating Multimodal LLMs by Searching Optimal Vision Token Reduction", Zhao et al., CVPR 2025.

Keep rates per decoder layer, found offline on a calibration set: the least ones that do not cost accuracy (G-Search), or a sigmoid
over depth tuned under a budget (P-Sigmoid). No code was released; see ``foveate.search`` for the search itself.
"""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import dataclass
from numbers import Real
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
    first : the first decoder layer that may run fewer tokens. Rankings by layer 0 differ from all others, so 2 is the least.
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
        if isinstance(self.budget, int):
            return tuple(range(self.first, layers))
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
        if self.rates is not None:
            self.rates = tuple(self.rates)
            falling = all(a >= b for a, b in itertools.pairwise(self.rates))
            shares = all(isinstance(rate, Real) and 0 <= rate <= 1 for rate in self.rates)
            if not self.rates or not falling or not shares or self.rates[0] < 1:
                raise InputError(
                    f"{self.name}: rates={self.rates}; expected one rate in [0, 1] for each decoder layer, beginning with 1 and "
                    "not increasing"
                )
            if self.budget is None:
                self.budget = max(sum(self.rates) / len(self.rates), 1e-6)
        elif self.budget is None:
            raise InputError(f"{self.name} needs a plan: run 'foveate search' and give plan=, or budget= for one rate.")
        super().__post_init__()

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

    def keep_rates(self, layers: int, tokens: int | None) -> tuple[float, ...]:
        steepness = 16 / layers if self.steepness is None else self.steepness
        budget, least = self.share(tokens), (self.first + (layers - self.first) * self.low) / layers
        if budget < least:
            raise InputError(
                f"{self.name}: budget={self.budget} is a mean over {layers} layers, and the first {self.first} run all tokens: it "
                f"cannot be below {least:.1%} of the tokens. Give an earlier first=, a smaller low= or a larger budget."
            )
        most = (self.first + (layers - self.first) * self.high) / layers
        if budget >= most:
            return tuple(1.0 if layer < self.first else self.high for layer in range(layers))

        def rates(centre: float) -> tuple[float, ...]:
            def rate(layer: int) -> float:
                return self.low + (self.high - self.low) / (1 + math.exp(min(steepness * (layer + 1 - centre), 700.0)))

            return tuple(1.0 if layer < self.first else rate(layer) for layer in range(layers))

        below, above = -40.0 * layers, 40.0 * layers
        for _ in range(80):
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
        return tuple(float(rate) for rate in rates)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is no plan of 'foveate search': {type(error).__name__}: {error}") from error
