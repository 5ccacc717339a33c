"""The vision encoder over many pictures of one size at a time, for training: the stock one takes them one after the other.

The same modules, and to rounding the same numbers (tested); windows of all pictures are one batch of attention.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..scenes import PATCH
from .build import MERGE, WINDOW

THETA = 10000.0  # of the rotary positions


@functools.lru_cache(maxsize=512)
def order(rows: int, columns: int) -> Tensor:
    """[rows * columns] row-by-row numbers of patches in the order of the encoder: those of a token stand together."""
    places = torch.arange(rows * columns).view(rows // MERGE, MERGE, columns // MERGE, MERGE)
    return places.transpose(1, 2).flatten()


@functools.lru_cache(maxsize=512)
def windows(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Patches of each window [windows, patches], -1 where it reaches over the edge, and where each patch is in it [patches]."""
    side = WINDOW // PATCH
    row, column = order(rows, columns) // columns, order(rows, columns) % columns
    across = -(-columns // side)
    number = row // side * across + column // side
    slots = torch.full((-(-rows // side) * across, side * side), -1)
    inverse = torch.empty(rows * columns, dtype=torch.long)
    for window in range(len(slots)):
        mine = (number == window).nonzero().flatten()
        slots[window, : len(mine)] = mine
        inverse[mine] = window * side * side + torch.arange(len(mine))
    return slots, inverse


@functools.lru_cache(maxsize=512)
def rotations(rows: int, columns: int, head: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines [patches, head] of rows and columns."""
    frequencies = THETA ** (-torch.arange(0, head // 2, 2).float() / (head // 2))
    places = order(rows, columns)
    angles = torch.cat([(places // columns)[:, None] * frequencies, (places % columns)[:, None] * frequencies], 1)
    return torch.cat([angles, angles], 1).cos(), torch.cat([angles, angles], 1).sin()


def _rotated(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = states.chunk(2, -1)
    return states * cos + torch.cat([-second, first], -1) * sin


def _attend(block: Any, states: Tensor, cos: Tensor, sin: Tensor, cut: tuple[Tensor, Tensor] | None) -> Tensor:
    """Attention of one layer, over all patches of a picture or within its windows."""
    heads = block.attn.num_heads
    query, key, value = block.attn.qkv(states).unflatten(-1, (3, heads, -1)).unbind(2)
    query, key = (_rotated(s, cos[:, None], sin[:, None]).to(value.dtype) for s in (query, key))
    if cut is None:
        query, key, value = (s.transpose(1, 2) for s in (query, key, value))
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2)
    else:
        slots, inverse = cut
        shape = (len(states) * len(slots), slots.shape[1], heads, -1)
        query, key, value = (s[:, slots.clamp(min=0)].reshape(shape).transpose(1, 2) for s in (query, key, value))
        # matrix products are faster than the fused kernel on windows, five times in bfloat16 on a CPU
        scores = query * query.shape[-1] ** -0.5 @ key.transpose(2, 3)
        if (slots < 0).any():
            scores = scores.masked_fill((slots < 0).repeat(len(states), 1)[:, None, None], float("-inf"))
        mixed = (scores.float().softmax(-1).to(value.dtype) @ value).transpose(1, 2)
        mixed = mixed.reshape(len(states), -1, heads, mixed.shape[-1])[:, inverse]
    return block.attn.proj(mixed.flatten(2))


def encode(tower: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Patches [B, T * N, C] before the merger, and tokens [B, T * N / 4, D] after it, in the order of the encoder.

    Parameters
    ----------
    tower : the vision encoder of a Qwen2.5-VL.
    pixels : float [B, T, 2, 3, H, W] frames, normalised; a picture is one frame twice.
    """
    batch, times, _, _, height, width = pixels.shape
    rows, columns = height // PATCH, width // PATCH
    grid = pixels.view(batch * times, 2, 3, rows, PATCH, columns, PATCH).permute(0, 3, 5, 2, 1, 4, 6).flatten(3).flatten(1, 2)
    device = pixels.device
    weight = tower.patch_embed.proj.weight
    states = F.linear(grid[:, order(rows, columns).to(device)], weight.flatten(1))
    cos, sin = (table.to(device) for table in rotations(rows, columns, states.shape[-1] // tower.config.num_heads))
    slots, inverse = (table.to(device) for table in windows(rows, columns))
    for number, block in enumerate(tower.blocks):
        cut = None if number in tower.config.fullatt_block_indexes else (slots, inverse)
        states = states + _attend(block, block.norm1(states), cos, sin, cut)
        states = states + block.mlp(block.norm2(states))
    tokens = tower.merger(states).view(batch, -1, tower.config.out_hidden_size)
    return states.reshape(batch, -1, states.shape[-1]), tokens
