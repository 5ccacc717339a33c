"""What a native-resolution encoder is told of a packed sequence of patches of which some are missing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .anatomy import Anatomy


def packed_inputs(parts: Anatomy, grid_thw: Tensor, cells: Tensor) -> dict[str, Tensor]:
    """Arguments of the encoder that it would make of the whole grids otherwise: places, and where attention begins and ends.

    Parameters
    ----------
    parts : of a model whose encoder ``packs``.
    grid_thw : [items, 3] patches of the whole pictures.
    cells : [cells of all items] bool, which stay; a cell is ``merge`` x ``merge`` patches.
    """
    from transformers import vision_utils

    tower: Any = parts.tower
    merge = int(tower.spatial_merge_size)
    unit = merge * merge
    patches = cells.repeat_interleave(unit)
    frames = torch.repeat_interleave(grid_thw[:, 1] * grid_thw[:, 2] // unit, grid_thw[:, 0])
    found = {
        "position_ids": vision_utils.get_vision_position_ids(grid_thw, merge)[patches],
        "cu_seqlens": _boundaries(cells, frames.to(cells.device)) * unit,
    }
    if parts.tower_kind.windows:
        order, ends = vision_utils.get_vision_window_index(
            grid_thw, spatial_merge_size=merge, window_size=tower.window_size, patch_size=tower.patch_size
        )
        order = order.to(cells.device)
        kept = cells[order]
        found["window_index"] = (cells.cumsum(0) - 1)[order[kept]]
        found["cu_window_seqlens"] = _boundaries(kept, ends.to(cells.device).diff() // unit) * unit
    if hasattr(tower, "interpolation_mode"):  # its position embeddings are a table of one size
        index, weights = vision_utils.get_vision_interpolation_indices_and_weights(
            grid_thw,
            num_grid_per_side=tower.num_grid_per_side,
            mode=tower.interpolation_mode,
            align_corners=tower.interpolation_align_corners,
            spatial_merge_size=merge,
        )
        found["interp_indices"], found["interp_weights"] = index[patches], weights[patches]
    return found


def _boundaries(kept: Tensor, lengths: Tensor) -> Tensor:
    """Where parts of ``lengths`` of a sequence begin and end once what is not ``kept`` is gone; empty parts are left out."""
    total = torch.cat([kept.new_zeros(1, dtype=torch.long), kept.cumsum(0)])
    ends = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).long()
    return torch.unique_consecutive(total[ends]).to(torch.int32)
