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


def taken_mask(whole: Tensor, keys: Tensor, queries: int, past: int, width: int) -> Tensor:
    """Rows and columns of the mask of a whole prompt.

    Parameters
    ----------
    whole : [B or 1, 1, S, K] bool, or float with large negative values for what is not seen; K last columns of the prompt.
    keys : [B, n] column of each key, -1 = padding; the last ``queries`` are the queries, too.
    past : columns before the S rows of ``whole``.
    width : columns of the whole prompt.
    """
    number, first = keys.shape[1], width - whole.shape[-1]
    rows, columns = keys[:, -queries:] - past, keys - first
    whole = whole.expand(len(keys), *whole.shape[1:])[:, 0]
    taken = whole.gather(1, rows.clamp(min=0)[..., None].expand(-1, -1, whole.shape[-1]))
    taken = taken.gather(2, columns.clamp(min=0)[:, None].expand(-1, queries, -1))
    hidden = ((keys < 0) | (columns < 0))[:, None].expand(-1, queries, -1)
    # a query of padding sees itself, or its softmax is not a number
    place = torch.arange(number, device=keys.device)
    own = (rows < 0)[..., None] & (place == (number - queries + torch.arange(queries, device=keys.device))[:, None])
    lowest = False if whole.dtype == torch.bool else torch.finfo(whole.dtype).min
    seen = True if whole.dtype == torch.bool else 0.0
    return taken.masked_fill(hidden, lowest).masked_fill(own, seen)[:, None]


def seen_by(mask: Tensor | None) -> Tensor | None:
    """[B, S, K] bool, which keys each query sees, of the mask [B, 1, S, K] of a layer; None where it has none."""
    if mask is None or mask.ndim != 4:
        return None
    return mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] > torch.finfo(mask.dtype).min / 2
