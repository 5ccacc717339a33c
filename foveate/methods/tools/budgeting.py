"""Sharing a budget out among frames, groups or pictures."""

from __future__ import annotations

from torch import Tensor

from .selection import ranks


def largest_remainders(weights: Tensor, total: int, most: int) -> Tensor:
    """[B, T] weights that sum to 1 -> [B, T] whole numbers that sum to ``total``, each at most ``most``; T * most >= total.

    What is left after rounding down goes to the largest fractions, to earlier ones first, and what is above ``most`` to the others
    by what they are short of.
    """
    wanted = weights.double() * total
    counts = wanted.floor().clamp(max=most).long()
    while bool(((left := total - counts.sum(-1, keepdim=True)) > 0).any()):
        short = (wanted - counts).masked_fill(counts >= most, float("-inf"))
        counts = counts + ((ranks(short) < left) & (counts < most))
    return counts
