"""Keep rates per decoder layer: what G-Search and P-Sigmoid (arXiv 2412.00556) have in common."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from ...cuts import Cut, PromptTokens
from ..base import DecoderReducer
from .scoring import prompt_attention, question_attention
from .selection import best_of_images

PAPER = "https://arxiv.org/abs/2412.00556"
FILLED = "a reconstruction: neither code, nor scoring query, nor the exact search of the paper could be read"


def steps(total: int, layers: int, left: dict[int, float]) -> list[float]:
    """Visual tokens of each of ``layers`` decoder layers, where ``left`` says how many stay from a layer on."""
    each = [float(total)] * layers
    for layer, count in sorted(left.items()):
        each[layer:] = [min(float(count), float(total))] * (layers - layer)
    return each


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

    def left(self, total: int, layers: int) -> list[float] | None:
        return [math.ceil(rate * total - 1e-6) for rate in self.keep_rates(layers, total)]

    def share(self, tokens: int | None) -> float:
        """The budget as a fraction of the tokens of an image."""
        if isinstance(self.budget, int):
            return min(1.0, self.budget / tokens) if tokens else 1.0
        return 1.0 if self.budget is None else self.budget
