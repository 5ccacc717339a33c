"""How dropped visual tokens are merged into kept ones: links between source tokens and outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .selection import best_of_images, rows_at_once

Similarity = Literal["cosine", "dot"]


def similarity(keys: Tensor, index: Tensor, kind: Similarity) -> Tensor:
    """[B, M, N] similarity of the tokens at ``index`` [B, M] to all tokens, from keys [B, N, C], in float32."""
    keys = keys.float()
    products = keys.gather(1, index[..., None].expand(-1, -1, keys.shape[-1])) @ keys.transpose(1, 2)
    if kind == "dot":
        return products
    scale = keys.norm(dim=-1).clamp(min=1e-12).reciprocal()  # scaling the products is cheaper than scaling the keys
    return products * scale[:, None] * scale.gather(1, index)[..., None]


def best_partners(lookers: Tensor, others: Tensor, allowed: Callable[[slice], Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """The largest product of each looker [B, R, C] with the others [B, S, C], and with which one: [B, R] both.

    Some lookers at a time; ``allowed`` tells with which others those in a slice may pair, [B, some, S] bool.
    """
    others, step = others.transpose(1, 2), rows_at_once(others.shape[1])
    most = lookers.new_empty(lookers.shape[:2])
    partner = torch.empty_like(most, dtype=torch.long)
    for first in range(0, lookers.shape[1], step):
        part = slice(first, first + step)
        products = lookers[:, part] @ others
        products = products if allowed is None else products.masked_fill(~allowed(part), float("-inf"))
        most[:, part], partner[:, part] = products.max(-1)
    return most, partner


@torch.no_grad()
def nearest_neighbours(keys: Tensor, index: Tensor, allowed: Tensor, kind: Similarity, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` allowed tokens that are most similar to each of those at ``index`` [B, M], itself not among them.

    Some outputs at a time, so that similarities to all tokens are never there at once.

    Parameters
    ----------
    keys : [B, N, C].
    allowed : [B, N] bool.

    Returns
    -------
    [B, M, k] tokens, and which of them are real, [B, M, k] bool: there may be fewer than ``k``.
    """
    keys, number = keys.float(), keys.shape[1]
    scale = torch.ones_like(keys[..., 0]) if kind == "dot" else keys.norm(dim=-1).clamp(min=1e-12).reciprocal()
    near = index.new_empty(*index.shape, min(k, number))
    real = torch.empty_like(near, dtype=torch.bool)
    for first in range(0, index.shape[1], rows_at_once(number)):
        part = slice(first, first + rows_at_once(number))
        some = index[:, part, None]
        similar = keys.gather(1, some.expand(-1, -1, keys.shape[-1])) @ keys.transpose(1, 2)
        similar = similar.mul_(scale[:, None]).masked_fill_(~allowed[:, None], float("-inf")).scatter_(2, some, float("-inf"))
        values, near[:, part] = similar.topk(near.shape[2], dim=-1)
        real[:, part] = values > float("-inf")
    return near, real


class Links(NamedTuple):
    """Weighted sums of few tokens each, as in ``Reduction``: all [B, E]."""

    sources: Tensor
    into: Tensor
    weights: Tensor


def neighbour_links(
    near: Tensor, real: Tensor, scores: Tensor, index: Tensor, centre: Tensor, include_self: bool, normalise: bool
) -> Links:
    """Each output is its own token plus its nearest ones weighted by their scores (PruMerge, Algorithm 1, line 12).

    Parameters
    ----------
    near, real : [B, M, k], as from ``nearest_neighbours``.
    scores : [B, N].
    index : [B, M] the token at which an output sits.
    centre : [B, M] bool; outputs that are no centres only copy their token.
    include_self : whether the own token counts, with weight 1; it does where there is no neighbour.
    normalise : whether weights of an output are divided by their sum.
    """
    real = real & centre[..., None]
    own = (include_self | ~real.any(-1, keepdim=True)).float()
    shares = scores[:, None].expand(-1, len(index[0]), -1).gather(2, near) * real
    weights = torch.cat([own, shares], 2)
    into = torch.arange(index.shape[1], device=index.device)[:, None].expand(weights.shape)
    weights = normalised(weights) if normalise else weights
    return Links(torch.cat([index[..., None], near], 2).flatten(1), into.flatten(1), weights.flatten(1))


def links_of(owner: Tensor, share: Tensor) -> Links:
    """Links of tokens that each go to one output, ``owner`` [B, N], with weight ``share`` [B, N]."""
    into, sources = owner.sort(dim=1, stable=True)
    return Links(sources, into, share.gather(1, sources))


def normalised(weights: Tensor) -> Tensor:
    """Rows divided by their sums; rows of zeros stay zero."""
    return weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)


def with_rest(links: Links, index: Tensor, scores: Tensor, kept: Tensor, normalise: bool) -> tuple[Links, Tensor, Tensor]:
    """One more output for everything dropped: the sum of the tokens outside ``kept`` [B, N], weighted by ``scores`` [B, N].

    Returns the links, its cell [B, 1] (the dropped token with the highest score), and whether anything was dropped [B, 1].
    """
    cell, row = scores.masked_fill(kept, -1).argmax(-1, keepdim=True), scores.masked_fill(kept, 0)
    every = torch.arange(scores.shape[1], device=scores.device).expand_as(kept)
    more = Links(every, torch.full_like(every, index.shape[1]), normalised(row) if normalise else row)
    both = Links(*(torch.cat(pair, 1) for pair in zip(links, more, strict=True)))
    return both, cell, ~kept.all(-1, keepdim=True)


def distances(features: Tensor) -> Tensor:
    """[B, S, S] Euclidean distances of [B, S, D] in float32: products in float64, which leave no trace of the shape of a batch."""
    features = features.double()
    products = features @ features.transpose(1, 2)
    squares = products.diagonal(dim1=1, dim2=2).clone()
    return products.mul_(-2).add_(squares[:, None]).add_(squares[..., None]).clamp_(min=0).sqrt_().float()


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
    apart = distances(features) * features.shape[-1] ** -0.5
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
