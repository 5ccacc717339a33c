"""PruMerge+: section 3.4 of LLaVA-PruMerge (arXiv 2403.15388): outliers of [CLS] attention and a spatially uniform pattern."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import Self

from ..errors import InputError
from .prumerge import Choice, PruMerge
from .tools.selection import index_mask, ranks, uniform_lattice, uniform_stride


@dataclass(kw_only=True)
class PruMergePlus(PruMerge, name="prumerge+", paper="https://arxiv.org/abs/2403.15388"):
    """PruMerge with further tokens from a spatially uniform pattern.

    With a budget, ``1 / (1 + grid_factor)`` of it is chosen by attention and the rest by the pattern; pattern cells that
    attention has chosen already make room for the next best tokens, so that the count is exact.

    Parameters
    ----------
    grid_factor : uniform tokens for each one chosen by attention: 1 in the text (2 m centres), 3 in the code, which is what gives
        the published 25 %.
    max_uniform : without a budget, uniform tokens are at most this share of all tokens; 0.25 is every second row and column, and
        denser patterns only repeat what their neighbours say. Neither the text nor the code has such a limit (1.0).
    spatial : "lattice" spreads them over rows and columns of any grid; "stride" takes every s-th token of the flattened grid with
        s = int(int(N / m) / grid_factor), as the code does, so that counts come in steps.
    merge_spatial : whether the uniform tokens merge neighbours too (the code) or not (line 9 of Algorithm 1).
    """

    grid_factor: float = 3.0
    max_uniform: float = 0.25
    spatial: Literal["lattice", "stride"] = "lattice"
    merge_spatial: bool = True

    @classmethod
    def paper(cls, **fields: Any) -> Self:
        """As the text says: as many uniform tokens as outliers, and only the outliers merge."""
        return super().paper(**{**dict(grid_factor=1.0, max_uniform=1.0, merge_spatial=False), **fields})

    @classmethod
    def released(cls, **fields: Any) -> Self:
        """As the released code does, for any batch size (it fails beyond one image).

        That code writes 575, the last of 576 cells, into its uniform pattern; here it is the last cell of any grid.
        """
        return super().released(**{**dict(spatial="stride", max_uniform=1.0), **fields})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.grid_factor > 0:
            raise InputError(f"{self.name}: grid_factor={self.grid_factor}; it must be above 0 (use 'prumerge' for none)")
        if not 0 < self.max_uniform <= 1:
            raise InputError(f"{self.name}: max_uniform={self.max_uniform}; it must be in (0, 1]")

    def choose(self, scores: Tensor, grid: tuple[int, int], slots: int | None) -> Choice:
        place = ranks(scores)
        if slots is not None:
            share = max(1, round(slots / (1 + self.grid_factor)))
            first = place < share
            pattern = self._fixed_pattern(grid, slots - share).to(scores.device, non_blocking=True)
            kept = ranks(-(place + scores.shape[1] * ~(first | pattern))) < slots
            return Choice(first, kept, slots, None)
        counts, shares, fence = self.outliers(scores)
        first = place < counts[:, None]
        kept = first | torch.stack([self._pattern(grid, share) for share in shares.tolist()]).to(scores.device)
        return Choice(first, kept, int(kept.sum(-1).max()), fence)

    def merging(self, choice: Choice) -> Tensor:
        return choice.kept if self.merge_spatial else choice.first

    def _fixed_pattern(self, grid: tuple[int, int], count: int) -> Tensor:
        """[N] bool, exactly ``count`` uniform tokens."""
        number = grid[0] * grid[1]
        index = uniform_lattice(*grid, count) if self.spatial == "lattice" else uniform_stride(number, count)
        return index_mask(index, number)

    def _pattern(self, grid: tuple[int, int], share: float) -> Tensor:
        """[N] bool, the uniform tokens beside a ``share`` of the tokens chosen by attention."""
        number = grid[0] * grid[1]
        if self.spatial == "lattice":
            return self._fixed_pattern(grid, round(number * min(share * self.grid_factor, self.max_uniform)))
        step = max(1, int(int(1 / share) / self.grid_factor))
        # the last token is never reached, as in the code
        return index_mask(torch.arange(0, max(1, number - 1), step), number)
