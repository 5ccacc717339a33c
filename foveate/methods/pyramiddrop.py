"""PyramidDrop: Xing et al., CVPR 2025 (arXiv 2410.17247)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..cuts import Cut, PromptTokens
from ..errors import InputError
from .base import DecoderReducer
from .scoring import prompt_attention
from .selection import best_of_images


@dataclass(kw_only=True)
class PyramidDrop(DecoderReducer, name="pyramiddrop", paper="https://arxiv.org/abs/2410.17247"):
    """Visual tokens become fewer in stages, by the attention that the last token of the question is about to pay them.

    At each stage the layer that follows is asked: its queries and keys on the hidden states that are about to enter it. What is
    left is renumbered, as in the released code; ``positions="original"`` keeps places.

    Parameters
    ----------
    budget : visual tokens of each image, averaged over decoder layers; None = what ``ratio`` gives (47 % with 32 layers).
    layers : where stages begin; None = after each quarter of the decoder, which is 8, 16, 24 of 32 as in the paper.
    ratio : what a stage leaves of the one before, lambda in the paper.
    """

    reads = "own"

    layers: tuple[int, ...] | None = None
    ratio: float = 0.5
    positions: Literal["compact", "original"] = "compact"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.ratio <= 1:
            raise InputError(f"{self.name}: ratio={self.ratio}; it must be in (0, 1]")
        if self.layers is not None:
            self.layers = tuple(self.layers)
            if not self.layers or list(self.layers) != sorted(set(self.layers)):
                raise InputError(f"{self.name}: layers={self.layers}; expected different layers in ascending order")

    def cuts(self, layers: int) -> tuple[int, ...]:
        if self.layers is not None:
            return self.layers
        return tuple(sorted({-(-layers * quarter // 4) for quarter in (1, 2, 3)} - {0, layers}))

    def cut(self, tokens: PromptTokens) -> Cut:
        scores = prompt_attention(tokens, tokens.last[:, None]).mean(1)[:, 0]
        stage = self.cuts(tokens.layers).index(tokens.layer) + 1
        counts = (tokens.initial * self._ratio(tokens) ** stage + 1e-6).long()
        return Cut(best_of_images(scores, tokens.of_image, counts), scores)

    def _ratio(self, tokens: PromptTokens) -> Tensor:
        """[B, I] what a stage leaves, so that the mean over layers is the budget."""
        initial = tokens.initial.double()
        if self.budget is None:
            return torch.full_like(initial, self.ratio)
        share = self.budget / initial.clamp(min=1) if isinstance(self.budget, int) else torch.full_like(initial, self.budget)
        edges = (0, *self.cuts(tokens.layers), tokens.layers)
        runs = [(end - begin) / tokens.layers for begin, end in zip(edges, edges[1:], strict=False)]
        if bool(((share < runs[0]) & (initial > 0)).any()):
            raise InputError(
                f"{self.name}: budget={self.budget} is a mean over layers, and layers 0 to {edges[1] - 1} run all tokens: it cannot be "
                f"below {runs[0]:.1%}. Give earlier layers=, or a larger budget."
            )
        low, high = torch.zeros_like(share), torch.ones_like(share)
        for _ in range(40):
            middle = (low + high) / 2
            more = sum(length * middle**stage for stage, length in enumerate(runs)) < share
            low, high = torch.where(more, middle, low), torch.where(more, high, middle)
        return high
