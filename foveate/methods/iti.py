"""Image-text interaction: "Balancing Performance and Efficiency", Chen et al., 2024 (arXiv 2409.01162).

Visual tokens are cut twice: before the projector at the inflection point of the sorted similarity to [CLS], and inside the decoder
by their relevance to the text. Neither full text nor code could be read: the abstract says what is done, not how. docs/iti.md lists
what the paper specifies and what was filled in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import Self

from ..cuts import Cut, PromptTokens
from ..errors import InputError
from ..tokens import Budget, EncoderLayer, Reduction, VisualTokens, check_budget, resolve_budget
from .base import DecoderReducer, Method, TokenReducer
from .inflection import Detector, inflection_counts
from .scoring import cls_attention, cls_likeness, question_attention
from .selection import best_of_images, counts_of_images, order_keys, ranks, take_in_order

PAPER = "https://arxiv.org/abs/2409.01162"
FILLED = "a reconstruction from the abstract: similarity, inflection detector, layers and text relevance are ours (docs/iti.md)"


@dataclass(kw_only=True)
class InflectionCut(TokenReducer, name="inflection", paper=PAPER, reconstruction=FILLED):
    """First stage: of each image the head of the sorted [CLS]-similarity curve stays, up to its inflection point, in raster order.

    Parameters
    ----------
    similarity : to [CLS]: its "attention" to the patches (head mean), or "cosine" or "dot" product of the layer's outputs.
    layer : of the encoder.
    detector, slope : of the inflection point, as in ``inflection_counts``.
    min_tokens : at least so many stay.
    """

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


@dataclass(kw_only=True)
class TextRelevanceCut(DecoderReducer, name="text-relevance", paper=PAPER, reconstruction=FILLED):
    """Second stage: before some decoder layers, visual tokens that the question hardly attends to leave.

    The relevance of a token is the attention that text tokens behind it pay it in the layer before, averaged over heads and over
    these text tokens; the same inflection rule as in the first stage then separates the head of the sorted curve.

    Parameters
    ----------
    budget : of each image, what is left from the last of these layers on, by equal shares at each; None = the inflection rule at
        each of them.
    layers : decoder layers before which tokens leave.
    detector, slope : of the inflection point, as in ``inflection_counts``.
    min_tokens : of each image, at least so many stay.
    prune_text : also drop text of the question below its own inflection point, as version 1 of the paper does. The beginning of
        the prompt, special tokens and the last token always stay. AIM (arXiv 2412.03248) found that dropping text hurts.
    """

    layers: tuple[int, ...] = (2,)
    detector: Detector = "cumulative"
    slope: float = 1.0
    min_tokens: int = 4
    prune_text: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_range(min_tokens=1, slope=0)
        self.check_layers()

    @property
    def removes_text(self) -> bool:  # type: ignore[override]
        return self.prune_text

    def cuts(self, layers: int) -> tuple[int, ...]:
        return self.layers

    def cut(self, tokens: PromptTokens) -> Cut:
        scores, of_image = question_attention(tokens), tokens.of_image
        keep = best_of_images(scores, of_image, self._counts(tokens, scores, of_image))
        if self.prune_text:
            question = (tokens.question & ~tokens.protected)[:, None]
            keep = keep | best_of_images(
                scores, question, inflection_counts(scores, question[:, 0], self.detector, slope=self.slope)[:, None]
            )
        return Cut(keep, scores)

    def _counts(self, tokens: PromptTokens, scores: Tensor, of_image: Tensor) -> Tensor:
        """[B, I] tokens that each image keeps."""
        if self.budget is not None:
            done = (self.layers.index(tokens.layer) + 1) / len(self.layers)
            last = counts_of_images(self.budget, tokens.initial)
            share = (last.double() / tokens.initial.clamp(min=1)) ** done
            return (tokens.initial * share - 1e-6).ceil().long().maximum(last)
        rows, images, length = of_image.shape
        every = scores[:, None].expand(-1, images, -1).reshape(-1, length)
        counts = inflection_counts(every, of_image.reshape(-1, length), self.detector, self.min_tokens, self.slope)
        return counts.view(rows, images)


@dataclass(kw_only=True)
class ITI(Method, name="iti", paper=PAPER, reconstruction=FILLED):
    """Both stages: an inflection cut by [CLS] before the projector, and one by relevance to the text inside the decoder.

    Parameters
    ----------
    budget : visual tokens that enter the decoder; None = the inflection rule. A budget that covers all tokens leaves the model as
        it is, without a second stage (which is there by itself as ``text-relevance``).
    second : what the second stage keeps: a count, or a share of what entered the decoder; None = its inflection rule.
    similarity, layer, detector, slope : of the first stage, as in ``InflectionCut``; the detector is that of the second stage, too.
    second_slope : of the second stage. Both are calibrated so that on the pocket model decoder layers run 22 % of the visual tokens
        on average, which is how we read the paper's "average of 22 % of the original token quantity".
    layers : of the second stage, as in ``TextRelevanceCut``.
    prune_text : as in ``TextRelevanceCut``.
    """

    stage = "before the projector and inside the decoder"

    second: Budget = None
    similarity: Literal["attention", "cosine", "dot"] = "attention"
    layer: EncoderLayer = "last"
    detector: Detector = "cumulative"
    slope: float = 0.4
    second_slope: float = 1.0
    layers: tuple[int, ...] = (2,)
    prune_text: bool = False
    positions: Literal["compact", "original"] = "original"

    @classmethod
    def paper(cls, **fields: Any) -> Self:
        """As the first version says: text with low relevance leaves, too."""
        return cls(**{**dict(prune_text=True), **fields})

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            check_budget(self.second)
        except InputError as error:
            raise InputError(str(error).replace("budget", "second", 1)) from error
        if self.budget == 1.0 and isinstance(self.budget, float) and self.second is not None:
            raise InputError(f"{self.name}: budget=1.0 leaves the model as it is, and second={self.second}; use 'text-relevance'")
        self.before_decoder(), self.inside_decoder()  # raise what they have to say of the fields now

    def before_decoder(self) -> TokenReducer:
        return InflectionCut(
            budget=self.budget,
            similarity=self.similarity,
            layer=self.layer,
            detector=self.detector,
            slope=self.slope,
            positions=self.positions,
        )

    def inside_decoder(self) -> tuple[DecoderReducer, ...]:
        return (
            TextRelevanceCut(
                budget=self.second,
                layers=self.layers,
                detector=self.detector,
                slope=self.second_slope,
                prune_text=self.prune_text,
                positions=self.positions,
            ),
        )
