"""How dropped visual tokens are merged into kept ones: matrices W [B, M, N], outputs are W @ features."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Similarity = Literal["cosine", "dot"]


def similarity(keys: Tensor, index: Tensor, kind: Similarity) -> Tensor:
    """[B, M, N] similarity of the tokens at ``index`` [B, M] to all tokens, from keys [B, N, C], in float32."""
    keys = keys.float()
    products = keys.gather(1, index[..., None].expand(-1, -1, keys.shape[-1])) @ keys.transpose(1, 2)
    if kind == "dot":
        return products
    scale = keys.norm(dim=-1).clamp(min=1e-12).reciprocal()  # scaling the products is cheaper than scaling the keys
    return products * scale[:, None] * scale.gather(1, index)[..., None]


def nearest_neighbours(similar: Tensor, allowed: Tensor, k: int) -> Tensor:
    """[B, M, N] bool: for each of M rows, its ``k`` most similar allowed tokens (fewer where fewer are allowed)."""
    candidates = similar.masked_fill(~allowed, float("-inf"))
    nearest = candidates.topk(min(k, similar.shape[-1]), dim=-1)
    chosen = torch.zeros_like(candidates, dtype=torch.bool)
    return chosen.scatter(-1, nearest.indices, nearest.values > float("-inf"))


def one_hot(index: Tensor, tokens: int) -> Tensor:
    """[B, M, N] float32, 1 where output m sits at token n."""
    return F.one_hot(index, tokens).float()


def neighbour_weights(
    similar: Tensor, scores: Tensor, index: Tensor, allowed: Tensor, centre: Tensor, k: int, include_self: bool
) -> Tensor:
    """[B, M, N] each output is its own token plus its ``k`` nearest ones weighted by their scores (PruMerge, Algorithm 1, line 12).

    Parameters
    ----------
    similar : [B, M, N] of the outputs to all tokens.
    scores : [B, N].
    index : [B, M] the token at which an output sits.
    allowed : [B, N] bool, tokens that may be merged into others.
    centre : [B, M] bool; outputs that are no centres only copy their token.
    k : neighbours, fewer where fewer are allowed.
    include_self : whether the own token counts, with weight 1; it does where there is no neighbour.
    """
    own = one_hot(index, scores.shape[1])
    near = nearest_neighbours(similar, allowed[:, None] & (own == 0), k) & centre[..., None]
    return near * scores[:, None] + own * (include_self | ~near.any(-1, keepdim=True))


def normalised(weights: Tensor) -> Tensor:
    """Rows divided by their sums; rows of zeros stay zero."""
    return weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)


def rest_token(scores: Tensor, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One token for everything dropped: the sum of the tokens outside ``kept`` [B, N], weighted by ``scores`` [B, N].

    Returns its cell [B, 1] (the dropped token with the highest score), whether anything was dropped [B, 1], and its row of
    weights [B, 1, N].
    """
    place = scores.masked_fill(kept, -1).argmax(-1, keepdim=True)
    return place, ~kept.all(-1, keepdim=True), scores.masked_fill(kept, 0)[:, None]
