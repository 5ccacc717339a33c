"""Grids that are cut into squares of ``stride`` cells a side, each of which becomes one token."""

from __future__ import annotations

import math

from ...errors import InputError
from ...tokens import Budget, resolve_budget

Grid = tuple[int, int]


def strides_of(grid: Grid) -> list[int]:
    """Those that divide both sides, without 1."""
    side = math.gcd(*grid)
    return [stride for stride in range(2, side + 1) if side % stride == 0]


def smallest_stride(name: str, budget: Budget, grid: Grid | None) -> int:
    """The one that leaves the most tokens within a budget.

    Parameters
    ----------
    name : of the method, for errors.
    grid : (rows, columns); None = pictures have grids of many sizes.

    Raises
    ------
    InputError : there is none.
    """
    if grid is None:
        raise InputError(f"{name}: pictures of this model have grids of many sizes. Give stride= and no budget.")
    cells = grid[0] * grid[1]
    count = resolve_budget(budget, cells) or cells
    for stride in strides_of(grid):
        if cells // stride**2 <= count:
            return stride
    raise InputError(f"{name}: budget={budget} cannot be had of {_named(grid)}. {_choices(grid)}")


def check_stride(name: str, stride: int, budget: Budget, grid: Grid) -> None:
    """Raise ``InputError`` where a stride does not divide a grid, or leaves more than a budget."""
    rows, columns = grid
    if rows % stride or columns % stride:
        raise InputError(f"{name}: stride={stride} does not divide {_named(grid)}. {_choices(grid)}")
    count, left = resolve_budget(budget, rows * columns), rows * columns // stride**2
    if count is not None and count < left:
        raise InputError(
            f"{name}: its weights have stride={stride}, which leaves {left} of {_named(grid)}, and budget={budget} is less. "
            f"{_choices(grid)} Each needs weights of its own."
        )


def _named(grid: Grid) -> str:
    return f"a picture of {grid[0]} x {grid[1]} tokens"


def _choices(grid: Grid) -> str:
    each = [f"{stride} ({grid[0] * grid[1] // stride**2} tokens)" for stride in strides_of(grid)]
    return f"Strides that do: {', '.join(each) or 'none'}."
