"""The first stage of image-text interaction (arXiv 2409.01162): a cut at the inflection point of the sorted [CLS] similarity.

The paper's abstract says how many tokens stay: the head of the curve. Which ones may be the head itself, or as many that stand for
the whole picture, which is ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..errors import InputError
from ..tokens import EncoderLayer, Reduction, VisualTokens, resolve_budget
from .base import ProjectorReducer
from .scope import coverage_first
from .tools.inflection import Detector, inflection_counts
from .tools.scoring import cls_attention, cls_likeness
from .tools.selection import cosines, order_keys, ranks, take_in_order

PAPER = "https://arxiv.org/abs/2409.01162"
GRIDS = (1 / 3, 1 / 2, 2 / 3, 1.0)  # of rows and of columns: 64, 144, 256 and 576 of 24 x 24 tokens
FILLED = "a reconstruction from the abstract: similarity, inflection detector, layers and text relevance are ours (docs/iti.md)"


@dataclass(kw_only=True)
class InflectionCut(ProjectorReducer, name="inflection", paper=PAPER, reconstruction=FILLED):
    """First stage: of each image as many tokens stay as the head of the sorted [CLS]-similarity curve has, in raster order.

    Parameters
    ----------
    similarity : to [CLS]: its "attention" to the patches (head mean), or "cosine" or "dot" product of the layer's outputs.
    layer : of the encoder; "both" = the geometric mean of the attention in the last layer and in the one that makes the features.
    detector, slope : of the inflection point, as in ``inflection_counts``.
    min_tokens : at least so many stay.
    whole_grid : round the count up to that of a grid with a third, a half or two thirds of the rows and columns, or to all.
    choice : the "head" itself, or as many tokens by "coverage": greedily those that cover the features of the picture best, times
        similarity to the power of ``alpha``, as SCOPE does (arXiv 2510.24214).
    """

    reads_cls = True
    without_cls = "the mean attention that each token receives, or the mean of all tokens, stands for [CLS]"

    similarity: Literal["attention", "cosine", "dot"] = "attention"
    layer: EncoderLayer | Literal["both"] = "last"
    detector: Detector = "cumulative"
    slope: float = 0.4
    min_tokens: int = 16
    whole_grid: bool = False
    choice: Literal["head", "coverage"] = "head"
    alpha: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_range(min_tokens=1, slope=0, alpha=0)
        if self.layer == "both" and self.similarity != "attention":
            message = f"layer='both' is a mean of attentions, and similarity={self.similarity!r}; give layer='last', too"
            raise InputError(f"{self.name}: {message}")

    def encoder_layers(self, depth: int) -> tuple[EncoderLayer, ...]:
        return ("last", "aligned") if self.layer == "both" else (self.layer,)

    def reduce(self, tokens: VisualTokens) -> Reduction:
        scores, budget = self.likeness(tokens), resolve_budget(self.budget, tokens.number)
        # products have no zero of their own: their curve is measured from its lowest point
        curve = scores if self.similarity == "attention" else scores - scores.amin(-1, keepdim=True)
        if budget is None:
            every = torch.ones_like(scores, dtype=torch.bool)
            counts = inflection_counts(curve, every, self.detector, self.min_tokens, self.slope)
            counts = whole_grids(counts, tokens.grid) if self.whole_grid else counts
        else:
            counts = scores.new_full((len(scores),), budget).long()
        place = ranks(scores)
        if self.choice == "coverage":
            few = scores.device.type == "cpu"  # as in SCOPE
            order = coverage_first(cosines(tokens.features), curve.double() ** self.alpha, int(counts.max()), few)
            step = torch.arange(order.shape[1], device=order.device).expand_as(order)
            place = torch.full_like(place, tokens.number).scatter(1, order, step)
        kept = place < counts[:, None]
        index, valid = take_in_order(order_keys(scores, kept & False, kept), int(counts.max()))
        threshold = scores.masked_fill(~kept, float("inf")).amin(-1) if self.choice == "head" else None
        return Reduction(index, valid if budget is None else None, scores=scores, threshold=threshold)

    def likeness(self, tokens: VisualTokens) -> Tensor:
        """[B, N] similarity of each patch to [CLS]."""
        if self.layer == "both":
            return cls_attention(tokens.taps["last"]).sqrt() * cls_attention(tokens.taps["aligned"]).sqrt()
        tap = tokens.taps[self.layer]
        return cls_attention(tap) if self.similarity == "attention" else cls_likeness(tap, self.similarity)


def whole_grids(counts: Tensor, grid: tuple[int, int]) -> Tensor:
    """[B] counts rounded up to those of a part of a grid: the ``GRIDS`` of its rows and columns."""
    sizes = [math.ceil(part * grid[0] - 1e-6) * math.ceil(part * grid[1] - 1e-6) for part in GRIDS]
    steps = torch.tensor(sizes, device=counts.device)
    return steps[(counts[:, None] > steps).sum(-1).clamp(max=len(sizes) - 1)]
