"""EVS: efficient video sampling (arXiv 2510.14624)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..tokens import Reduction, VisualTokens, resolve_budget
from .base import ProjectorReducer
from .tools.selection import best_in_order, uniform_lattice


@dataclass(kw_only=True)
class EVS(ProjectorReducer, name="evs", paper="https://arxiv.org/abs/2510.14624", adaptive=False):
    """The first frame of a video, and of all others the tokens that differ most from the same place of the frame before.

    Tokens are compared after the projector, by 1 - cosine, over the whole video: frames in which much happens keep more. Of equally
    different tokens the earlier stays. ``temporal=`` of other methods is the same comparison with a threshold instead of a budget.

    The paper keeps the first frame whole whatever the budget. Here a budget below one frame gives uniformly spread tokens of the
    first frame, and so do pictures, which are videos of one frame: that is ours.

    Parameters
    ----------
    budget : visual tokens of the whole video.
    """

    whole_video = True
    reads_projected = True

    def reduce(self, tokens: VisualTokens) -> Reduction:
        states = F.normalize((tokens.features if tokens.projected is None else tokens.projected).float(), dim=-1)
        rows, columns = tokens.grid
        frame, count = rows * columns, resolve_budget(self.budget, tokens.number) or tokens.number
        moved = states[:, frame:], states[:, :-frame]
        different = 1 - (moved[0] * moved[1]).sum(-1)
        first = torch.full_like(states[:, :frame, 0], 4.0)  # above all others, which are at most 2
        if count < frame:
            first = first - 1
            first[:, uniform_lattice(rows, columns, count).to(first.device)] = 4.0
        scores = torch.cat([first, different], 1)
        return Reduction(best_in_order(scores, count), scores=scores)
