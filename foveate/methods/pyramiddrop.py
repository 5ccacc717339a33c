"""PyramidDrop: Xing et al., CVPR 2025 (arXiv 2410.17247)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..cuts import Cut, PromptTokens
from ..errors import InputError
from .base import DecoderReducer
from .tools.schedule import steps
from .tools.scoring import prompt_attention
from .tools.selection import best_of_images, stage_ratio


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
        self.check_layers()

    def cuts(self, layers: int) -> tuple[int, ...]:
        if self.layers is not None:
            return self.layers
        return tuple(sorted({-(-layers * quarter // 4) for quarter in (1, 2, 3)} - {0, layers}))

    def left(self, total: int, layers: int) -> list[float] | None:
        cuts, ratio = self.cuts(layers), self.ratio
        if self.budget is not None:
            ratio = float(stage_ratio(self.name, self.budget, torch.tensor([[total]]), cuts, layers))
        return steps(total, layers, {cut: int(total * ratio ** (stage + 1) + 1e-6) for stage, cut in enumerate(cuts)})

    def cut(self, tokens: PromptTokens) -> Cut:
        scores = prompt_attention(tokens, tokens.last[:, None]).mean(1)[:, 0]
        cuts = self.cuts(tokens.layers)
        ratio: Tensor | float = self.ratio
        if self.budget is not None:
            ratio = stage_ratio(self.name, self.budget, tokens.initial, cuts, tokens.layers)
        counts = (tokens.initial.double() * ratio ** (cuts.index(tokens.layer) + 1) + 1e-6).long()
        return Cut(best_of_images(scores, tokens.of_image, counts), scores)
