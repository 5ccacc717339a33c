"""Which visual tokens stay: fences, rankings and uniform patterns, for batches with a different count per image."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def iqr_fence(scores: Tensor, factor: float = 1.5) -> Tensor:
    """Upper fence of Tukey's outlier rule, Q3 + ``factor`` * (Q3 - Q1), for each row.

    Quartiles interpolate linearly between order statistics. [B, N] float -> [B].
    """
    q1, q3 = torch.quantile(scores, torch.tensor([0.25, 0.75], device=scores.device, dtype=scores.dtype), dim=-1)
    return q3 + factor * (q3 - q1)


def ranks(scores: Tensor) -> Tensor:
    """[B, N] place of each token in the descending order of its row, 0 = best; ties go to the earlier token."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(scores.shape[-1], device=scores.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)


def take_in_order(key: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` tokens with the smallest keys of each row, in the order of the keys.

    Parameters
    ----------
    key : [B, N] integers; a token with a key >= 2 N is not kept.

    Returns
    -------
    index [B, count] and valid [B, count].
    """
    value, index = key.sort(dim=-1, stable=True)
    return index[:, :count], value[:, :count] < 2 * key.shape[-1]


@functools.lru_cache(maxsize=4096)
def uniform_lattice(rows: int, columns: int, count: int) -> Tensor:
    """``count`` distinct cells spread evenly over a grid of any size, as raster indices in raster order (on the CPU).

    The rows of the lattice lie evenly over the grid and share the cells as evenly as integers allow, each at the middle of
    its part: 64 of 24 x 24 is the regular 8 x 8 pattern, and any other count works too.
    """
    count = min(count, rows * columns)
    lines = min(rows, max(-(-count // columns), round((count * rows / columns) ** 0.5), 1))
    ends = torch.arange(lines + 1) * count // lines
    cells = []
    for line, number in enumerate(ends.diff().tolist()):
        row = (2 * line + 1) * rows // (2 * lines)
        cells.append(row * columns + (2 * torch.arange(number) + 1) * columns // max(1, 2 * number))
    return torch.cat(cells)


def uniform_stride(tokens: int, count: int) -> Tensor:
    """``count`` distinct raster indices at equal distances along the flattened grid, the first one 0 (on the CPU)."""
    return torch.arange(count) * tokens // max(1, count)


def index_mask(index: Tensor, tokens: int) -> Tensor:
    """[tokens] bool, True at ``index``."""
    mask = torch.zeros(tokens, dtype=torch.bool)
    mask[index] = True
    return mask
