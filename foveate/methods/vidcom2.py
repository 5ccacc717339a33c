"""VidCom2: "Video Compression Commander", EMNLP 2025 (arXiv 2505.14454)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..tokens import Budget, Reduction, VisualTokens, resolve_budget
from .base import ProjectorReducer
from .tools.selection import ranks

WIDTHS = (0.125, 0.25, 0.5, 1.0, 2.0)  # of the kernels, 2 ** k for k from -3 to 1
SHARP = 0.01  # temperature of the weights of frames


@dataclass(kw_only=True)
class VidCom2(ProjectorReducer, name="vidcom2", paper="https://arxiv.org/abs/2505.14454", adaptive=False):
    """Frames that are unlike the whole video keep more tokens; in each frame those stay that are unlike the video and the frame.

    Only the half of the channels that varies least over the video is looked at. Likeness is a sum of Gaussian kernels of the
    distance between normed tokens and a centre. At first every frame keeps at least one token; then tokens that are most like the
    centres are taken away, or those that are least like them are added, until there are exactly as many as the budget says.

    The code keeps at least one token of each frame also where the budget is less than the number of frames; here it is the budget.

    Parameters
    ----------
    budget : visual tokens of the whole video; the code keeps a quarter.
    """

    whole_video = True

    budget: Budget = 0.25

    def reduce(self, tokens: VisualTokens) -> Reduction:
        frames, number = tokens.frames, tokens.number
        count = resolve_budget(self.budget, number) or number
        states = steadiest(tokens.features.float()).unflatten(1, (frames, -1))  # [B, T, N, C]
        video, frame = states.mean((1, 2), keepdim=True), states.mean(2, keepdim=True)
        to_video = likeness(states, video)
        scores = -(to_video + likeness(states, frame))
        shares = frame_shares(-to_video.mean(-1), count / number)
        kept = (shares * states.shape[2]).round().clamp(1, states.shape[2])
        dropped = (ranks(scores) >= kept[..., None]).flatten(1)
        flat = scores.flatten(1)
        order = flat.argsort(dim=1, descending=True, stable=True)
        order = order.gather(1, dropped.gather(1, order).long().argsort(dim=1, stable=True))  # what was kept comes first
        return Reduction(order[:, :count].sort(dim=1).values, scores=flat)


def steadiest(features: Tensor) -> Tensor:
    """[B, N, C] -> [B, N, C // 2] the channels with the smallest variance over the tokens, normed."""
    half = max(1, features.shape[-1] // 2)
    channels = features.var(1, correction=0).argsort(dim=-1, stable=True)[:, :half]
    return F.normalize(features.gather(2, channels[:, None].expand(-1, features.shape[1], -1)), dim=-1)


def likeness(states: Tensor, centre: Tensor) -> Tensor:
    """[..., C] and a centre -> [...], the sum of the kernels."""
    distance = (states - centre).square().sum(-1)
    return torch.stack([(-distance / (2 * width)).exp() for width in WIDTHS]).sum(0)


def frame_shares(unlike: Tensor, mean: float) -> Tensor:
    """[B, T] how unlike the video frames are -> the share of its tokens that each keeps, ``mean`` on average before the cap."""
    weight = ((unlike - unlike.amax(-1, keepdim=True)) / SHARP).softmax(-1)
    return (mean * (1 + weight - weight.mean(-1, keepdim=True))).clamp(max=1)
