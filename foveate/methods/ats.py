"""ATS: "Adaptive Token Sampling for Efficient Vision Transformers", Fayyaz et al., ECCV 2022 (arXiv 2111.15667)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..errors import FoveateError
from ..tokens import BlockTokens, Regroup, resolve_budget
from .base import EncoderReducer
from .fields import check_per_block, for_each_block
from .tools.plans import quarters, staged_plan
from .tools.scoring import cls_attention, cls_attention_by_head
from .tools.selection import order_keys, ranks, take_in_order


@dataclass(kw_only=True)
class ATS(EncoderReducer, name="ats", paper="https://arxiv.org/abs/2111.15667"):
    """In some encoder blocks patches are sampled by their significance; a picture keeps as many as were drawn, at most K.

    Significance is [CLS] attention times the norm of the value. Its cumulative sum is inverted at K fixed points, and points that
    meet the same patch count once, so that a picture with few important patches keeps few. Attention itself runs for all patches
    here, and what was not drawn leaves after it: the result is the same.

    Parameters
    ----------
    budget : tokens that leave the last of the blocks, exactly, the same share in each block: a number of points, found by
        bisection, that meets that many patches or fewer, and the most significant others fill up. None = the adaptive rule.
    points : K, sample points, one number for all blocks or one for each; none = as many as the picture has patches in each (the
        official code; those of Haurum et al. fall from block to block: (145, 37, 10) for a keep rate of 0.25).
    variant : "official": patches in ascending order of significance, points from the first step of the curve to 1, so that the
        patch of the first step is always met; all blocks but the first quarter. "haurum" (arXiv 2308.04657): raster order, points
        in the middle of K equal parts (the code leaves the last one out); a quarter, a half and three quarters into the encoder;
        significance is taken in each head and summed.
    layers : the blocks; None = those of the variant.
    min_tokens : at least so many stay. Ours: the official code bounds the number of points by 8, and nothing what they meet.
    order : "encoder" is the order in which the variant sums.
    """

    reads_cls = True

    instead_of_budget = ("points",)

    points: int | tuple[int, ...] = ()
    variant: Literal["official", "haurum"] = "official"
    layers: tuple[int, ...] | None = None
    min_tokens: int = 8

    def __post_init__(self) -> None:
        self.drawing = check_per_block(self, "points", least=1)
        super().__post_init__()
        self.check_layers()
        self.check_range(min_tokens=1)

    def plan(self, depth: int, patches: int) -> dict[int, int]:
        blocks = quarters(depth) if self.variant == "haurum" else list(range(round(depth / 4), depth))
        blocks = blocks if self.layers is None else list(self.layers)
        goal = resolve_budget(self.budget, patches)
        if goal is not None:
            return staged_plan(patches, goal, blocks)
        return dict(zip(blocks, for_each_block(self, "points", self.drawing or (patches,), blocks), strict=True))

    def shrink(self, tokens: BlockTokens) -> Regroup:
        scores = self.significance(tokens)
        number, raster = scores.shape[1], self.variant == "haurum"
        rising = scores.masked_fill(~tokens.valid, float("inf")).argsort(dim=-1, stable=True)  # padding last, as in raster order
        order = torch.arange(number, device=scores.device).expand_as(scores) if raster else rising
        curve = scores.double().gather(1, order).cumsum(-1)
        curve = curve - (0 if raster else curve[:, :1])
        curve = curve / curve[:, -1:].clamp(min=1e-12)
        met = self.exactly(curve, tokens.goal) if self.budget is not None else self.drawn(curve, tokens.goal)
        chosen = torch.zeros_like(met).scatter(1, order, met) & tokens.valid
        best = ranks(scores)
        if self.budget is not None:  # those that were drawn first, then the most significant
            chosen = ranks(-(best + number * ~chosen)) < tokens.goal
        least = min(self.min_tokens, number) if self.budget is None else tokens.goal
        chosen = torch.where(chosen.sum(1, keepdim=True) < least, best < least, chosen) & tokens.valid
        first = chosen & (self.order == "encoder") & (not raster)
        keys = order_keys(-scores, first, chosen)
        index, valid = take_in_order(keys, tokens.goal if self.budget is not None else int(chosen.sum(1).max()))
        place = torch.arange(index.shape[1], device=index.device).expand_as(index)
        owner = torch.full_like(order, -1).scatter(1, index, torch.where(valid, place, -1))
        return Regroup(index, owner, valid=None if self.budget is not None else valid)

    def significance(self, tokens: BlockTokens) -> Tensor:
        """[B, n] float32, 0 for padding."""
        tap = tokens.tap
        if tap.values is None:
            raise FoveateError("the values of the encoder block were not recorded. This is a fault of the engine.")
        values = tap.values[:, tap.lead :].float()
        if self.variant == "haurum" and tap.query is not None:
            norms = values.unflatten(-1, (tap.heads, -1)).norm(dim=-1)  # [B, n, H]
            scores = (cls_attention_by_head(tap) * norms.transpose(1, 2)).sum(1)
        else:
            scores = cls_attention(tap) * values.norm(dim=-1)
        return scores.masked_fill(~tokens.valid, 0.0)

    def drawn(self, curve: Tensor, points: int | Tensor) -> Tensor:
        """[B, n] bool, the steps of a curve [B, n] from 0 to 1 that are nearest to one of the points.

        A step is met if a point lies between the middles to its neighbours: points below a value are counted in closed form.
        """
        middle = (curve[:, 1:] + curve[:, :-1]) / 2
        every = torch.as_tensor(points, device=curve.device, dtype=curve.dtype).expand(len(curve), 1)
        if self.variant == "haurum":
            below = middle * every + 0.5
        else:
            first = curve.masked_fill(curve <= 0, 1.0).amin(-1, keepdim=True)
            below = (middle - first) * (every - 1) / (1 - first).clamp(min=1e-12) + 1
            below = torch.where(every > 1, below, 0)  # a single point is the end of the curve
        below = torch.floor(below + 1e-9).clamp(min=0).minimum(every)  # a point in the middle counts, whatever rounding does to it
        return torch.cat([torch.zeros_like(every), below, every], 1).diff(dim=-1) > 0

    def exactly(self, curve: Tensor, count: int) -> Tensor:
        """As ``drawn``, with a number of points for each picture, large by bisection, that meets ``count`` steps or fewer."""
        low = torch.zeros(len(curve), 1, device=curve.device, dtype=curve.dtype)
        high = torch.full_like(low, 64.0 * curve.shape[1])
        for _ in range(16):
            middle = ((low + high) / 2).floor()
            fits = self.drawn(curve, middle).sum(-1, keepdim=True) <= count
            low, high = torch.where(fits, middle, low), torch.where(fits, high, middle)
        return self.drawn(curve, low)
