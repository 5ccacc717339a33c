"""Where visual tokens with (t, h, w) positions stand, as the plugin of vLLM reads it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError


@dataclass(frozen=True)
class Places:
    """Where the tokens of a picture or video stand.

    Attributes
    ----------
    positions : [m, 3] (t, h, w) of each token that stays, counted from where the whole picture begins.
    extent : by how much the picture moves on the text after it.
    """

    positions: Tensor
    extent: int


def places_of(visual: Tensor, positions: Tensor, counts: Sequence[int]) -> list[Places]:
    """Places of the pictures and videos of one prompt.

    Parameters
    ----------
    visual : [T] bool, the placeholders of the prompt.
    positions : [3, T] (t, h, w) of its tokens.
    counts : placeholders of each picture or video, in their order; together they are all of ``visual``.

    Raises
    ------
    InputError : there is no text between two of them, or none after the last, so that nothing says where one ends.
    """
    columns, found, first = visual.nonzero()[:, 0].tolist(), [], 0
    for count in counts:
        begin, end = columns[first], columns[first + count - 1] + 1
        if end == len(visual) or bool(visual[end]) or (begin and bool(visual[begin - 1])):
            raise InputError("a picture or video has no text after it, or none between it and the next one. Put some there.")
        start = int(positions[0, begin - 1]) + 1 if begin else 0
        found.append(Places((positions[:, begin:end] - start).T.cpu(), int(positions[0, end]) - start))
        first += count
    return found


def with_levels(embeds: Sequence[Tensor], deepstack: Sequence[Tensor]) -> list[Tensor]:
    """Visual tokens with the features that deeper layers of the decoder add to them, side by side as vLLM has them.

    Parameters
    ----------
    embeds : of each picture [m, D].
    deepstack : of each [levels, m, D]; empty for models without.

    Returns
    -------
    Of each picture [m, D * (1 + levels)].
    """
    if not deepstack:
        return [*embeds]
    return [torch.cat([each, *levels], -1) for each, levels in zip(embeds, deepstack, strict=True)]


def fields_of(embeds: Sequence[Tensor], places: Sequence[Places], merge: int) -> dict[str, Tensor]:
    """Fields of ``image_embeds`` for k pictures or videos that keep m_i tokens each, as the plugin of vLLM takes them.

    Parameters
    ----------
    embeds : of each [m_i, D], or as ``with_levels``.
    places : of each.
    merge : ``spatial_merge_size`` of the vision encoder.

    Returns
    -------
    ``image_embeds`` [sum of m_i, D], ``image_positions`` [sum of m_i, 3], ``image_extents`` [k], and ``image_grid_thw`` [k, 3], a
    strip of m_i tokens, from which vLLM counts placeholders.
    """
    return {
        "image_embeds": torch.cat([each.cpu() for each in embeds]),
        "image_grid_thw": torch.tensor([[1, merge, merge * len(each)] for each in embeds]),
        "image_positions": torch.cat([each.positions for each in places]),
        "image_extents": torch.tensor([each.extent for each in places]),
    }
