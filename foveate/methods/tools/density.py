"""Clusters by density peaks (DPC-KNN): centres are dense tokens that are far from any denser one."""

from __future__ import annotations

import torch
from torch import Tensor


def position_code(rows: int, columns: int, channels: int) -> Tensor:
    """[rows * columns, channels] sines and cosines of a cell's row, in the first half of the channels, and column, base 10000."""
    half = channels // 2
    cell = torch.arange(rows * columns)
    return torch.cat([_waves(cell // columns, half), _waves(cell % columns, channels - half)], 1)


def _waves(place: Tensor, channels: int) -> Tensor:
    """[N] -> [N, channels], sine and cosine by turns, from fast to slow."""
    channel = torch.arange(channels)
    angle = place[:, None] / 10_000.0 ** ((channel - channel % 2) / channels)
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos())


@torch.no_grad()
def distances(features: Tensor) -> Tensor:
    """[B, N, C] -> [B, N, N] float32 Euclidean distances over the root of C."""
    vectors = features.float()
    squares = vectors.square().sum(-1)
    squared = squares[:, :, None] + squares[:, None] - 2 * vectors @ vectors.mT
    squared.diagonal(dim1=1, dim2=2).zero_()
    return (squared.clamp(min=0) / features.shape[-1]).sqrt()


@torch.no_grad()
def peak_scores(distance: Tensor, neighbours: int) -> Tensor:
    """[B, N, N] -> [B, N], density times the distance to the nearest denser token.

    Density is exp(-mean of the squared distances to the ``neighbours`` nearest tokens), the token itself among them. Of equally
    dense tokens the earlier counts as denser. The densest of all has the largest distance of its image.
    """
    nearest = distance.topk(min(neighbours, distance.shape[-1]), dim=-1, largest=False).values
    return peaks(nearest.square().mean(-1).neg().exp(), distance)


@torch.no_grad()
def peaks(density: Tensor, distance: Tensor) -> Tensor:
    """[B, N] densities and [B, N, N] distances -> [B, N], as ``peak_scores``."""
    earlier = torch.ones_like(distance[0], dtype=torch.bool).tril(-1)
    denser = (density[:, None] > density[:, :, None]) | ((density[:, None] == density[:, :, None]) & earlier)
    apart = distance.masked_fill(~denser, float("inf")).amin(-1)
    return density * torch.where(denser.any(-1), apart, distance.flatten(1).amax(1, keepdim=True))


@torch.no_grad()
def members_of(distance: Tensor, index: Tensor, valid: Tensor) -> Tensor:
    """[B, N] which centre each token belongs to: the nearest one, of equally near ones the first; a centre to itself.

    Parameters
    ----------
    distance : [B, N, N].
    index, valid : [B, M] centres, and which are real.
    """
    to_centres = distance.gather(2, index[:, None].expand(-1, distance.shape[1], -1))
    owner = to_centres.masked_fill(~valid[:, None], float("inf")).argmin(-1)
    place = torch.arange(index.shape[1], device=index.device).expand_as(index)
    spare = torch.zeros_like(owner[:, :1])  # centres that are not real write to a column that is cut off again
    target = index.masked_fill(~valid, distance.shape[1])
    return torch.cat([owner, spare], 1).scatter(1, target, place)[:, : distance.shape[1]]
