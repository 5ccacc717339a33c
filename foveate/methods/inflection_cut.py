"""The first stage of image-text interaction (arXiv 2409.01162): a cut at the inflection point of the sorted [CLS] similarity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from ..tokens import EncoderLayer, Reduction, VisualTokens, resolve_budget
from .base import ProjectorReducer
from .tools.inflection import Detector, inflection_counts
from .tools.scoring import cls_attention, cls_likeness
from .tools.selection import order_keys, ranks, take_in_order

PAPER = "https://arxiv.org/abs/2409.01162"
FILLED = "a reconstruction from the abstract: similarity, inflection detector, layers and text relevance are ours (docs/iti.md)"


@dataclass(kw_only=True)
class InflectionCut(ProjectorReducer, name="inflection", paper=PAPER, reconstruction=FILLED):
    """First stage: of each image the head of the sorted [CLS]-similarity curve stays, up to its inflection point, in raster order.

    Parameters
    ----------
    similarity : to [CLS]: its "attention" to the patches (head mean), or "cosine" or "dot" product of the layer's outputs.
    layer : of the encoder.
    detector, slope : of the inflection point, as in ``inflection_counts``.
    min_tokens : at least so many stay.
    """

    reads_cls = True
    without_cls = "the mean attention that each token receives, or the mean of all tokens, stands for [CLS]"

    similarity: Literal["attention", "cosine", "dot"] = "attention"
    layer: EncoderLayer = "last"
    detector: Detector = "cumulative"
    slope: float = 0.4
    min_tokens: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_range(min_tokens=1, slope=0)

    def encoder_layers(self, depth: int) -> tuple[EncoderLayer, ...]:
        return (self.layer,)

    def reduce(self, tokens: VisualTokens) -> Reduction:
        tap, budget = tokens.taps[self.layer], resolve_budget(self.budget, tokens.number)
        scores = cls_attention(tap) if self.similarity == "attention" else cls_likeness(tap, self.similarity)
        if budget is None:
            # products have no zero of their own: their curve is measured from its lowest point
            curve = scores if self.similarity == "attention" else scores - scores.amin(-1, keepdim=True)
            every = torch.ones_like(scores, dtype=torch.bool)
            counts = inflection_counts(curve, every, self.detector, self.min_tokens, self.slope)
        else:
            counts = scores.new_full((len(scores),), budget).long()
        kept = ranks(scores) < counts[:, None]
        index, valid = take_in_order(order_keys(scores, kept & False, kept), int(counts.max()))
        threshold = scores.masked_fill(~kept, float("inf")).amin(-1)
        return Reduction(index, valid if budget is None else None, scores=scores, threshold=threshold)
