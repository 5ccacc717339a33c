"""The second stage of image-text interaction (arXiv 2409.01162): visual tokens that the question hardly attends to leave."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..cuts import Cut, PromptTokens
from ..tokens import resolve_budget
from .base import DecoderReducer
from .inflection_cut import FILLED, PAPER
from .scope import coverage_first
from .tools.inflection import Detector, inflection_counts
from .tools.schedule import steps
from .tools.scoring import question_attention
from .tools.selection import best_of_images, cosines, counts_of_images, ranks


@dataclass(kw_only=True)
class TextRelevanceCut(DecoderReducer, name="text-relevance", paper=PAPER, reconstruction=FILLED):
    """Second stage: before some decoder layers, visual tokens that the question hardly attends to leave.

    The relevance of a token is the attention that text tokens after it pay it in the layer before, averaged over heads and over
    these text tokens; the same inflection rule as in the first stage then separates the head of the sorted curve.

    Parameters
    ----------
    budget : of each image, what is left from the last of these layers on, by equal shares at each; None = the inflection rule at
        each of them.
    layers : decoder layers before which tokens leave.
    detector, slope : of the inflection point, as in ``inflection_counts``.
    min_tokens : of each image, at least so many stay.
    choice : of visual tokens: the "head" of the sorted curve, or as many by "coverage": greedily those that cover the hidden states
        of their image best, times relevance to the power of ``alpha``. Ours, as in ``InflectionCut``.
    prune_text : also drop text of the question below its own inflection point, as version 1 of the paper does. The beginning of
        the prompt, special tokens and the last token always stay. AIM (arXiv 2412.03248) found that dropping text hurts.
    """

    layers: tuple[int, ...] = (2,)
    detector: Detector = "cumulative"
    slope: float = 1.0
    min_tokens: int = 4
    choice: Literal["head", "coverage"] = "head"
    alpha: float = 0.3
    prune_text: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_range(min_tokens=1, slope=0, alpha=0)
        self.check_layers()

    @property
    def removes_text(self) -> bool:  # type: ignore[override]
        return self.prune_text

    def cuts(self, layers: int) -> tuple[int, ...]:
        return self.layers

    def left(self, total: int, layers: int) -> list[float] | None:
        last = resolve_budget(self.budget, total)
        if last is None:
            return None
        shares = ((last / total) ** ((number + 1) / len(self.layers)) for number in range(len(self.layers)))
        left = (max(last, math.ceil(total * share - 1e-6)) for share in shares)
        return steps(total, layers, dict(zip(self.layers, left, strict=True)))

    def cut(self, tokens: PromptTokens) -> Cut:
        scores, of_image = question_attention(tokens), tokens.of_image
        counts = self._counts(tokens, scores, of_image)
        if self.choice == "head":
            keep = best_of_images(scores, of_image, counts)
        else:
            keep = covering_of_images(tokens.hidden, scores.double() ** self.alpha, of_image, counts)
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


def covering_of_images(hidden: Tensor, weight: Tensor, of_image: Tensor, counts: Tensor) -> Tensor:
    """[B, S] bool, of each image the tokens that cover it best, as ``coverage_first`` chooses them.

    Parameters
    ----------
    hidden : [B, S, D].
    weight : [B, S], not negative.
    of_image : [B, I, S] bool, the tokens of each image.
    counts : [B, I] how many to take.
    """
    batch, images, length = of_image.shape
    mine, wanted = of_image.flatten(0, 1), counts.flatten()
    # each image by itself, its tokens first: [B * I, M] columns of the prompt
    columns = (~mine).long().argsort(dim=1, stable=True)[:, : max(1, int(mine.sum(1).max()))]
    real = mine.gather(1, columns)
    row = torch.arange(batch, device=columns.device).repeat_interleave(images)[:, None]
    vectors, weights = hidden[row, columns] * real[..., None], weight[row, columns] * real
    few = hidden.device.type == "cpu"  # as in SCOPE
    order = coverage_first(cosines(vectors), weights, max(1, int(wanted.max())), few)
    step = torch.arange(order.shape[1], device=order.device).expand_as(order)
    place = torch.full_like(columns, length).scatter(1, order, step).masked_fill(~real, 2 * length)
    kept = (ranks(-place) < wanted[:, None]) & real
    return torch.zeros_like(mine).scatter(1, columns, kept).view(batch, images, length).any(1)
