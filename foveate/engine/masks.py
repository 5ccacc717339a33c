"""Attention masks of layers that hold fewer tokens than the prompt has."""

from __future__ import annotations

import torch
from torch import Tensor


def layer_mask(
    keys: Tensor, queries: Tensor, *, plain: bool, window: int | None, implementation: str, dtype: torch.dtype
) -> Tensor | None:
    """The mask of one layer, in the form its attention implementation takes; None where it needs none.

    Parameters
    ----------
    keys : [B, K] column of each key in the prompt, -1 = padding.
    queries : [B, M] column of each query; they are the last M keys.
    plain : no key is padding.
    window : the layer sees so many columns back, counted in the full prompt; None = everything.
    implementation : "eager", "sdpa", or a flash attention.
    dtype : of the hidden states.
    """
    if "flash" in implementation:  # the kernel is causal by itself, and counts its windows in kept tokens
        return None if plain else (keys >= 0).long()
    length, number = queries.shape[1], keys.shape[1]
    if plain and window is None and (length == 1 or (length == number and implementation == "sdpa")):
        return None
    at = queries[..., None]
    seen = (keys >= 0)[:, None] & (keys[:, None] <= at)
    if window is not None:
        seen = seen & (keys[:, None] > at - window)
    # a query of padding sees itself, or its softmax is not a number
    place = torch.arange(number, device=keys.device)
    seen = seen | ((at < 0) & (place == (number - length + torch.arange(length, device=keys.device))[:, None]))
    if implementation == "eager":
        return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)[:, None]
    return seen[:, None]
