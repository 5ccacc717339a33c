"""Sharing a budget out among frames, groups or pictures."""

from __future__ import annotations

from torch import Tensor

from .selection import ranks


def largest_remainders(weights: Tensor, total: int | Tensor, most: int | Tensor) -> Tensor:
    """[B, T] weights that sum to 1 -> [B, T] whole numbers that sum to ``total``, each at most ``most``, of which there is enough.

    What is left after rounding down goes to the largest fractions, to earlier ones first, and what is above ``most`` to the others
    by what they are short of.

    Parameters
    ----------
    total : one number, or [B, 1].
    most : one number, or [B, T].
    """
    wanted = weights.double() * total
    counts = wanted.floor().clamp(max=most).long()
    while bool(((left := total - counts.sum(-1, keepdim=True)) > 0).any()):
        short = (wanted - counts).masked_fill(counts >= most, float("-inf"))
        counts = counts + ((ranks(short) < left) & (counts < most))
    return counts
