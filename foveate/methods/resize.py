"""Smaller pictures, the baseline of VTC-Bench (arXiv 2510.07143)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from typing_extensions import Self

from ..tokens import Reduction, VisualTokens, resolve_budget
from .base import ProjectorReducer
from .baselines import same_for_all
from .tools.selection import grid_middles


@dataclass(kw_only=True)
class Resize(ProjectorReducer, name="resize", paper="https://arxiv.org/abs/2510.07143", adaptive=False):
    """A smaller picture: as many rows and columns of patches as the budget allows, in about the proportions of the grid.

    The encoder then is cheaper, too. It interpolates its position embeddings; where it cannot, its features are shrunk instead. The
    report says which. Exact where the budget is the size of such a grid (64 is 8 x 8, 288 is 16 x 18), else a little less (a budget
    of 50 gives 7 x 7).

    Parameters
    ----------
    where : shrink "pixels" (bicubic, antialiased), or "features" (the same filter on the grid of tokens).
    """

    where: Literal["pixels", "features"] = "pixels"

    def at_budget(self, tokens: float, total: int, layers: int, at: Literal["mean", "last"] = "mean") -> Self:
        """As of any method, but for counts that are the size of no grid: then the next smaller one."""
        return self.with_budget(round(tokens))

    def layer_tokens(self, total: int, layers: int) -> list[float]:
        """Of a square picture."""
        side = math.isqrt(total)
        rows, columns = self.shape((side, side) if side * side == total else (1, total))
        return [rows * columns] * layers

    def picture(self, grid: tuple[int, int]) -> tuple[int, int] | None:
        return self.shape(grid) if self.where == "pixels" else None

    def shape(self, grid: tuple[int, int]) -> tuple[int, int]:
        """The grid of about the proportions of ``grid`` with the most cells that the budget allows."""
        rows, columns = grid
        budget = resolve_budget(self.budget, rows * columns) or rows * columns
        high = max(1, min(rows, budget, int((budget * rows / columns) ** 0.5)))
        shapes = [(r, min(columns, budget // r)) for r in {high, min(rows, high + 1)} if r <= budget]
        return max(shapes, key=lambda shape: (shape[0] * shape[1], -abs(shape[0] * columns - shape[1] * rows)))

    def reduce(self, tokens: VisualTokens) -> Reduction:
        (rows, columns), (r, c) = tokens.grid, self.shape(tokens.grid)
        every = torch.eye(tokens.number).view(tokens.number, 1, rows, columns)
        weights = F.interpolate(every, (r, c), mode="bicubic", antialias=True, align_corners=False).view(tokens.number, r * c)
        weights = weights.T.to(tokens.features.device, non_blocking=True).expand(len(tokens.features), -1, -1)
        return Reduction(same_for_all(grid_middles(rows, columns, r, c), tokens).index, weights=weights)
