"""What a method sees (``VisualTokens``) and what it returns (``Reduction``)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from .errors import InputError

Budget: TypeAlias = int | float | None
EncoderLayer: TypeAlias = int | Literal["last", "aligned"]


def check_budget(budget: Budget) -> None:
    """Raise ``InputError`` unless ``budget`` is None, an int >= 1 or a float in (0, 1]."""
    how = "Use an int >= 1 (visual tokens kept per image), a float in (0, 1] (fraction kept), or none for the method's own rule."
    if budget is None:
        return
    if isinstance(budget, bool) or not isinstance(budget, Real):
        raise InputError(f"budget={budget!r} is not a number. {how}")
    if isinstance(budget, Integral):
        if budget < 1:
            raise InputError(f"budget={budget} would keep no visual token. {how}")
    elif not (math.isfinite(budget) and 0 < budget <= 1):
        raise InputError(f"budget={budget} is not a fraction of the visual tokens. {how}")


def resolve_budget(budget: Budget, tokens: int) -> int | None:
    """Visual tokens to keep of ``tokens``: at least 1, at most all; None where the method decides.

    An int is a count, a float a fraction that is rounded to the nearest count.
    """
    check_budget(budget)
    if budget is None:
        return None
    count = int(budget) if isinstance(budget, Integral) else round(float(budget) * tokens)
    return max(1, min(count, tokens))


@dataclass(frozen=True)
class EncoderTap:
    """Queries and keys of one encoder layer, as its projections give them (not scaled, heads side by side).

    Attributes
    ----------
    query : [B, C] of the [CLS] token.
    keys : [B, 1 + N, C]; row 0 is [CLS], then the patches in raster order.
    heads : number of attention heads that share the C channels.
    states : [B, 1 + N, C] what the layer put out.
    """

    query: Tensor
    keys: Tensor
    heads: int
    states: Tensor | None = None

    def float(self) -> EncoderTap:
        """Query and keys in float32, which scores are computed in."""
        return EncoderTap(self.query.float(), self.keys.float(), self.heads, self.states)


@dataclass(frozen=True)
class VisualTokens:
    """The visual tokens of B images of the same grid, about to enter the projector.

    Attributes
    ----------
    features : [B, N, C] in raster order, N == rows * columns.
    grid : (rows, columns).
    taps : the encoder layers the method asked for with ``encoder_layers()``, by the name it used.
    """

    features: Tensor
    grid: tuple[int, int]
    taps: dict[EncoderLayer, EncoderTap] = field(default_factory=dict)

    @property
    def number(self) -> int:
        """N, visual tokens per image."""
        return self.features.shape[1]


@dataclass(frozen=True)
class Reduction:
    """Which visual tokens stay: output = ``weights @ features``, or ``features[index]`` where ``weights`` is None.

    Attributes
    ----------
    index : [B, M] the source token at whose grid cell (and position) each output token sits, in output order.
    valid : [B, M] bool, image b keeps the tokens with valid[b]; None = all of them. Ragged counts thus need no host
        synchronisation.
    weights : [B, M, N] merge matrix, or None for pure selection.
    scores : [B, N] float32 importance for pictures and reports, or None.
    threshold : [B] the score from which a token was kept, where the method has such a value (adaptive rules).
    """

    index: Tensor
    valid: Tensor | None = None
    weights: Tensor | None = None
    scores: Tensor | None = None
    threshold: Tensor | None = None

    def apply(self, features: Tensor) -> Tensor:
        """[B, N, C] -> [B, M, C] output tokens (the invalid ones included: mask them with ``valid``)."""
        if self.weights is None:
            return features.gather(1, self.index[..., None].expand(-1, -1, features.shape[-1]))
        return self.weights.to(features.dtype) @ features

    def mask(self) -> Tensor:
        """``valid``, or all True, [B, M] bool."""
        return torch.ones_like(self.index, dtype=torch.bool) if self.valid is None else self.valid

    def source_map(self, tokens: int) -> Tensor:
        """[B, N] the output token that each source token went to, -1 = dropped.

        A partition: a token that several outputs drew from belongs to the one that took most of it, and a token that
        sits at an output cell to that cell.
        """
        batch, outputs = self.index.shape
        valid = self.mask()
        if self.weights is None:
            owner = self.index.new_full((batch, tokens), -1)
        else:
            share, owner = self.weights.float().abs().masked_fill(~valid[..., None], 0).max(1)
            owner = owner.masked_fill(share == 0, -1)
        place = torch.arange(outputs, device=self.index.device).expand(batch, -1)
        spare = owner.new_full((batch, 1), -1)  # invalid outputs write to a column that is cut off again
        target = self.index.masked_fill(~valid, tokens)
        return torch.cat([owner, spare], 1).scatter(1, target, place)[:, :tokens]


def keep_all(features: Tensor) -> Reduction:
    """The reduction that keeps every token where it is."""
    batch, number = features.shape[:2]
    return Reduction(torch.arange(number, device=features.device).expand(batch, -1))
