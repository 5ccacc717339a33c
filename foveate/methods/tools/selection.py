"""Which visual tokens stay: fences, rankings and uniform patterns, for batches with a different count per image."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...errors import InputError
from ...tokens import Budget


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


def order_keys(scores: Tensor, first: Tensor, kept: Tensor) -> Tensor:
    """Keys for ``take_in_order``: tokens in ``first`` by descending score, then the others in ``kept`` in raster order.

    [B, N] scores, [B, N] bool, [B, N] bool -> [B, N] integers.
    """
    number = scores.shape[-1]
    raster = torch.arange(number, device=scores.device).expand_as(kept)
    return torch.where(first, ranks(scores), number + raster).masked_fill(~kept, 2 * number)


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


def _edges(length: int, parts: int) -> list[int]:
    """Where each of ``parts`` stretches of ``length`` cells begins, and the end."""
    return [-(-i * length // parts) for i in range(parts + 1)]


@functools.lru_cache(maxsize=4096)
def lattice_blocks(rows: int, columns: int, count: int) -> tuple[tuple[int, int, int, int], ...]:
    """Cut a grid of any size into ``count`` rectangles that are as even as integers allow, in raster order.

    The grid is cut into bands of rows and each band into stretches of columns; a band has as many as any other, or one more.

    Returns
    -------
    (first row, end row, first column, end column) of each rectangle; together they cover the grid once.
    """
    count = min(count, rows * columns)
    bands = min(rows, max(-(-count // columns), round((count * rows / columns) ** 0.5), 1))
    blocks = []
    lines = _edges(rows, bands)
    for band in range(bands):
        number = (band + 1) * count // bands - band * count // bands
        ends = _edges(columns, max(1, number))
        blocks += [(lines[band], lines[band + 1], ends[i], ends[i + 1]) for i in range(number)]
    return tuple(blocks)


def uniform_lattice(rows: int, columns: int, count: int) -> Tensor:
    """``count`` distinct cells spread evenly over a grid, the middle of each block, as raster indices in raster order (CPU).

    64 of 24 x 24 is the regular 8 x 8 pattern; any other count on any other grid works too.
    """
    middles = [(top + end) // 2 * columns + (left + right) // 2 for top, end, left, right in lattice_blocks(rows, columns, count)]
    return torch.tensor(middles, dtype=torch.long)


def grid_middles(rows: int, columns: int, r: int, c: int) -> Tensor:
    """[r * c] the cells of a grid in the middle of each of ``r`` x ``c`` even parts, in raster order (on the CPU)."""
    row = (2 * torch.arange(r) + 1) * rows // (2 * r)
    column = (2 * torch.arange(c) + 1) * columns // (2 * c)
    return (row[:, None] * columns + column).flatten()


def uniform_stride(tokens: int, count: int) -> Tensor:
    """``count`` distinct raster indices at equal distances along the flattened grid, the first one 0 (on the CPU)."""
    return torch.arange(count) * tokens // max(1, count)


def index_mask(index: Tensor, tokens: int) -> Tensor:
    """[tokens] bool, True at ``index``."""
    mask = torch.zeros(tokens, dtype=torch.bool)
    mask[index] = True
    return mask


def counts_of_images(budget: Budget, initial: Tensor) -> Tensor:
    """[B, I] tokens to keep of images that had ``initial`` [B, I] ones; all where ``budget`` is None."""
    if budget is None:
        return initial
    wanted = torch.full_like(initial, int(budget)) if isinstance(budget, int) else (budget * initial.double()).round().long()
    return wanted.clamp(min=1).minimum(initial)


def best_of_images(scores: Tensor, of_image: Tensor, counts: Tensor) -> Tensor:
    """[B, S] bool, of each image its tokens with the highest scores; ties go to the earlier token.

    Parameters
    ----------
    scores : [B, S].
    of_image : [B, I, S] bool, the tokens of each image.
    counts : [B, I] how many to take.
    """
    mine = scores[:, None].expand_as(of_image).masked_fill(~of_image, float("-inf"))
    return ((ranks(mine) < counts[..., None]) & of_image).any(1)


def best_in_order(scores: Tensor, count: int) -> Tensor:
    """[B, count] the tokens with the highest scores, in raster order; ties go to the earlier token."""
    return scores.argsort(dim=-1, descending=True, stable=True)[:, :count].sort(dim=-1).values


def stage_ratio(name: str, budget: int | float, initial: Tensor, cuts: Sequence[int], layers: int) -> Tensor:
    """[B, I] what each of several stages has to leave of the one before, so that the mean over layers is ``budget``.

    Parameters
    ----------
    name : of the method, for the error.
    budget : tokens, or a fraction of ``initial`` [B, I].
    cuts : the decoder layers that stages begin at, of ``layers``.

    Raises
    ------
    InputError : the layers before the first cut take more than the budget.
    """
    ratio = torch.zeros_like(initial, dtype=torch.double)
    for number in initial.unique().tolist():  # sizes of images, not images
        share = min(1.0, budget / number if isinstance(budget, int) and number else float(budget))
        if number and share < cuts[0] / layers:
            raise InputError(
                f"{name}: budget={budget} is a mean over layers, and layers 0 to {cuts[0] - 1} run all tokens: it cannot be below "
                f"{cuts[0] / layers:.1%} of them. Give earlier layers=, or a larger budget."
            )
        ratio = ratio.masked_fill(initial == number, _stage_ratio(share, tuple(cuts), layers) if number else 0.0)
    return ratio


@functools.lru_cache(maxsize=1024)
def _stage_ratio(share: float, cuts: tuple[int, ...], layers: int) -> float:
    runs = [(end - begin) / layers for begin, end in itertools.pairwise((0, *cuts, layers))]
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        more = sum(length * middle**stage for stage, length in enumerate(runs)) < share
        low, high = (middle, high) if more else (low, middle)
    return high


def rows_at_once(number: int) -> int:
    """Rows of a matrix of ``number`` columns to work on at a time, so that they stay in a cache. The same in every batch.

    What is made of them should go to a place that is there already: small new tensors between large ones that come and go keep the
    allocator of C from using memory again.
    """
    return max(128, 2**20 // number)


LARGE = 10_000  # tokens from which on a matrix of all their similarities is kept in 16 bits, or not at all
STEPS = 2**15 - 1


@torch.no_grad()
def cosines(features: Tensor, block: int = 384) -> Tensor:
    """[B, N, N] float32 cosine similarity of the tokens of each image; a token of zeros is like no other.

    Only the upper half is computed, ``block`` rows at a time. From ``LARGE`` tokens on they are 16-bit numbers, in ``STEPS`` from 0
    to 1, so that they take half a gigabyte and not one; ``rows_of`` and ``unpacked`` read both. [B, N, C] -> [B, N, N].
    """
    number = features.shape[1]
    vectors = features.float()
    small = number < LARGE
    similar = vectors.new_empty(len(vectors), number, number, dtype=torch.float32 if small else torch.int16)
    scale = torch.ones_like(vectors[..., 0]) if small else STEPS**0.5 / vectors.norm(dim=-1).clamp(min=1e-12)
    for first in range(0, number, block):
        rows = vectors[:, first : first + block] @ vectors[:, first:].transpose(1, 2)
        if not small:
            rows = rows.mul_(scale[:, first : first + block, None]).mul_(scale[:, None, first:]).round_().clamp_(-STEPS, STEPS)
        similar[:, first : first + block, first:] = rows
        similar[:, first:, first : first + block] = rows.transpose(1, 2)
    if not small:
        return similar
    scale = similar.diagonal(dim1=1, dim2=2).clamp(min=1e-24).rsqrt()
    return similar.mul_(scale[:, None]).mul_(scale[..., None])


def unpacked(similar: Tensor) -> Tensor:
    """float32 values of ``cosines``, or of some of them."""
    return similar.float().div_(STEPS) if similar.dtype == torch.int16 else similar


def rows_of(matrices: Tensor, index: Tensor) -> Tensor:
    """[B, R, N] the rows at ``index`` [B, R] of matrices [B, M, N]: ``gather``, at the speed of a copy."""
    batch, rows, width = matrices.shape
    flat = index + rows * torch.arange(batch, device=index.device)[:, None]
    return unpacked(matrices.flatten(0, 1).index_select(0, flat.flatten()).view(*index.shape, width))


@torch.no_grad()
def cosine_rows(features: Tensor) -> Callable[[Tensor], Tensor]:
    """What gives rows of the cosines of [B, N, C]: [B, 1] -> [B, 1, N], in full precision. Of many tokens each is computed anew."""
    if features.shape[1] < LARGE:
        return functools.partial(rows_of, cosines(features))
    unit = features.float()
    unit = unit / unit.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    return lambda index: unit.gather(1, index[..., None].expand(-1, -1, unit.shape[-1])) @ unit.transpose(1, 2)


@torch.no_grad()
def farthest_first(similar: Tensor, count: int, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Greedy max-min diversity: each token is the one least similar to its most similar token chosen so far.

    The first is the one whose most similar other token is least similar. Ties go to the earlier token.

    Parameters
    ----------
    similar : [B, N, N]; its diagonal is overwritten.
    count : how many to choose.
    weight : [B, N], at least 0, by which the distance of each token, 1 - its similarity, is multiplied; a token of weight 0 comes
        last. None = equal ones.

    Returns
    -------
    [B, count] in the order they were chosen, and [B, N] how similar each token is to its most similar other one.
    """
    similar.diagonal(dim1=1, dim2=2).fill_(-STEPS if similar.dtype == torch.int16 else -1.0)
    alone = nearest = unpacked(similar.amax(-1))
    taken, order = torch.zeros_like(nearest, dtype=torch.bool), []
    for step in range(count):
        far = -nearest if weight is None else torch.where(weight > 0, (1 - nearest).clamp(min=0) * weight, -1.0)
        best = far.masked_fill(taken, float("-inf")).argmax(-1, keepdim=True)
        taken = taken.scatter(1, best, True)
        row = rows_of(similar, best)[:, 0]
        nearest = row if step == 0 else torch.maximum(nearest, row)
        order.append(best)
    return torch.cat(order, 1), alone


@torch.no_grad()
def relevant_first(importance: Tensor, row_of: Callable[[Tensor], Tensor], count: int, share: float) -> Tensor:
    """Greedy maximal marginal relevance: ``share`` * importance - (1 - ``share``) * similarity to the most similar chosen token.

    The first is the most important token. Ties go to the earlier token.

    Parameters
    ----------
    importance : [B, N].
    row_of : gives rows of the similarities of all tokens, [B, 1] -> [B, 1, N] (``cosine_rows``).
    count : how many to choose.
    share : of importance, from 0 to 1.

    Returns
    -------
    [B, count] in the order they were chosen.
    """
    taken, nearest, order = torch.zeros_like(importance, dtype=torch.bool), None, []
    for _ in range(count):
        gain = importance if nearest is None else share * importance - (1 - share) * nearest
        best = gain.masked_fill(taken, float("-inf")).argmax(-1, keepdim=True)
        taken = taken.scatter(1, best, True)
        row = row_of(best)[:, 0]
        nearest = row if nearest is None else torch.maximum(nearest, row)
        order.append(best)
    return torch.cat(order, 1)


def anchors(attention: Tensor) -> Tensor:
    """A cell of its own for each output that was made of several tokens: the free one that it attends to most.

    Outputs choose in the order of their largest attention; ties go to earlier outputs and cells.

    Parameters
    ----------
    attention : [B, M, N], at least 0, with M <= N.

    Returns
    -------
    index [B, M], without repetition in a row.
    """
    batch, outputs, cells = attention.shape
    order = attention.amax(-1).argsort(dim=1, descending=True, stable=True)
    free = attention.detach().float().gather(1, order[..., None].expand(-1, -1, cells))
    index = attention.new_empty(batch, outputs, dtype=torch.long)
    taken = torch.zeros(batch, cells, dtype=torch.bool, device=attention.device)
    for place in range(outputs):
        best = free[:, place].masked_fill(taken, -1).argmax(1, keepdim=True)
        taken = taken.scatter(1, best, True)
        index = index.scatter(1, order[:, place, None], best)
    return index
