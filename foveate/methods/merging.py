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


def kept_mask(index: Tensor, valid: Tensor, tokens: int) -> Tensor:
    """[B, N] bool, the tokens at which a valid output sits."""
    target = index.masked_fill(~valid, tokens)
    mask = torch.zeros(len(index), tokens + 1, dtype=torch.bool, device=index.device)
    return mask.scatter(1, target, True)[:, :tokens]


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
