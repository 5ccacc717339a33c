"""VisionSelector: "End-to-End Learnable Visual Token Compression for Efficient Multimodal LLMs" (arXiv 2510.16598)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import FoveateError, InputError
from ..tokens import Budget, Reduction, VisualTokens, keep_all, resolve_budget
from .base import ProjectorReducer
from .networks.selector import Selector, hard_top, soft_top
from .tools.selection import best_in_order
from .trained import ModelShape, Trained


@dataclass(kw_only=True)
class VisionSelector(Trained, ProjectorReducer, name="visionselector", paper="https://arxiv.org/abs/2510.16598", adaptive=False):
    """The tokens with the highest scores of a small network that the loss of the answers has trained.

    It sees the tokens after the projector. A token's score is the mean of the products of its query with the keys of all tokens of
    the picture; both are linear maps to half the width. The highest ones stay, in raster order. Each picture is scored by itself.

    In training all tokens stay, each times its part in a soft choice: the sigmoid of its score plus a number that makes the parts
    sum to the budget. The loss is that of the answers, and ``w`` times the binary cross-entropy of the parts to the choice of the
    highest scores; ``w`` grows from ``begin`` to ``end`` with the steps. Everything else is frozen. Weights are trained at one
    budget and used at any. Questions of validation data are answered from the tokens that are chosen.

    As in the released training code for Qwen2.5-VL, which rounds the number of tokens down and scores all pictures of a prompt
    together.

    Parameters
    ----------
    begin, end : of ``w``.
    """

    reads_projected = True

    budget: Budget = 0.2
    begin: float = 0.1
    end: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_range(begin=0, end=0)

    def build(self, shape: ModelShape) -> nn.Module:
        return Selector(shape.width)

    def reduce(self, tokens: VisualTokens) -> Reduction:
        with torch.no_grad():
            projected, scores = self.scored(tokens)
        count = resolve_budget(self.budget, tokens.number) or tokens.number
        return Reduction(self.chosen(projected, scores, count), scores=scores)

    def scored(self, tokens: VisualTokens) -> tuple[Tensor, Tensor]:
        """[B, N, D] the tokens after the projector, and [B, N] their scores, both float32."""
        if tokens.projected is None:
            raise FoveateError(f"{self.name}: the projected features are missing. This is a fault of the engine.")
        projected = tokens.projected.float()
        return projected, self.module(projected)

    def chosen(self, projected: Tensor, scores: Tensor, count: int) -> Tensor:
        """[B, count] which tokens stay, in raster order, of [B, N, D] with scores [B, N]."""
        return best_in_order(scores, count)

    @property
    def pull(self) -> float:
        """``w`` in the step of training that is next."""
        return self.begin + (self.end - self.begin) * self.progress

    def objective(self, model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        """The loss of the answers with all tokens in their parts, and how far these are from a choice.

        Raises
        ------
        InputError : the budget is all tokens.
        """
        if not self.module.training:
            return model(**batch).loss, {}
        if self.keeps_all:
            raise InputError(f"{self.name}: with budget={self.budget} there is nothing to choose. Train it with a smaller one.")
        soft = Softened(self)
        with soft(model):
            answers = model(**batch).loss
        nothing = 0.0 * sum(weight.sum() for weight in self.module.parameters())  # of a batch without pictures
        if not soft.logits:
            return answers + nothing, {}
        undecided = F.binary_cross_entropy_with_logits(torch.cat(soft.logits), torch.cat(soft.hard))
        told = {"answers": answers.item(), "undecided": undecided.item(), "w": self.pull}
        return answers + self.pull * undecided, told


class Softened(ProjectorReducer):
    """What a selector is trained with: all tokens stay, each times its part. The logits of parts and the hard choices are kept."""

    reads_projected = True

    def __init__(self, selector: VisionSelector) -> None:
        super().__init__()
        self.selector = selector
        self.logits: list[Tensor] = []
        self.hard: list[Tensor] = []

    def reduce(self, tokens: VisualTokens) -> Reduction:
        every = keep_all(tokens.features)
        count = resolve_budget(self.selector.budget, tokens.number) or tokens.number
        if count == tokens.number:
            return every
        projected, scores = self.selector.scored(tokens)
        logits = soft_top(scores, count)
        self.logits.append(logits.flatten())
        self.hard.append(hard_top(scores, count).flatten())
        return Reduction(every.index, made=projected * logits.sigmoid()[..., None], space="decoder")
