"""How many patches each block of an encoder leaves, and where they go."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ...errors import InputError


def even_plan(name: str, patches: int, left: int, blocks: list[int], at_most_half: bool) -> dict[int, int]:
    """Patches that each of ``blocks`` leaves, when all take away as many, or one more, and ``left`` are there in the end.

    Parameters
    ----------
    name : of the method, for the error.
    patches : in the beginning.
    at_most_half : a block cannot take away more than half; earlier ones then take more than their part.

    Raises
    ------
    InputError : so few cannot be reached.
    """
    each, more = divmod(patches - left, max(1, len(blocks)))
    counts = [patches - each * step - min(step, more) for step in range(1, len(blocks) + 1)]
    if not blocks:
        raise InputError(f"{name}: the features of this model are made by no encoder block. Use a method before the projector.")
    if at_most_half:
        for step in range(len(blocks) - 2, -1, -1):
            counts[step] = min(counts[step], 2 * counts[step + 1])
        if patches > 2 * counts[0]:
            raise InputError(
                f"{name}: a block merges at most half of its patches, so {len(blocks)} blocks leave "
                f"{least_left(patches, len(blocks))} of {patches} or more, and {left} were asked for. Give a larger budget."
            )
    return merging_only(patches, dict(zip(blocks, counts, strict=True)))


def paired_plan(patches: int, pairs: Sequence[int], blocks: list[int]) -> dict[int, int]:
    """Patches that each of ``blocks`` leaves when it merges as many ``pairs``, at most half of what it gets."""
    counts = [patches]
    for number in pairs:
        counts.append(counts[-1] - min(number, counts[-1] // 2))
    return merging_only(patches, dict(zip(blocks, counts[1:], strict=True)))


def merging_only(patches: int, plan: dict[int, int]) -> dict[int, int]:
    """A plan without the blocks that leave as many as they got."""
    before = [patches, *plan.values()]
    return {block: left for (block, left), had in zip(plan.items(), before, strict=False) if left < had}


def least_left(patches: int, blocks: int) -> int:
    """Patches that are left when every block merges half of them."""
    for _ in range(blocks):
        patches = patches - patches // 2
    return patches


def staged_plan(patches: int, left: int, blocks: list[int]) -> dict[int, int]:
    """Patches that each of ``blocks`` leaves, when all keep the same share and ``left`` are there in the end."""
    share = (left / patches) ** (1 / max(1, len(blocks)))
    counts = [max(left, round(patches * share**step)) for step in range(1, len(blocks))]
    return dict(zip(blocks, [*counts, left], strict=True))


def quarters(depth: int) -> list[int]:
    """The blocks a quarter, a half and three quarters into the encoder: 6, 12, 18 of 24, as 3, 6, 9 of the 12 of a DeiT."""
    return sorted({min(depth - 1, math.ceil(depth * part)) for part in (0.25, 0.5, 0.75)})


def outputs_of(index: Tensor, number: int, others: int) -> Tensor:
    """[B, n] the output of each of ``number`` patches, where output m stands at the patch ``index[b, m]``; ``others`` elsewhere."""
    place = torch.arange(index.shape[1], device=index.device).expand_as(index)
    return index.new_full((len(index), number), others).scatter(1, index, place)
