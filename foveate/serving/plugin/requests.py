"""What ``foveate.encode`` returned, as a request for vLLM."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...errors import InputError
from ..placing import Places, fields_of, with_levels

if TYPE_CHECKING:
    from ...pictures import Encoded


def qwen_request(encoded: Encoded, *, row: int = 0, merge: int = 2) -> dict[str, dict[str, Tensor]]:
    """``multi_modal_data`` of a prompt for Qwen2-VL, Qwen2.5-VL or Qwen3-VL: visual tokens that stay, at the places they had.

    The prompt itself has one placeholder for each image, as for pictures.

    Parameters
    ----------
    encoded : of images; what ``foveate.encode`` returned.
    row : the prompt of the batch.
    merge : ``spatial_merge_size`` of the vision encoder.

    Returns
    -------
    ``{"image": fields}`` for k images that keep m_i tokens each: ``image_embeds`` [sum of m_i, D], ``image_positions``
    [sum of m_i, 3] their (t, h, w) in the image, ``image_extents`` [k] by how much the image moves on what is after it, and
    ``image_grid_thw`` [k, 3], a strip of m_i tokens, from which vLLM counts placeholders.

    Raises
    ------
    InputError : the prompt has no images, or videos.
    """
    embeds = with_levels(encoded.embeds, encoded.deepstack)
    items = [(item, each) for item, each in zip(encoded.report.items, embeds, strict=True) if item.row == row]
    if not items or any(item.modality != "image" for item, _ in items):
        raise InputError(f"row {row} has no images, or a video; qwen_request makes requests of images")
    places = []
    for item, _ in items:
        rows, columns = item.grids[0]
        positions = torch.stack([item.part, item.cell // columns, item.cell % columns], -1).cpu()
        places.append(Places(positions, max(rows, columns)))
    return {"image": fields_of([each for _, each in items], places, merge)}
