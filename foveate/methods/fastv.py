"""FastV: Chen et al., ECCV 2024 (arXiv 2403.06764)."""

from __future__ import annotations

from dataclasses import dataclass

from ..cuts import Cut, PromptTokens
from ..tokens import Budget, resolve_budget
from .base import DecoderReducer
from .tools.schedule import steps
from .tools.scoring import prompt_attention
from .tools.selection import best_of_images, counts_of_images


@dataclass(kw_only=True)
class FastV(DecoderReducer, name="fastv", paper="https://arxiv.org/abs/2403.06764", adaptive=False):
    """Before decoder layer K only the visual tokens stay that the last token attends to most in layer K - 1.

    The released code takes one top-k over a single image, in layer K - 1 with eager attention; here each image of a prompt keeps a
    count of its own, and only the one row of attention is computed.

    Parameters
    ----------
    budget : visual tokens of each image that are left from layer K on; the paper removes R = 50 %.
    layer : K, 2 in the paper.
    """

    budget: Budget = 0.5
    layer: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_range(layer=1)

    def cuts(self, layers: int) -> tuple[int, ...]:
        return (self.layer,)

    def left(self, total: int, layers: int) -> list[float] | None:
        return steps(total, layers, {self.layer: resolve_budget(self.budget, total) or total})

    def cut(self, tokens: PromptTokens) -> Cut:
        scores = prompt_attention(tokens, tokens.last[:, None]).mean(1)[:, 0]
        return Cut(best_of_images(scores, tokens.of_image, counts_of_images(self.budget, tokens.initial)), scores)
