"""VTC-CLS: Wang et al., 2024 (arXiv 2412.05819), and its single-layer case FasterVLM (arXiv 2412.01818)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import InputError
from ..tokens import EncoderLayer, Reduction, VisualTokens, resolve_budget
from .base import ProjectorReducer
from .tools.scoring import cls_attention
from .tools.selection import best_in_order


@dataclass(kw_only=True)
class VTCCls(ProjectorReducer, name="vtc-cls", paper="https://arxiv.org/abs/2412.05819", adaptive=False):
    """The tokens with the highest [CLS] attention, summed over the last encoder layers up to the penultimate one, in raster order.

    The released code sums layers 16 to 22 of 24 and is right for one image at a time; its default budget is 36.

    Parameters
    ----------
    layers : how many encoder layers vote; None = those of the last third, without the last one: 7 of 24, as in the code.
    """

    reads_cls = True

    layers: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers is not None and self.layers < 1:
            raise InputError(f"{self.name}: layers={self.layers}; at least one encoder layer has to vote")

    def encoder_layers(self, depth: int) -> tuple[EncoderLayer, ...]:
        voting = max(1, depth - 1 - 2 * depth // 3) if self.layers is None else self.layers
        if voting >= depth > 1:
            raise InputError(f"{self.name}: layers={voting}; this encoder has {depth - 1} layers up to the penultimate one")
        return tuple(range(depth - 1 - voting, depth - 1)) if depth > 1 else (0,)

    def reduce(self, tokens: VisualTokens) -> Reduction:
        scores = torch.stack([cls_attention(tap) for tap in tokens.taps.values()]).sum(0)
        return Reduction(best_in_order(scores, resolve_budget(self.budget, tokens.number) or tokens.number), scores=scores)


@dataclass(kw_only=True)
class FasterVLM(VTCCls, name="fastervlm", paper="https://arxiv.org/abs/2412.01818", adaptive=False):
    """The tokens with the highest [CLS] attention in the penultimate encoder layer, in raster order.

    Parameters
    ----------
    layers : how many encoder layers vote, counted from the penultimate one back.
    """

    layers: int | None = 1
