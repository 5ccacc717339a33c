"""Methods that decide over a whole video: all of its frames as one row for the method, and each by itself for all that follows."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ...errors import FoveateError, InputError
from ...tokens import Reduction
from .arrangement import Arrangement, Unit


def whole_videos(name: str, arrangement: Arrangement, units: list[Unit]) -> list[list[Unit]]:
    """The frames of each video.

    Raises
    ------
    InputError : some of their tokens were left out already.
    """
    if any(unit.cells is not None for unit in units):
        raise InputError(f"{name} decides over whole videos, and temporal= leaves parts of them out before. Leave temporal out.")
    found = [[unit for unit in units if unit.item == item] for item in range(len(arrangement.sizes))]
    return [frames for frames in found if frames]


def by_frame(name: str, reduction: Reduction, outputs: Tensor, frames: int, number: int) -> tuple[Reduction, Tensor, list[int]]:
    """What a method left of videos, for each frame of each of them.

    Parameters
    ----------
    name : of the method.
    reduction : of V videos.
    outputs : [V, M, C].
    frames, number : T frames of each, of N tokens.

    Returns
    -------
    A reduction of V * T frames, with outputs [V * T, m, C], and how many each frame keeps, which may be none.

    Raises
    ------
    FoveateError : the method merges, and what is merged may come from several frames.
    """
    merges = (reduction.weights, reduction.sources, reduction.owner, reduction.made, reduction.added, reduction.attention)
    if any(part is not None for part in merges):
        raise FoveateError(f"{name} merges tokens of a whole video, which the engine cannot tell by frames. This is a fault of it.")
    index, valid = reduction.index, reduction.mask()
    frame = (index // number).masked_fill(~valid, frames)
    counts = torch.nn.functional.one_hot(frame, frames + 1)[..., :frames].sum(1)  # [V, T]
    order, start = frame.argsort(dim=1, stable=True), counts.cumsum(1) - counts
    place = torch.arange(int(counts.max()), device=index.device)
    real = place < counts[..., None]
    at = order.gather(1, (start[..., None] + place).clamp(max=index.shape[1] - 1).flatten(1)).view(real.shape)
    own = index.gather(1, at.flatten(1)).view(real.shape) % number
    kept = outputs.gather(1, at.flatten(1)[..., None].expand(-1, -1, outputs.shape[-1])).view(*real.shape, -1)
    scores = None if reduction.scores is None else reduction.scores.view(-1, number)
    threshold = None if reduction.threshold is None else reduction.threshold.repeat_interleave(frames)
    each = replace(reduction, index=own.flatten(0, 1), valid=real.flatten(0, 1), scores=scores, threshold=threshold)
    return each, kept.flatten(0, 1), counts.flatten().tolist()
