"""VisPruner: Zhang et al., ICCV 2025 (arXiv 2412.01818)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError
from ..tokens import EncoderLayer, Reduction, VisualTokens, resolve_budget
from .base import ProjectorReducer
from .tools.scoring import cls_attention
from .tools.selection import cosines, rows_at_once, rows_of


@dataclass(kw_only=True)
class VisPruner(ProjectorReducer, name="vispruner", paper="https://arxiv.org/abs/2412.01818", adaptive=False):
    """A part of the tokens for their [CLS] attention, the others because they are unlike each other.

    The tokens with the highest attention in the layer that made the features stay. What is left loses duplicates in rounds
    (``without_duplicates``) until the budget is met. As in the released code, on the features before the projector, and in raster
    order; ``FasterVLM``, of the same paper's first version, is the case of ``important=1``.

    Parameters
    ----------
    important : share of the budget that goes by attention, rounded down.
    remove : tokens that go in each round; fewer in the last one.
    """

    reads_cls = True

    important: float = 0.5
    remove: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_range(important=0, remove=1)
        if self.important > 1:
            raise InputError(f"{self.name}: important={self.important}; it is a share and at most 1")

    def encoder_layers(self, depth: int) -> tuple[EncoderLayer, ...]:
        return ("aligned",)

    def reduce(self, tokens: VisualTokens) -> Reduction:
        scores = cls_attention(tokens.taps["aligned"])
        count = resolve_budget(self.budget, tokens.number) or tokens.number
        first = int(count * self.important)
        order = scores.argsort(dim=-1, descending=True, stable=True)
        kept = order[:, :first]
        if first < count:
            rest = without_duplicates(cosines(tokens.features), order[:, first:], count - first, self.remove)
            kept = torch.cat([kept, rest], 1)
        return Reduction(kept.sort(-1).values, scores=scores)


@torch.no_grad()
def without_duplicates(similar: Tensor, tokens: Tensor, count: int, remove: int) -> Tensor:
    """Remove those tokens, some at a time, that are most similar to others, until ``count`` are left.

    In each round those at even places are compared with those at odd places, and the ones go whose most similar partner is most
    similar; of several alike, the last in order. In the next round the even ones that stay come before the odd ones, the most
    similar in front.

    Parameters
    ----------
    similar : [B, N, N].
    tokens : [B, R] some of them, in the order of the first round.
    count : how many stay, from 1 on.
    remove : how many go in each round.

    Returns
    -------
    [B, count].
    """
    while tokens.shape[1] > count:
        even, odd = tokens[:, 0::2], tokens[:, 1::2]
        most, step = torch.empty_like(even, dtype=torch.float32), rows_at_once(similar.shape[2])
        for some, place in zip(even.split(step, 1), most.split(step, 1), strict=True):
            place.copy_(rows_of(similar, some).gather(2, odd[:, None].expand(-1, some.shape[1], -1)).amax(-1))
        alike = most.argsort(dim=-1, stable=True).flip(1)
        goes = min(remove, tokens.shape[1] - count)
        tokens = torch.cat([even.gather(1, alike[:, goes:]), odd], 1)
    return tokens
