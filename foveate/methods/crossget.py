"""CrossGET: "Cross-Guided Ensemble of Tokens", Shi et al., ICML 2024 (arXiv 2305.17455): its matching, without its training."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..tokens import BlockTokens, EncoderTap, Regroup, resolve_budget
from .base import EncoderReducer
from .tools.merging import best_partners
from .tools.plans import even_plan, outputs_of, paired_plan
from .tools.scoring import cls_attention, received_attention
from .tools.selection import ranks


@dataclass(kw_only=True)
class CrossGET(EncoderReducer, name="crossget", paper="https://arxiv.org/abs/2305.17455"):
    """In each encoder block unimportant patches merge into the most similar ones of all others (complete-graph matching).

    Patches are ranked by their highest similarity, the cosine of keys averaged over heads; a patch may count on those after it
    only. The ``r`` patches with the smallest importance minus similarity merge into the most similar of the others. Importance is
    the mean attention that a patch receives, plus that of the cross token. Sums are weighted by the softmax of both importances
    and by sizes, as in the code for LLaVA; sizes also weigh attention; the order stays.

    The cross token is a copy of [CLS] with a learnt offset. Without training the offset is zero, so [CLS] takes its place in the
    importance. There is no copy here: attention counts [CLS] once (the code twice, as itself and its copy, so that it merges other
    patches even untrained), and the decoder gets no cross token (the code hands it over: 277 patches and 1).
    ``crossget+`` has both.

    Parameters
    ----------
    budget : patches that leave the last block, exactly. None = ``r``.
    r : patches that merge in each block (13 in the code, which leaves 277 of 576 after 23 blocks), never more than half.
    layers : the blocks that merge; None = all that make the features.
    """

    reads_cls = True
    without_cls = "importance is the mean attention that each token receives, without that of [CLS]"

    r: int = 13
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_layers()
        self.check_range(r=1)

    def counts_sizes(self) -> bool:
        return True

    def plan(self, depth: int, patches: int) -> dict[int, int]:
        blocks = list(range(depth)) if self.layers is None else list(self.layers)
        goal = resolve_budget(self.budget, patches)
        if goal is not None:
            return even_plan(self.name, patches, self.patches_of(goal), blocks, at_most_half=True)
        return paired_plan(patches, [self.r] * len(blocks), blocks)

    def patches_of(self, tokens: int) -> int:
        """How many of so many tokens for the decoder are patches."""
        return tokens

    def importance(self, tap: EncoderTap) -> Tensor:
        """[B, n] float32 of the patches of a block."""
        received = received_attention(tap, cls_looks=True)
        return received if tap.query is None else received + cls_attention(tap)

    def shrink(self, tokens: BlockTokens) -> Regroup:
        tap, number = tokens.tap, tokens.valid.shape[1]
        unit = F.normalize(tap.patch_keys.float().unflatten(-1, (tap.heads, -1)).mean(2), dim=-1)
        every = torch.arange(number, device=unit.device)
        alike, _ = best_partners(unit, unit, lambda part: every[part, None] != every)
        place = ranks(alike)
        ahead, _ = best_partners(unit, unit, lambda part: place[:, part, None] < place[:, None])
        importance = self.importance(tap)
        merged = (importance - ahead).argsort(dim=-1, stable=True)[:, : number - tokens.goal]
        stays = torch.ones_like(tokens.valid).scatter(1, merged, False)
        index = (~stays).long().argsort(dim=-1, stable=True)[:, : tokens.goal]
        looking = unit.gather(1, merged[..., None].expand(-1, -1, unit.shape[-1]))
        _, into = best_partners(looking, unit, lambda part: stays[:, None])
        pair = torch.stack([importance.gather(1, merged), importance.gather(1, into)], -1).softmax(-1)
        share = torch.ones_like(importance).scatter(1, merged, 2 * pair[..., 0]).scatter_add(1, into, 2 * pair[..., 1] - 1)
        owner = outputs_of(index, number, 0)
        owner = owner.scatter(1, merged, owner.gather(1, into))
        total = torch.zeros_like(index, dtype=torch.float32).scatter_add(1, owner, tokens.sizes)
        return Regroup(index, owner, share * tokens.sizes / total.gather(1, owner))
