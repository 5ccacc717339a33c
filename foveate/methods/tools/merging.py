"""How dropped visual tokens are merged into kept ones: matrices W [B, M, N], outputs are W @ features."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .selection import best_of_images

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


def cluster_weights(features: Tensor, pool: Tensor, clusters: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Density-peak clustering of some tokens of each image (Du et al. 2016), with as many neighbours as clusters.

    Parameters
    ----------
    features : [B, S, D].
    pool : [B, I, S] bool, the tokens of each image to cluster.
    clusters : [B, I] how many clusters; at most the number of tokens.

    Returns
    -------
    centres [B, S] bool, their places ``target`` [B, R] and the weights [B, R, S], 1 for each token of a cluster; rows beyond the
    number of clusters are zeros.
    """
    every, number = pool.any(1), features.shape[1]
    order = (~every).long().argsort(dim=1, stable=True)[:, : max(1, int(every.sum(1).max()))]  # the pool is a small part of all
    features = features.gather(1, order[..., None].expand(-1, -1, features.shape[-1])).float()
    pool = pool.gather(2, order[:, None].expand(-1, pool.shape[1], -1))
    inside = pool.any(1)
    together = (pool.transpose(1, 2).float() @ pool.float()) > 0
    apart = torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist") * features.shape[-1] ** -0.5
    apart = apart.masked_fill(~together, float("inf"))
    wanted = (pool * clusters[..., None]).sum(1).clamp(min=1)  # of the image that a token belongs to
    near = apart.sort(dim=-1).values.square()
    near = near.masked_fill(torch.isinf(near), 0).cumsum(-1).gather(-1, (wanted - 1)[..., None])[..., 0] / wanted
    density = (-near).exp()
    place = torch.arange(features.shape[1], device=features.device)
    denser = (density[:, None] > density[..., None]) | ((density[:, None] == density[..., None]) & (place < place[:, None]))
    widest = apart.masked_fill(~together, 0).amax(-1)
    gap = apart.masked_fill(~denser, float("inf")).amin(-1)
    peak = torch.where(torch.isinf(gap), widest, gap) * density
    centres = best_of_images(peak, pool, clusters)
    owner = apart.masked_fill(~centres[:, None], float("inf")).argmin(-1)
    owner = torch.where(centres, place, owner)
    held = (~centres).long().argsort(dim=1, stable=True)[:, : max(1, int(centres.sum(1).max()))]
    weights = (owner[:, None] == held[..., None]) & inside[:, None] & centres.gather(1, held)[..., None]
    full = torch.zeros(len(order), held.shape[1], number, device=order.device)
    full = full.scatter(2, order[:, None].expand(-1, held.shape[1], -1), weights.float())
    chosen = torch.zeros(len(order), number, dtype=torch.bool, device=order.device).scatter(1, order, centres)
    return chosen, order.gather(1, held), full
