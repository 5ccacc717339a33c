"""Where a curve of sorted scores bends: how many tokens belong to its head (section 3 of docs/iti.md).

Each rule takes scores [R, N] of which some are ``valid``, and counts the tokens to keep in each row. Where a row has no bend, as a
constant one, all of its tokens are kept.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Detector = Literal["cumulative", "knee", "log-knee", "derivative", "lof", "iqr"]
FAINT = 1e-6  # of the highest score: what is below counts as this in logarithms, so that a score of 0 is no endless tail


def inflection_counts(scores: Tensor, valid: Tensor, detector: Detector, least: int = 1, slope: float = 1.0) -> Tensor:
    """[R] tokens to keep of each row, at least ``least`` and at most all valid ones.

    Parameters
    ----------
    scores : [R, N], the higher the more important.
    valid : [R, N] bool.
    slope : of "cumulative"; the other rules have none.
    detector : "cumulative": where the cumulative curve of shares over ranks, both from 0 to 1, gets less steep than ``slope``; with
        1, its point farthest from the diagonal, that is where scores fall below their mean. "knee": the point farthest below
        the chord of the sorted curve (Kneedle). "log-knee": the same on the logarithm of the curve, for scores that are not
        negative. "derivative": the steepest descent of the sorted curve, smoothed over a twentieth
        of it. "lof": as many as the local outlier factor (10 neighbours) finds, in both tails. "iqr": above Tukey's upper fence.
    """
    number = valid.sum(-1)
    curve = scores.float().masked_fill(~valid, float("-inf")).sort(dim=-1, descending=True).values
    place = torch.arange(curve.shape[-1], device=curve.device)
    inside = place < number[:, None]
    curve = curve.masked_fill(~inside, 0.0)
    last = curve.gather(1, (number - 1).clamp(min=0)[:, None])
    spread = curve[:, :1] - last
    if detector == "cumulative":
        mean = curve.sum(-1) / number.clamp(min=1)
        counts = ((curve > slope * mean[:, None]) & inside).sum(-1)
    else:
        counts = _RULES[detector](curve, inside, number)
    return torch.where(spread[:, 0] > 0, counts.clamp(min=least), number).minimum(number)


def _knee(curve: Tensor, inside: Tensor, number: Tensor) -> Tensor:
    steps = (number - 1).clamp(min=1)[:, None]
    last = curve.gather(1, (number - 1).clamp(min=0)[:, None])
    height = (curve - last) / (curve[:, :1] - last).clamp(min=torch.finfo(curve.dtype).tiny)
    below = 1 - torch.arange(curve.shape[-1], device=curve.device) / steps - height
    depth, place = below.masked_fill(~inside, -1).max(-1)
    return torch.where(depth > 1e-6, place + 1, number)  # nothing below the chord: the curve is straight or bends the other way


def _log_knee(curve: Tensor, inside: Tensor, number: Tensor) -> Tensor:
    return _knee(torch.maximum(curve, FAINT * curve[:, :1]).clamp(min=torch.finfo(curve.dtype).tiny).log(), inside, number)


def _derivative(curve: Tensor, inside: Tensor, number: Tensor) -> Tensor:
    half = (number // 40)[:, None]  # a window of 2 half + 1 points, narrower at the ends
    place = torch.arange(curve.shape[-1], device=curve.device).expand_as(curve)
    total = torch.nn.functional.pad(curve.double().cumsum(-1), (1, 0))
    end = torch.minimum(place + half, number[:, None] - 1).clamp(min=0)
    begin = (place - half).clamp(min=0)
    smooth = (total.gather(1, end + 1) - total.gather(1, begin)) / (end - begin + 1).clamp(min=1)
    fall = (smooth[:, :-1] - smooth[:, 1:]).masked_fill(~inside[:, 1:], -1)
    return fall.argmax(-1) + 1 if fall.shape[-1] else number


def _lof(curve: Tensor, inside: Tensor, number: Tensor, neighbours: int = 10) -> Tensor:
    """In one dimension the nearest neighbours of a sorted value lie among the ones next to it."""
    count, length = min(neighbours, curve.shape[-1] - 1), curve.shape[-1]
    if count < 1:
        return number
    offset = torch.cat([torch.arange(-count, 0), torch.arange(1, count + 1)]).to(curve.device)
    place = torch.arange(length, device=curve.device)[:, None] + offset
    there = (place >= 0) & (place < number[:, None, None])
    place = place.clamp(0, length - 1).expand_as(there)
    values = curve.double()
    apart = (values[:, None].expand(-1, length, -1).gather(2, place) - values[..., None]).abs().masked_fill(~there, float("inf"))
    near = apart.topk(count, dim=-1, largest=False)
    mine, distance = place.gather(2, near.indices), near.values
    usable = torch.isfinite(distance)  # rows with fewer tokens than neighbours
    reach = distance.masked_fill(~usable, 0).amax(-1)
    bound = torch.maximum(distance.masked_fill(~usable, 0), reach[:, None].expand(-1, length, -1).gather(2, mine)) * usable
    share = usable.sum(-1).clamp(min=1)
    density = 1 / (bound.sum(-1) / share + 1e-10)
    around = (density[:, None].expand(-1, length, -1).gather(2, mine) * usable).sum(-1) / share
    return ((around / density > 1.5) & inside).sum(-1)


def _iqr(curve: Tensor, inside: Tensor, number: Tensor) -> Tensor:
    def quantile(share: float) -> Tensor:  # of the descending curve, linear between order statistics
        at = (1 - share) * (number - 1).clamp(min=0)
        low, high = at.floor().long()[:, None], at.ceil().long()[:, None]
        return torch.lerp(curve.gather(1, low), curve.gather(1, high), (at[:, None] - low).to(curve.dtype))

    fence = quantile(0.75) + 1.5 * (quantile(0.75) - quantile(0.25))
    return ((curve > fence) & inside).sum(-1)


_RULES = {"knee": _knee, "log-knee": _log_knee, "derivative": _derivative, "lof": _lof, "iqr": _iqr}
