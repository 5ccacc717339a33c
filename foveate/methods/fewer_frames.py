"""Fewer frames of a video at equal distances, as Video-LLaVA (arXiv 2311.10122) and others read them: a baseline."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..tokens import Reduction, VisualTokens
from .base import ProjectorReducer
from .baselines import count_of, same_for_all
from .tools.selection import uniform_lattice


@dataclass(kw_only=True)
class FewerFrames(ProjectorReducer, name="fewer-frames", paper="https://arxiv.org/abs/2311.10122", adaptive=False):
    """Whole frames of a video at equal distances, as many as the budget allows, and of one more the rest of the budget.

    Of that one uniformly spread tokens stay, and so they do of pictures, which are videos of one frame. What a video costs that was
    read with fewer frames, but that the encoder has seen them all.

    Parameters
    ----------
    budget : visual tokens of the whole video.
    """

    whole_video = True

    def reduce(self, tokens: VisualTokens) -> Reduction:
        count, each = count_of(self, tokens), tokens.number // tokens.frames
        number = -(-count // each)
        frames = (2 * torch.arange(number) + 1) * tokens.frames // (2 * number)
        parts = [torch.arange(each)] * (count // each)
        parts += [uniform_lattice(*tokens.grid, count % each)] if count % each else []
        return same_for_all(torch.cat([int(frame) * each + part for frame, part in zip(frames, parts, strict=True)]), tokens)
