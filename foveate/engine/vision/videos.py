"""Methods that decide over a whole video: all of its frames as one row for the method, and each by itself for all that follows."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...errors import FoveateError, InputError
from ...tokens import ELSEWHERE, Reduction
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


@dataclass(frozen=True)
class Spread:
    """Outputs that were merged over V whole videos, spread over R of their frames.

    Attributes
    ----------
    reduction : of the videos.
    places : [V, T * N] their tokens among those of all items.
    video : [R] the video of each frame.
    at : [R, m] which of its outputs stand in the frame.
    """

    reduction: Reduction
    places: Tensor
    video: Tensor
    at: Tensor

    def carry(self, values: Tensor) -> Tensor:
        """Other values [S, C] of all tokens -> [R, m, C] of the outputs."""
        return self.reduction.carry(values[self.places])[self.video[:, None], self.at]

    def rows(self, some: list[int]) -> Spread:
        """Those of some of the frames."""
        return replace(self, video=self.video[some], at=self.at[some])


@dataclass(frozen=True)
class Framed:
    """What a method left of frames.

    Attributes
    ----------
    reduction : of F frames.
    outputs : [F, m, C].
    counts : how many each frame keeps, which may be none.
    spread : where outputs were merged over whole videos.
    """

    reduction: Reduction
    outputs: Tensor
    counts: list[int]
    spread: Spread | None


def by_frame(name: str, reduction: Reduction, outputs: Tensor, frames: int, places: Tensor) -> Framed:
    """What a method left of videos, for each frame of each of them.

    A token that was merged into an output of another frame went ``ELSEWHERE``.

    Parameters
    ----------
    name : of the method.
    reduction : of V videos.
    outputs : [V, M, C].
    frames : T frames of each.
    places : [V * T, N] their tokens among those of all items.

    Raises
    ------
    FoveateError : the method makes tokens, or adds some.
    """
    if any(part is not None for part in (reduction.owner, reduction.made, reduction.added, reduction.attention)):
        raise FoveateError(f"{name} makes tokens of a whole video, which the engine cannot tell by frames. This is a fault of it.")
    index, valid, number = reduction.index, reduction.mask(), places.shape[1]
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
    each = Reduction(own.flatten(0, 1), real.flatten(0, 1), scores=scores, threshold=threshold)
    spread = None
    if reduction.weights is not None:
        each = replace(each, owner=_owners(reduction, frame, order.argsort(dim=1), start, number))
        video = torch.arange(len(index), device=index.device).repeat_interleave(frames)
        spread = Spread(reduction, places.reshape(len(index), -1), video, at.flatten(0, 1))
    return Framed(each, kept.flatten(0, 1), counts.flatten().tolist(), spread)


def _owners(reduction: Reduction, frame: Tensor, rank: Tensor, start: Tensor, number: int) -> Tensor:
    """[V * T, N] which output of its own frame each token went to, -1 = none, ``ELSEWHERE`` = one of another frame.

    Parameters
    ----------
    frame, rank : [V, M] of each output: its frame, and its place in the order of frames.
    start : [V, T] the place at which the outputs of a frame begin.
    """
    owner = reduction.source_map(number * start.shape[1])
    to, mine = owner.clamp(min=0), torch.arange(owner.shape[1], device=owner.device) // number
    begin = start.gather(1, mine.expand_as(owner))
    found = torch.where(frame.gather(1, to) == mine, rank.gather(1, to) - begin, ELSEWHERE)
    return torch.where(owner >= 0, found, -1).view(-1, number)
