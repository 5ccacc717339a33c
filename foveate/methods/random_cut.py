"""A random choice inside the decoder, which methods there do not beat after its first layers (arXiv 2512.07580): a baseline."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from typing_extensions import Self

from ..cuts import Cut, PromptTokens
from ..tokens import Budget, resolve_budget
from .base import DecoderReducer
from .baselines import SEEDS
from .tools.schedule import steps
from .tools.selection import best_of_images, counts_of_images


@dataclass(kw_only=True)
class RandomCut(DecoderReducer, name="random-cut", paper="https://arxiv.org/abs/2512.07580", adaptive=False):
    """Before decoder layer K a random choice of the visual tokens stays: what methods inside the decoder have to beat.

    Parameters
    ----------
    budget : visual tokens of each image that are left from layer K on.
    layer : K.
    seed : the choice is a function of the seed and of the place in the image, as of ``random``.
    """

    reads = "nothing"

    budget: Budget = 0.5
    layer: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_range(layer=1)

    def repeats(self) -> tuple[Self, ...]:
        return tuple(self.with_fields(seed=seed) for seed in SEEDS)

    def cuts(self, layers: int) -> tuple[int, ...]:
        return (self.layer,)

    def left(self, total: int, layers: int) -> list[float] | None:
        return steps(total, layers, {self.layer: resolve_budget(self.budget, total) or total})

    def cut(self, tokens: PromptTokens) -> Cut:
        place = (tokens.of_image.cumsum(-1) - 1).masked_fill(~tokens.of_image, 0).amax(1)  # of each visual token in its image
        drawn = torch.rand(int(place.max()) + 1, generator=torch.Generator().manual_seed(self.seed)).to(place.device)
        return Cut(best_of_images(drawn[place], tokens.of_image, counts_of_images(self.budget, tokens.initial)))
