"""V-CAST: budgets of frames by the curvature of a video (arXiv 2603.27650)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..tokens import Budget, Reduction, VisualTokens, resolve_budget
from .base import ProjectorReducer
from .tools.budgeting import largest_remainders
from .tools.selection import ranks, take_in_order


@dataclass(kw_only=True)
class VCast(ProjectorReducer, name="v-cast", paper="https://arxiv.org/abs/2603.27650", adaptive=False):
    """Frames where the video turns keep more tokens; in each frame those stay that are unlike its mean, or large.

    A frame is the direction of the mean of its tokens. Where the step to the next frame points elsewhere than the step before, the
    video turns: 1 - cosine of both steps, and 1 at both ends. The softmax of that gives budgets, by largest remainders. A token
    counts 1 - cosine to the mean of its frame, plus its norm, which runs from 0 to 1 over the frame.

    Parameters
    ----------
    budget : visual tokens of the whole video; the code keeps a quarter.
    temperature : of the softmax over frames.
    """

    whole_video = True

    budget: Budget = 0.25
    temperature: float = 0.7

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_range(temperature=1e-6)

    def reduce(self, tokens: VisualTokens) -> Reduction:
        count = resolve_budget(self.budget, tokens.number) or tokens.number
        states = tokens.features.float().unflatten(1, (tokens.frames, -1))  # [B, T, N, C]
        means = F.normalize(states.mean(2), dim=-1)
        weights = (curvature(means) / self.temperature).softmax(-1)
        counts = largest_remainders(weights, count, states.shape[2])
        norms = states.norm(dim=-1)
        low, high = norms.amin(-1, keepdim=True), norms.amax(-1, keepdim=True)
        scores = 1 - F.cosine_similarity(states, means[:, :, None], dim=-1) + (norms - low) / (high - low).clamp(min=1e-12)
        kept = (ranks(scores) < counts[..., None]).flatten(1)
        place = torch.arange(kept.shape[1], device=kept.device)
        index, _ = take_in_order(place.masked_fill(~kept, kept.shape[1]), count)
        return Reduction(index, scores=scores.flatten(1))


def curvature(means: Tensor) -> Tensor:
    """[B, T, C] directions of frames -> [B, T] how much the video turns there; 1 at both ends, and where nothing moves."""
    steps = means.diff(dim=1)
    turns = 1 - F.cosine_similarity(steps[:, 1:], steps[:, :-1], dim=-1)
    ends = means.new_ones(len(means), 1)
    return torch.cat([ends, turns, ends], 1)[:, : means.shape[1]]
