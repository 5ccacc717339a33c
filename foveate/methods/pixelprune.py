"""PixelPrune: cells of a picture that repeat another one are left out before the encoder (arXiv 2604.00886)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from .pixels import PixelReducer


@dataclass(kw_only=True)
class PixelPrune(PixelReducer, name="pixelprune", paper="https://arxiv.org/abs/2604.00886"):
    """Of cells that look alike the first one stays; the vision encoder, the merger and the decoder never see the others.

    On documents and screens 22 to 71 % of the cells are unique, by the paper; of photos nearly all. How much is left depends on the
    picture, and there is no budget. Ours: a video is looked at as a whole, so that a background that stands still is seen once, and
    ``tau`` is in units of what the model gets.

    Parameters
    ----------
    tau : mean absolute difference up to which cells are alike, in units of the pixels that the model gets: its image processor
        has normalised them, and black and white are about 4 units apart. 0 = exactly equal ones only, without loss of content.
    """

    tau: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tau < 0:
            raise InputError(f"pixelprune: tau={self.tau}; expected a difference of pixels, 0 or more")
        if self.budget is not None and not self.keeps_all:
            raise InputError(f"pixelprune: budget={self.budget}; what is alike decides. Give tau= instead, such as 0.1.")

    @classmethod
    def to_tune(cls, shares: Sequence[float], layers: int) -> list[list[dict[str, Any]]]:
        """How different pixels may be: from not at all to a twentieth of the way from black to white."""
        return [[{"tau": tau} for tau in (0.0, 0.02, 0.05, 0.1, 0.2)]]

    def sources(self, cells: Tensor) -> Tensor:
        number = torch.arange(len(cells), device=cells.device)
        # equal ones first, which is one sort; the first cell of each kind stands for it
        _, kind = torch.unique(cells, dim=0, return_inverse=True)
        first = torch.full_like(number, len(cells)).scatter_reduce(0, kind, number, "amin")
        source = first[kind]
        if not self.tau:
            return source
        alike, waiting = source.clone(), (source == number).nonzero().flatten()
        while len(waiting):
            leader, others = waiting[0], waiting[1:]
            near = (cells[others] - cells[leader]).abs().mean(1) <= self.tau
            alike[others[near]] = leader
            waiting = others[~near]
        return alike[source]
