"""Embeddings are checked before they reach an engine: it would stop for all requests, or give NaN to others."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InputError


def check_embeds(embeds: object, width: int, what: str = "image_embeds") -> None:
    """Raise ``InputError`` unless ``embeds`` are visual tokens [n, width], finite and at least one.

    Parameters
    ----------
    what : their name in messages, a plural.
    """
    if not isinstance(embeds, Tensor):
        raise InputError(f"{what} of {type(embeds).__name__}; expected a tensor [tokens, {width}]")
    shape = tuple(embeds.shape)
    if embeds.ndim != 2 or shape[1] != width or not shape[0]:
        raise InputError(f"{what} of shape {shape}; expected [tokens, {width}] with at least one token")
    if not embeds.is_floating_point():
        raise InputError(f"{what} are {embeds.dtype}; expected floating-point numbers, in the space of the decoder")
    if not bool(torch.isfinite(embeds).all()):
        raise InputError(f"{what} hold NaN or infinite values, which would spoil other requests, too")
