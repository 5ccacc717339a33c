"""Trees of tokens that are linked from frame to frame of a video."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .selection import ranks


@dataclass(frozen=True)
class Trees:
    """Tokens of B videos of T frames of N cells, in trees; a token that is linked to none is a tree of its own.

    Attributes
    ----------
    root : [B, T * N] the token that each tree begins with.
    size : [B, T * N] float32, how many tokens the tree of a root has; 0 for others.
    means : [B, T, N, C] the mean of the tree, at its root.
    first : [B, T, N] bool, the roots.
    """

    root: Tensor
    size: Tensor
    means: Tensor
    first: Tensor


def scenes(means: Tensor, threshold: float, least: int) -> Tensor:
    """[B, T, C] means of frames -> [B, T] the number of the scene of each, from 0.

    A scene ends where the cosine to the next frame is below ``threshold``; if there are fewer than ``least`` of them, also at the
    other smallest cosines.
    """
    alike = F.cosine_similarity(means[:, 1:], means[:, :-1], dim=-1)
    ends = (alike < threshold) | (ranks(-alike) < least - 1)
    return F.pad(ends.cumsum(1), (1, 0))


def grown(states: Tensor, free: Tensor, scene: Tensor, least: Tensor, threshold: float) -> Trees:
    """Link each free token to the most similar free one of the frame before, in the same scene, above ``threshold``.

    Parameters
    ----------
    states : [B, T, N, C].
    free : [B, T, N] bool, tokens that may be linked; the others are in no tree.
    scene : [B, T] of each frame.
    least : [B, T], whose sum over a scene is how many of its tokens stay without a link, the others included. Those with the least
        similar partners do.
    """
    (batch, frames, cells, width), number = states.shape, states.shape[1] * states.shape[2]
    unit = F.normalize(states, dim=-1)
    similar = unit[:, 1:] @ unit[:, :-1].mT
    both = free[:, 1:, :, None] & free[:, :-1, None] & (scene[:, 1:] == scene[:, :-1])[..., None, None]
    best, partner = similar.masked_fill(~both, -2).max(-1)
    best, partner = F.pad(best, (0, 0, 1, 0), value=-2), F.pad(partner, (0, 0, 1, 0))
    # places in the order of similarity, scene after scene
    place = ranks((best.double() - 4 * scene[..., None]).flatten(1)).view_as(best)
    begin = cells * (scene[:, :, None] > scene[:, None]).sum(-1, keepdim=True)
    same = scene[:, :, None] == scene[:, None]
    most = (same * (cells - least)[:, None]).sum(-1, keepdim=True)
    linked = (best > max(threshold, -1.0)) & (place - begin < most)
    root = torch.arange(number, device=states.device).repeat(batch, 1).view(batch, frames, cells)
    for frame in range(1, frames):
        root[:, frame] = torch.where(linked[:, frame], root[:, frame - 1].gather(1, partner[:, frame]), root[:, frame])
    root = root.flatten(1)
    size = torch.zeros(batch, number, device=states.device).scatter_add(1, root, torch.ones_like(root, dtype=torch.float32))
    sums = torch.zeros_like(states).flatten(1, 2).scatter_add(1, root[..., None].expand(-1, -1, width), states.flatten(1, 2))
    means = (sums / size.clamp(min=1)[..., None]).view_as(states)
    return Trees(root, size, means, free & ~linked)
