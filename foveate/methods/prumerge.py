"""PruMerge: LLaVA-PruMerge, Shang et al., ICCV 2025 (arXiv 2403.15388).

Tokens whose [CLS] attention is an outlier of its image stay (section 3.2); the tokens nearest to them are merged into them, by
similarity of their keys (section 3.3). The released code differs from the text in several places: both are presets, each
difference a field.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Self

from ..errors import InputError
from ..tokens import EncoderLayer, Reduction, VisualTokens, resolve_budget
from .base import ProjectorReducer
from .tools.merging import Similarity, nearest_neighbours, neighbour_links, with_rest
from .tools.scoring import Heads, cls_attention
from .tools.selection import iqr_fence, order_keys, ranks, take_in_order


class Choice(NamedTuple):
    """Which tokens stay."""

    first: Tensor  # [B, N] bool, chosen by attention
    kept: Tensor  # [B, N] bool, all that stay
    most: int  # the largest number kept in an image
    fence: Tensor | None  # [B], of adaptive selection


@dataclass(kw_only=True)
class PruMerge(ProjectorReducer, name="prumerge", paper="https://arxiv.org/abs/2403.15388"):
    """Adaptive selection by [CLS] attention outliers; their nearest neighbours are merged into them.

    The plain constructor keeps the outliers of each image on its own, in raster order, merges only dropped tokens into them (a
    dropped token that is near to none of them is gone) and leaves the scale of the tokens as it was. ``paper()`` follows the text,
    ``released()`` the authors' code.

    Parameters
    ----------
    score_layer : whose [CLS] attention is used: "last" (the code), "aligned" = the layer that made the features (the "penultimate
        layer" of the text), or an index.
    key_layer : whose keys say what is similar: "last" (the code, and section 3.3; line 1 of Algorithm 1 says penultimate).
    attn_mode : "per_head_mean" is the encoder's attention; "fused" treats all heads as one, as the code does.
    similarity : of keys, "cosine" (the code) or "dot" (Eq. 4).
    k : neighbours merged into each kept token (the code; the text gives none). Fewer where an image has fewer.
    neighbour_pool : merge "pruned" tokens only (section 3.3), or "all" tokens, kept ones too (the code).
    include_self : whether a kept token enters its own sum, with weight 1 (the code; not stated in the text).
    normalise_weights : divide each sum by its weights, so that merging does not change the scale of tokens.
    append_rest : one more token, the attention-weighted sum of all dropped ones, at the end (the code; not in the text).
    merge : False keeps the chosen tokens as they are ("AITS" without "TS" in Table 5).
    order : "raster" or descending "attention" (the code).
    iqr_factor : how far beyond the quartiles an outlier lies.
    iqr_scope : "image", or one fence for the whole "batch" (the code; an image then depends on its neighbours).
    min_tokens : at least so many tokens are chosen, also where attention has no outliers at all.
    """

    reads_cls = True

    score_layer: EncoderLayer = "last"
    key_layer: EncoderLayer = "last"
    attn_mode: Heads = "per_head_mean"
    similarity: Similarity = "cosine"
    k: int = 32
    neighbour_pool: Literal["pruned", "all"] = "pruned"
    include_self: bool = True
    normalise_weights: bool = True
    append_rest: bool = False
    merge: bool = True
    order: Literal["raster", "attention"] = "raster"
    iqr_factor: float = 1.5
    iqr_scope: Literal["image", "batch"] = "image"
    min_tokens: int = 4

    @classmethod
    def paper(cls, **fields: Any) -> Self:
        """As the text says; where it is silent (k, self weight, normalisation), as the code does."""
        return cls(**{**dict(score_layer="aligned", similarity="dot", normalise_weights=False, min_tokens=1), **fields})

    @classmethod
    def released(cls, **fields: Any) -> Self:
        """As the released code does (commit 097c041), without its crashes on tiny grids and images without outliers.

        For an image without outliers that code emits nothing but the token of the rest; here one token is kept beside it.
        """
        code = dict(attn_mode="fused", neighbour_pool="all", normalise_weights=False, append_rest=True)
        return cls(**{**code, **dict(order="attention", iqr_scope="batch", min_tokens=1), **fields})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("k", 1), ("min_tokens", 1), ("iqr_factor", 0)):
            if getattr(self, name) < least:
                raise InputError(f"{self.name}: {name}={getattr(self, name)}; it must be at least {least}")

    @classmethod
    def to_tune(cls, shares: Sequence[float], layers: int) -> list[list[dict[str, Any]]]:
        """Budgets, and fences nearer and farther, which leave each picture as many tokens as it has outliers."""
        return [[{"iqr_factor": factor} for factor in (0.5, 1.0, 1.5, 2.5)], *super().to_tune(shares, layers)]

    def per_image(self) -> Self:
        return self.with_fields(iqr_scope="image")

    def encoder_layers(self, depth: int) -> tuple[EncoderLayer, ...]:
        return tuple(dict.fromkeys((self.score_layer, self.key_layer)))

    def reduce(self, tokens: VisualTokens) -> Reduction:
        scores, number = cls_attention(tokens.taps[self.score_layer], self.attn_mode), tokens.number
        budget = resolve_budget(self.budget, number)
        rest = self.merge and self.append_rest and budget != 1
        choice = self.choose(scores, tokens.grid, None if budget is None else budget - int(rest))
        first = choice.first if self.order == "attention" else torch.zeros_like(choice.first)
        index, valid = take_in_order(order_keys(scores, first, choice.kept), choice.most)
        if not self.merge:
            return Reduction(index, valid if budget is None else None, None, scores, choice.fence)
        pool = ~choice.kept if self.neighbour_pool == "pruned" else torch.ones_like(choice.kept)
        near, real = nearest_neighbours(tokens.taps[self.key_layer].patch_keys, index, pool, self.similarity, self.k)
        centre = self.merging(choice).gather(1, index)
        links = neighbour_links(near, real, scores, index, centre, self.include_self, self.normalise_weights)
        if rest:
            links, cell, dropped = with_rest(links, index, scores, choice.kept, self.normalise_weights)
            index, valid = torch.cat([index, cell], 1), torch.cat([valid, dropped], 1)
        found = Reduction(index, valid if budget is None else None, scores=scores, threshold=choice.fence)
        return replace(found, **links._asdict())

    def choose(self, scores: Tensor, grid: tuple[int, int], slots: int | None) -> Choice:
        """Section 3.2: the outliers of each image, or the ``slots`` highest scores [B, N]."""
        if slots is not None:
            first = ranks(scores) < slots
            return Choice(first, first, slots, None)
        counts, _, fence = self.outliers(scores)
        first = ranks(scores) < counts[:, None]
        return Choice(first, first, int(counts.max()), fence)

    def merging(self, choice: Choice) -> Tensor:
        """[B, N] bool, which kept tokens are centres that others are merged into."""
        return choice.first

    def outliers(self, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """How many scores of each row lie above the fence, at least ``min_tokens`` [B], as a share [B], and the fence [B]."""
        batch, number = scores.shape
        pooled = scores.reshape(1, -1) if self.iqr_scope == "batch" else scores
        fence = iqr_fence(pooled, self.iqr_factor)
        counts = (pooled > fence[:, None]).sum(-1)
        share = counts.double() / pooled.shape[1]
        if self.iqr_scope == "batch":  # the code truncates the pooled ratio to a count per image
            counts, share = (number * share).long().expand(batch), share.expand(batch)
        least = min(self.min_tokens, number)
        return counts.clamp(min=least), share.clamp(min=least / number), fence.expand(batch)
