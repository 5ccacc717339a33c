"""Positions behind a prompt that ends with a picture whose last tokens are gone.

``generate`` counts on from the last position it was given. Where kept tokens hold their original positions, that is the last kept
token of the picture, and what follows has to go on from the end of the full prompt.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..model.seams import cache_in


class Shifts:
    """What to add, for the ``generate`` that runs in each thread."""

    def __init__(self) -> None:
        self._open: dict[int, tuple[Tensor, int]] = {}

    def __bool__(self) -> bool:
        return bool(self._open)

    @contextmanager
    def during(self, missing: Tensor | None, prompt: int) -> Iterator[None]:
        """Add ``missing`` [..., B, 1] to positions of columns from ``prompt`` on; None adds nothing. Blocks may be nested."""
        thread = threading.get_ident()
        outer = self._open.pop(thread, None)
        if missing is not None and bool((missing > 0).any()):
            self._open[thread] = (missing, prompt)
        try:
            yield
        finally:
            self._open.pop(thread, None)
            if outer is not None:
                self._open[thread] = outer

    @torch.compiler.disable
    def applied(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a forward of ``generate``, with shifted positions."""
        missing, prompt = self._open.get(threading.get_ident(), (None, 0))
        positions, cache = kwargs.get("position_ids"), cache_in(kwargs)
        if missing is None or positions is None:
            return kwargs
        first = 0 if cache is None else int(cache.get_seq_length())
        behind = torch.arange(first, first + positions.shape[-1], device=positions.device) >= prompt
        copies = positions.shape[-2] // missing.shape[-2]
        return {**kwargs, "position_ids": positions + missing.repeat_interleave(copies, -2) * behind}


def missing_positions(mask: Tensor, given: Tensor | None, short: Tensor) -> Tensor:
    """[..., B, 1] how far the last of the ``short`` positions [..., B, T'] is in front of the last one of the full prompt.

    ``mask`` [B, T] of the full prompt; ``given`` the user's positions of all or of its last columns, None = counted by the mask.
    """
    real = mask.bool()
    if given is None:
        last = real.long().sum(1, keepdim=True) - 1
    else:
        shown = real[:, -given.shape[-1] :]
        place = (shown.long() * torch.arange(shown.shape[1], device=shown.device)).amax(1, keepdim=True)  # of the last real token
        given = given.expand(*given.shape[:-2], len(real), -1)
        last = given.gather(-1, place.expand(*given.shape[:-1], 1))
    missing = last - short[..., -1:]
    if missing.ndim == 3:  # M-RoPE: the first row is renumbered in any case
        missing[0] = 0
    return missing
