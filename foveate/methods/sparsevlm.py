"""SparseVLM: Zhang et al., ICML 2025 (arXiv 2410.04417)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import Self

from ..cuts import Cut, PromptTokens
from ..errors import InputError
from ..tokens import Budget
from .base import DecoderReducer
from .tools.merging import cluster_weights, normalised
from .tools.raters import raters
from .tools.schedule import steps
from .tools.scoring import mean_attention
from .tools.selection import best_of_images, stage_ratio

# what is left of 576 after each stage in the released code, by the name of the setting
RELEASED: dict[Budget, tuple[int, ...]] = {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)}


@dataclass(kw_only=True)
class SparseVLM(DecoderReducer, name="sparsevlm", paper="https://arxiv.org/abs/2410.04417"):
    """Text tokens that matter to the picture rate the visual tokens; the best of what is deleted is clustered and comes back.

    Raters are the question's tokens whose share of the visual tokens' attention, by dot products of embeddings, is above the mean.
    A visual token scores the attention that the raters pay it in the layer before a cut. Recycled tokens sit at the place of the
    centre of their cluster, so that order is kept (the code appends them).

    Parameters
    ----------
    budget : visual tokens of each image, averaged over decoder layers (without recycled ones); None = by the rank rule.
    layers : decoder layers before which tokens are deleted; None = 3, 7 and 16 of 32 (after layers 2, 6 and 15), in proportion.
    scale : of the rank rule: ``scale * (tokens - rank)`` are deleted, rank being that of the attention from raters to tokens. The
        paper gives no value that could be read.
    recycle : share of the deleted tokens that is clustered, the best ones (0.3 in the code); 0 = none.
    cluster : one cluster for so many recycled tokens (10 in the code), and one more.
    combine : a cluster becomes the "mean" (code) or the "sum" (paper) of its tokens.
    counts : of 576 tokens, what each stage leaves (the code); it replaces budget and rank rule.
    """

    instead_of_budget = ("counts",)

    layers: tuple[int, ...] | None = None
    scale: float = 0.5
    recycle: float = 0.3
    cluster: int = 10
    combine: Literal["mean", "sum"] = "mean"
    counts: tuple[int, ...] | None = None
    positions: Literal["compact", "original"] = "compact"

    @classmethod
    def paper(cls, **fields: Any) -> Self:
        """The rank rule, and clusters that are sums."""
        return cls(**{**dict(combine="sum"), **fields})

    @classmethod
    def released(cls, budget: Budget = 192, **fields: Any) -> Self:
        """The fixed counts of the released code (version 1) for its settings 192, 128, 96 and 64; any other budget as usual."""
        return cls(**{**dict(budget=budget, counts=RELEASED.get(budget)), **fields})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_range(recycle=0, scale=0, cluster=1)
        if self.recycle > 1 or self.scale > 1:
            raise InputError(f"{self.name}: recycle={self.recycle}, scale={self.scale}; both are shares and at most 1")
        self.check_layers()
        if self.counts is not None and len(self.counts) != (3 if self.layers is None else len(self.layers)):
            raise InputError(f"{self.name}: counts={self.counts}; expected one for each stage")

    def cuts(self, layers: int) -> tuple[int, ...]:
        if self.layers is not None:
            return self.layers
        return tuple(sorted({min(layers - 1, max(1, round(layer * layers / 32))) for layer in (3, 7, 16)}))

    def left(self, total: int, layers: int) -> list[float] | None:
        cuts = self.cuts(layers)
        if self.counts is not None:
            return self._with_recycled(total, layers, [total * count // 576 for count in self.counts])
        if self.budget is None:
            return None
        ratio = float(stage_ratio(self.name, self.budget, torch.tensor([[total]]), cuts, layers))
        return self._with_recycled(total, layers, [int(total * ratio ** (stage + 1) + 1e-6) for stage in range(len(cuts))])

    def _with_recycled(self, total: int, layers: int, counts: Sequence[int]) -> list[float]:
        """Visual tokens of each layer, where ``counts`` say how many stay in each stage."""
        left: dict[int, float] = {}
        now = total
        for cut, count in zip(self.cuts(layers), counts, strict=False):
            kept = min(count, now)
            deleted = now - kept
            some = min(int(self.recycle * deleted + 1), deleted) if self.recycle else 0
            left[cut] = now = kept + min(some // self.cluster + 1, some)
        return steps(total, layers, left)

    def cut(self, tokens: PromptTokens) -> Cut:
        rows, rating = raters(tokens)
        attention = mean_attention(tokens, rows) * rating[..., None]
        scores = attention.sum(1) / rating.sum(1, keepdim=True).clamp(min=1)
        of_image = tokens.of_image
        counts = self._counts(tokens, attention)
        keep = best_of_images(scores, of_image, counts)
        deleted = of_image & ~keep[:, None]
        number = deleted.sum(-1)
        if self.recycle == 0 or not bool(number.any()):
            return Cut(keep, scores)
        some = torch.where(number > 0, (self.recycle * number + 1).long(), 0).minimum(number)
        pool = of_image & best_of_images(scores, deleted, some)[:, None]
        clusters = torch.where(number > 0, some // self.cluster + 1, 0).minimum(some)
        centres, target, mix = cluster_weights(tokens.hidden, pool, clusters)
        mix = mix if self.combine == "sum" else normalised(mix)
        return Cut(keep | centres, scores, target, mix)

    def _counts(self, tokens: PromptTokens, attention: Tensor) -> Tensor:
        """[B, I] tokens that stay, recycled ones not counted."""
        cuts, initial = self.cuts(tokens.layers), tokens.initial
        stage = cuts.index(tokens.layer)
        if self.counts is not None:
            return (initial * self.counts[stage]).div(576, rounding_mode="floor")
        if self.budget is not None:
            ratio = stage_ratio(self.name, self.budget, initial, cuts, tokens.layers)
            return (initial * ratio ** (stage + 1) + 1e-6).long()
        left = tokens.of_image.sum(-1)
        rows = (attention != 0).any(-1).sum(-1, keepdim=True)
        # the tolerance must not depend on how far a batch is padded
        tolerance = torch.finfo(torch.float32).eps * torch.maximum(rows.expand_as(left), left)
        grid = torch.nan_to_num(attention)  # the engine refuses NaN in the scores, which the rank would only choke on
        rank = torch.linalg.matrix_rank(grid[:, None] * tokens.of_image[:, :, None], rtol=tolerance)
        return left - (self.scale * (left - rank).clamp(min=0)).long()
