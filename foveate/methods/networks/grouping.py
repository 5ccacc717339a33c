"""Semantic tokens and the layer that groups patches under them, for VisToG (arXiv 2411.17773)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STEPS = 20  # of k-means


class Heard(NamedTuple):
    """Of a reduction while somebody listens: embedded patches [B, N, C], and their shares of groups [B, K, N]."""

    patches: Tensor
    shares: Tensor


class Grouping(nn.Module):
    """Semantic tokens [K, C], and the layer that gives each of them the patches of its group.

    The mathematics are those of GroupViT (arXiv 2202.11094). At first the output projections are zero and queries and keys are the
    normed tokens themselves, so that the outputs are the semantic tokens as the encoder made them.
    """

    heard: list[Heard] | None = None

    def __init__(self, groups: int, channels: int) -> None:
        super().__init__()
        self.tokens = nn.Parameter(0.02 * torch.randn(groups, channels))
        self.norm_groups, self.norm_cells, self.norm_made = (nn.LayerNorm(channels) for _ in range(3))
        self.query, self.key, self.value, self.out = (nn.Linear(channels, channels) for _ in range(4))
        self.mlp = nn.Sequential(nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels))
        for same in (self.query, self.key):
            nn.init.eye_(same.weight)
            nn.init.zeros_(same.bias)
        for nothing in (*self.out.parameters(), *self.mlp[2].parameters()):
            nn.init.zeros_(nothing)

    def logits(self, groups: Tensor, cells: Tensor) -> Tensor:
        """[B, K, C] and [B, N, C] -> [B, K, N], how well each cell fits each group."""
        queries, keys = self.query(self.norm_groups(groups)), self.key(self.norm_cells(cells))
        scaled: Tensor = queries @ keys.mT / cells.shape[-1] ** 0.5
        return scaled

    def forward(self, groups: Tensor, cells: Tensor, assigned: Tensor) -> Tensor:
        """[B, K, C], [B, N, C] and how much of each cell goes to each group [B, K, N] -> [B, K, C]."""
        mean = assigned @ self.value(cells) / (assigned.sum(-1, keepdim=True) + 1)  # an empty group has the mean 0
        made = groups + self.out(mean)
        made = made + self.mlp(self.norm_made(made))
        return made

    @contextmanager
    def listening(self) -> Iterator[list[Heard]]:
        """Within this, what reductions see is in the list."""
        heard: list[Heard] = []
        self.heard = heard
        try:
            yield heard
        finally:
            self.heard = None


def chosen(logits: Tensor, noisy: bool) -> Tensor:
    """[B, K, N] logits -> 0 or 1, the group of each cell; with noise it is drawn, and gradients are those of the softmax."""
    if noisy:
        return F.gumbel_softmax(logits, tau=1, hard=True, dim=1)
    return torch.zeros_like(logits).scatter(1, logits.argmax(1, keepdim=True), 1.0)


def divergence(shares: Tensor) -> Tensor:
    """[B, K, N] shares of groups -> KL divergence of their means over all cells from equal shares; log K if one has all."""
    mean = shares.mean((0, 2))
    return (mean * (mean * len(mean)).clamp(min=1e-9).log()).sum()


def empty_share(shares: Tensor) -> Tensor:
    """[B, K, N] shares of groups -> the part of all groups to which no cell gives its largest share."""
    return 1 - chosen(shares, noisy=False).amax(-1).mean()


def centres(points: Tensor, number: int) -> Tensor:
    """[P, C] -> [number, C], means of the clusters of k-means by cosine similarity, which begins at evenly spaced points.

    A cluster that loses its last point keeps its centre.
    """
    unit = F.normalize(points, dim=-1)
    found = points[torch.linspace(0, len(points) - 1, number, device=points.device).long()]
    for _ in range(STEPS):
        cluster = (unit @ F.normalize(found, dim=-1).mT).argmax(1)
        counts = torch.zeros(number, device=points.device).index_add(0, cluster, torch.ones_like(points[:, 0]))
        sums = torch.zeros_like(found).index_add(0, cluster, points)
        found = torch.where(counts[:, None] > 0, sums / counts[:, None].clamp(min=1), found)
    return found
