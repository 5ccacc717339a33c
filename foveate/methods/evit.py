"""EViT: "Not All Patches are What You Need", Liang et al., ICLR 2022 (arXiv 2202.07800)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from ..errors import InputError
from ..tokens import BlockTokens, Regroup, resolve_budget
from .base import EncoderReducer
from .tools.plans import outputs_of, quarters, staged_plan
from .tools.scoring import cls_attention
from .tools.selection import ranks


@dataclass(kw_only=True)
class EViT(EncoderReducer, name="evit", paper="https://arxiv.org/abs/2202.07800"):
    """In some encoder blocks the patches with the highest [CLS] attention stay, and all others become one.

    The new patch is the sum of the others, weighted by their [CLS] attention and not divided by the weights. It stands at the cell
    of the best of them and competes with all patches in later blocks. A single patch that is left over stays as it is. The paper
    fine-tunes the encoder with this; here it is used without.

    Parameters
    ----------
    budget : tokens that leave the last of the blocks, the sum included; the same share stays in each block. None = ``keep_rate``.
    keep_rate : share of the patches that each block keeps, beside the sum (0.7 in the code).
    counting : "relative", the share of what entered the block (the official code: 0.63 of 576 leaves 364, 231, 147), or "absolute",
        powers of the share of all patches (Haurum et al., arXiv 2308.04657: 0.25 leaves 145, 37, 10).
    layers : the blocks; None = a quarter, a half and three quarters into the encoder, as 3, 6, 9 of 12 in the code.
    fuse : whether there is a sum (an option of the official code; always in Haurum's). A budget of 1 leaves none.
    order : "encoder" is descending [CLS] attention with the sum at the end, as the official code leaves them.
    """

    reads_cls = True

    keep_rate: float = 0.7
    counting: Literal["relative", "absolute"] = "relative"
    layers: tuple[int, ...] | None = None
    fuse: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_layers()
        if not 0 < self.keep_rate <= 1:
            raise InputError(f"{self.name}: keep_rate={self.keep_rate}; it must be above 0 and at most 1")

    def plan(self, depth: int, patches: int) -> dict[int, int]:
        blocks = quarters(depth) if self.layers is None else list(self.layers)
        goal = resolve_budget(self.budget, patches)
        if goal is not None:
            return staged_plan(patches, goal, blocks)
        counts = [patches]
        for step in range(1, len(blocks) + 1):
            relative = self.counting == "relative"
            kept = math.ceil(self.keep_rate * counts[-1]) if relative else int(self.keep_rate**step * patches)
            counts.append(min(counts[-1], max(1, kept) + self.fuse))
        return dict(zip(blocks, counts[1:], strict=True))

    def shrink(self, tokens: BlockTokens) -> Regroup:
        scores, goal = cls_attention(tokens.tap), tokens.goal
        number = scores.shape[1]
        fused = self.fuse and 1 < goal < number
        kept = goal - fused
        place = ranks(scores)
        best = place.argsort(dim=-1)  # by descending attention
        stays = place < kept
        index = best[:, :kept] if self.order == "encoder" else best[:, :kept].sort(dim=-1).values
        owner = outputs_of(index, number, -1)
        if not fused:
            return Regroup(index, owner)
        index = torch.cat([index, best[:, kept : kept + 1]], 1)
        return Regroup(index, torch.where(stays, owner, kept), torch.where(stays, 1.0, scores))
