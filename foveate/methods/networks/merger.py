"""The merger of SeTok (arXiv 2406.05127): members of a cluster become one token, and these see each other."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn


class Clusters(NamedTuple):
    """Centres [B, M] in raster order, which are real, the cluster of each token [B, N], and scores [B, N]."""

    centres: Tensor
    valid: Tensor
    owner: Tensor
    scores: Tensor

    def shares(self) -> Tensor:
        """[B, M, N], 1 / its size for each token of a cluster."""
        mine = F.one_hot(self.owner, self.centres.shape[1]).mT.float()
        return mine / mine.sum(-1, keepdim=True).clamp(min=1)


class Encoder(nn.Module):
    """Two attentions that share a norm, then an MLP, as the released code has them."""

    def __init__(self, channels: int, dropout: float = 0.2) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.qkv = nn.ModuleList(nn.Linear(channels, 3 * channels) for _ in range(2))
        self.proj = nn.ModuleList(nn.Linear(channels, channels) for _ in range(2))
        inner = 4 * channels
        self.mlp = nn.Sequential(
            nn.Linear(channels, inner), nn.GELU(), nn.Dropout(dropout), nn.Linear(inner, channels), nn.Dropout(dropout)
        )

    def forward(self, tokens: Tensor, sees: Tensor) -> Tensor:
        """[B, S, C], with ``sees`` [B, S, S] or [B, 1, S] whether a token sees another."""
        for qkv, proj in zip(self.qkv, self.proj, strict=True):
            query, key, value = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in qkv(self.norm1(tokens)).chunk(3, -1))
            seen = F.scaled_dot_product_attention(query, key, value, sees[:, None])
            tokens = tokens + proj(seen.transpose(1, 2).flatten(2))
        tokens = tokens + self.mlp(self.norm2(tokens))
        return tokens


class Merger(nn.Module):
    """Members of a cluster see each other and become one token; these see each other, and are projected."""

    heard: list[Tensor] | None = None  # scores of pictures, while the threshold is chosen

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.inner, self.inter, self.out = Encoder(channels), Encoder(channels), nn.Linear(channels, channels)
        for part in self.modules():
            if isinstance(part, nn.Linear):
                nn.init.xavier_uniform_(part.weight)
                nn.init.zeros_(part.bias)

    def forward(self, features: Tensor, found: Clusters, readout: str) -> Tensor:
        """[B, N, C] -> [B, M, C]."""
        together = found.owner[:, :, None] == found.owner[:, None]
        inside = self.inner(features, together)
        if readout == "mean":
            concepts = found.shares() @ inside
        else:
            concepts = inside.gather(1, found.centres[..., None].expand(-1, -1, inside.shape[-1]))
        made: Tensor = self.out(self.inter(concepts, found.valid[:, None]))
        return made
