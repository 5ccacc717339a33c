"""Baselines that every method must be compared with: independent benchmarks find random and uniform choice hard to beat.

Sources: the sampling baselines of PruMerge, Table 4 (arXiv 2403.15388); UniPruneBench (arXiv 2511.02650) for random pruning; DeCo
(arXiv 2405.20985) for pooling. Smaller pictures are in ``resize``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import Self

from ..errors import InputError
from ..tokens import Reduction, VisualTokens, resolve_budget
from .base import ProjectorReducer
from .tools.merging import links_of
from .tools.selection import grid_middles, lattice_blocks, uniform_lattice

BASELINES = ("random", "spatial", "resize", "sequential", "pool")
BESIDE = BASELINES[:3]  # run beside every method at the same cost
SEEDS = (0, 1, 2)  # of a random choice that stands in a table, which is their mean


def count_of(method: ProjectorReducer, tokens: VisualTokens) -> int:
    """The number of tokens to keep; baselines always have one."""
    return resolve_budget(method.budget, tokens.number) or tokens.number


def same_for_all(index: Tensor, tokens: VisualTokens) -> Reduction:
    index = index.to(tokens.features.device, non_blocking=True)
    return Reduction(index.expand(len(tokens.features), -1))


@dataclass(kw_only=True)
class Random(ProjectorReducer, name="random", paper="https://arxiv.org/abs/2511.02650", adaptive=False):
    """A random choice in raster order.

    Parameters
    ----------
    seed : the choice is a function of the seed and the number of tokens: the same for every image, batch and device, so that a
        row of a batch equals the image alone. Use several seeds for an average.
    """

    seed: int = 0

    def repeats(self) -> tuple[Self, ...]:
        return tuple(self.with_fields(seed=seed) for seed in SEEDS)

    def reduce(self, tokens: VisualTokens) -> Reduction:
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(tokens.number, generator=generator)
        return same_for_all(order[: count_of(self, tokens)].sort().values, tokens)


@dataclass(kw_only=True)
class Spatial(ProjectorReducer, name="spatial", paper="https://arxiv.org/abs/2403.15388", adaptive=False):
    """Tokens spread evenly over the grid (Table 4, "spatial"), any count on any grid.

    Parameters
    ----------
    shape : (rows, columns) of the pattern, for example (5, 8) as in the paper; it replaces the budget.
    """

    instead_of_budget = ("shape",)

    shape: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.shape is not None:
            if len(self.shape) != 2 or min(self.shape) < 1:
                raise InputError(f"{self.name}: shape={self.shape!r}; expected (rows, columns), both at least 1")
            self.shape = (int(self.shape[0]), int(self.shape[1]))
            self.budget = self.shape[0] * self.shape[1]
        super().__post_init__()

    def reduce(self, tokens: VisualTokens) -> Reduction:
        if self.shape is None:
            return same_for_all(uniform_lattice(*tokens.grid, count_of(self, tokens)), tokens)
        (rows, columns), (r, c) = tokens.grid, self.shape
        if r > rows or c > columns:
            raise InputError(f"{self.name}: a pattern of {r} x {c} does not fit on a grid of {rows} x {columns}")
        return same_for_all(grid_middles(rows, columns, r, c), tokens)


@dataclass(kw_only=True)
class Sequential(ProjectorReducer, name="sequential", paper="https://arxiv.org/abs/2403.15388", adaptive=False):
    """The first tokens of the flattened grid (Table 4, "sequential")."""

    def reduce(self, tokens: VisualTokens) -> Reduction:
        return same_for_all(torch.arange(count_of(self, tokens)), tokens)


@dataclass(kw_only=True)
class Pool(ProjectorReducer, name="pool", paper="https://arxiv.org/abs/2405.20985", adaptive=False):
    """Average pooling: the grid is cut into even blocks, and each becomes its mean."""

    def reduce(self, tokens: VisualTokens) -> Reduction:
        rows, columns = tokens.grid
        count = count_of(self, tokens)
        owner, share = torch.zeros(rows, columns, dtype=torch.long), torch.zeros(rows, columns)
        for number, (top, end, left, right) in enumerate(lattice_blocks(rows, columns, count)):
            owner[top:end, left:right], share[top:end, left:right] = number, 1 / ((end - top) * (right - left))
        batch, device = len(tokens.features), tokens.features.device
        links = links_of(*(each.view(1, -1).to(device, non_blocking=True).expand(batch, -1) for each in (owner, share)))
        return Reduction(same_for_all(uniform_lattice(rows, columns, count), tokens).index, **links._asdict())
