"""The compressor of QueCC (arXiv 2411.03312): one query for each square of the grid."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEW, FIT, RATE = 8, 800, 5e-3  # pictures of a step, steps, and learning rate of the fit before training
DEPTHS = (0.52, 0.70, 0.96, 1.0)  # of the layer that makes the features: hidden states 12, 16, 22 and 23 of CLIP-L
Heard = tuple[Tensor, Tensor, "Tensor | None", tuple[int, int]]  # arguments of a compressor


def level_layers(feature: int) -> tuple[int, ...]:
    """Four layers, or as many as there are, up to the one that makes the features; those below are taken where depths coincide."""
    levels = sorted({max(1, round((feature + 1) * depth)) for depth in DEPTHS})  # numbers of hidden states
    return tuple(level - 1 for level in [*range(max(1, levels[0] - 4 + len(levels)), levels[0]), *levels])


def regions(values: Tensor, grid: tuple[int, int], stride: int) -> Tensor:
    """[B, N, C] in raster order -> [B, T, stride^2, C], the cells of each region; regions and cells in raster order."""
    rows, columns = (side // stride for side in grid)
    return values.unflatten(1, (rows, stride, columns, stride)).transpose(2, 3).flatten(3, 4).flatten(1, 2)


def over_cells(weights: Tensor, grid: tuple[int, int], stride: int) -> Tensor:
    """[B, T, stride^2] weights of the cells of each region -> [B, T, N] of all cells."""
    number = grid[0] * grid[1]
    cell = torch.arange(number, device=weights.device)[None, :, None]
    members = regions(cell, grid, stride)[..., 0].expand(len(weights), -1, -1)
    return weights.new_zeros(*weights.shape[:2], number).scatter(2, members, weights)


class Compressor(nn.Module):
    """One query for each region of the grid attends to the cells of its region; names of parts as in the released code.

    Parameters
    ----------
    channels, encoder, decoder : widths of features, of each level, and of the question (0 = it is not read).
    layers : of the encoder that give the levels.
    stride, heads : side of a region, and heads of the attention.
    """

    heard: list[Heard] | None = None

    def __init__(self, channels: int, encoder: int, decoder: int, layers: tuple[int, ...], stride: int, heads: int) -> None:
        super().__init__()
        self.layers, self.stride = layers, stride
        self.text_projection = nn.Sequential(nn.Linear(decoder, channels), nn.LayerNorm(channels, eps=1e-6)) if decoder else None
        self.q_proj = perceptron(channels, channels)
        self.k_proj, self.v_proj = (perceptron(len(layers) * encoder, channels) for _ in range(2))
        self.q_downsample = nn.Conv2d(channels, channels, stride, stride, groups=channels)
        self.clip_attn = nn.MultiheadAttention(channels, heads, batch_first=True)

    def forward(self, features: Tensor, levels: Tensor, text: Tensor | None, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Outputs, and what each took from the cells of its region.

        Parameters
        ----------
        features, levels : [B, N, C] and [B, N, levels x encoder].
        text : [B, decoder]; None = no question is read.

        Returns
        -------
        [B, T, C], and [B, T, stride^2], whose rows sum to 1.
        """
        if self.heard is not None:
            self.heard.append((features, levels, text, grid))
        if self.text_projection is not None and text is not None:
            features = features + self.text_projection(text)[:, None]
        queries = self.q_downsample(self.q_proj(features).mT.unflatten(2, grid)).flatten(2).mT
        keys, values = (regions(part(levels), grid, self.stride) for part in (self.k_proj, self.v_proj))
        each = queries.flatten(0, 1)[:, None], keys.flatten(0, 1), values.flatten(0, 1)
        made, weights = self.clip_attn(*each, need_weights=True)
        return made.view_as(queries), weights.view(*queries.shape[:2], -1)

    @contextmanager
    def listening(self) -> Iterator[list[Heard]]:
        """Within this, the arguments of each call are in the list."""
        heard: list[Heard] = []
        self.heard = heard
        try:
            yield heard
        finally:
            self.heard = None


def perceptron(inner: int, outer: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inner, outer), nn.GELU(), nn.Linear(outer, outer), nn.LayerNorm(outer, eps=1e-6))


def new_pictures(heard: Heard, known: set[tuple[float, ...]]) -> list[Heard]:
    """A few rows at a time, each of a picture that is not known yet: questions about one picture come one after the other."""
    features, levels, text, grid = heard
    rows = []
    for row, key in enumerate(map(tuple, features[:, :, 0].tolist())):
        if key not in known:
            known.add(key)
            rows.append(row)
    parts = (rows[at : at + FEW] for at in range(0, len(rows), FEW))
    return [(features[some], levels[some], None if text is None else text[some], grid) for some in parts]


@torch.no_grad()
def pictures_heard(compressor: Compressor, model: Any, batches: Iterable[dict[str, Tensor]], most: int) -> list[Heard]:
    """What a compressor is handed while a model that it is attached to reads batches, until ``most`` pictures are known."""
    pieces: list[Heard] = []
    known: set[tuple[float, ...]] = set()
    with compressor.listening() as heard:
        for batch in batches:
            model(**batch)
            pieces += [piece for each in heard for piece in new_pictures(each, known)]
            heard.clear()
            if len(known) >= most:
                break
    return pieces


def fit_to_means(compressor: Compressor, pieces: list[Heard]) -> None:
    """Fit the outputs to the means of the features of their regions, by AdamW on one piece after the other."""
    optimizer = torch.optim.AdamW(compressor.parameters(), RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, FIT)
    for step in range(FIT if pieces else 0):
        features, levels, text, grid = pieces[step % len(pieces)]
        wanted = regions(features, grid, compressor.stride).mean(2)
        (F.mse_loss(compressor(features, levels, text, grid)[0], wanted) / wanted.var()).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
