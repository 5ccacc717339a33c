"""ToMe: "Token Merging: Your ViT But Faster", Bolya et al., ICLR 2023 (arXiv 2210.09461)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..tokens import BlockTokens, Regroup, resolve_budget
from .base import EncoderReducer
from .fields import check_per_block, for_each_block
from .tools.merging import best_partners
from .tools.plans import even_plan, outputs_of, paired_plan


@dataclass(kw_only=True)
class ToMe(EncoderReducer, name="tome", paper="https://arxiv.org/abs/2210.09461", adaptive=False):
    """In each encoder block the most similar pairs of patches become one, weighted by how many patches they stand for.

    Patches at even places of the sequence (with [CLS] in front) look for the most similar one at an odd place, by the cosine of
    their keys, averaged over heads; the best pairs merge. Attention then counts a token as often as it has patches
    (proportional attention). The decoder gets raster order, by the odd token of each merged one; the official order mixes
    both halves in every block (``order="encoder"``). Without [CLS] that code leaves unmerged tokens in the order of their
    similarity; here they keep their own.

    Parameters
    ----------
    budget : patches that leave the last block, exactly; the blocks merge as evenly as whole numbers allow (144 of 576 over 23
        blocks: 18 merge 19 and 5 merge 18). None = ``r`` says how many.
    r : pairs that each block merges, one number for all or one for each; never more than half of the patches (the official code).
    layers : the blocks that merge; None = all that make the features. ``layers=(6, 12, 18), r=(432, 108, 27)`` is the variant of
        Haurum et al. (arXiv 2308.04657) for a keep rate of 0.25, which leaves 288, 180 and 153.
    proportional : whether attention counts sizes.
    """

    instead_of_budget = ("r",)

    r: int | tuple[int, ...] = ()
    layers: tuple[int, ...] | None = None
    proportional: bool = True

    def __post_init__(self) -> None:
        self.pairs = check_per_block(self, "r", least=0)
        super().__post_init__()
        self.check_layers()

    def needs_budget(self) -> bool:
        return not self.pairs

    def counts_sizes(self) -> bool:
        return self.proportional

    def plan(self, depth: int, patches: int) -> dict[int, int]:
        blocks = list(range(depth)) if self.layers is None else list(self.layers)
        goal = resolve_budget(self.budget, patches)
        if goal is not None:
            return even_plan(self.name, patches, goal, blocks, at_most_half=True)
        return paired_plan(patches, for_each_block(self, "r", self.pairs, blocks), blocks)

    def shrink(self, tokens: BlockTokens) -> Regroup:
        tap, number = tokens.tap, tokens.valid.shape[1]
        # similarity is that of keys, averaged over heads [B, n, d]
        metric = tap.patch_keys.float().unflatten(-1, (tap.heads, -1)).mean(2)
        first, other = tap.lead % 2, 1 - tap.lead % 2  # [CLS] is the first of the even ones
        looking, into = (torch.arange(begin, number, 2, device=metric.device) for begin in (first, other))
        # bipartite matching: every second patch looks for its best partner among the others
        unit = F.normalize(metric, dim=-1)
        alike, partner = best_partners(unit[:, first::2], unit[:, other::2])
        # the most similar pairs merge, as many as the goal asks for; the rest of the lookers stay as they are
        ranked = alike.argsort(dim=-1, descending=True, stable=True)
        pairs = number - tokens.goal
        staying = ranked[:, pairs:].sort(dim=-1).values
        # outputs: lookers that stay, in their order, then all partners; a merged looker goes to the output of its partner
        index = torch.cat([looking[staying], into.expand(len(metric), -1)], 1)
        owner = outputs_of(index, number, 0)
        merged = ranked[:, :pairs]
        target = tokens.goal - len(into) + partner.gather(1, merged)
        owner = owner.scatter(1, looking[merged], target)
        # a mean over patches of the picture: what was merged before counts as often as it stands for
        total = torch.zeros(len(metric), tokens.goal, device=metric.device).scatter_add(1, owner, tokens.sizes)
        return Regroup(index, owner, tokens.sizes / total.gather(1, owner))
