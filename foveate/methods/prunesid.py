"""PruneSID: "Prune Redundancy, Preserve Essence", ICLR 2026 (arXiv 2603.09480)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError
from ..tokens import EncoderLayer, Reduction, VisualTokens, resolve_budget
from .base import ProjectorReducer
from .tools.scoring import cls_attention
from .tools.selection import ranks, take_in_order

GROUP = 4  # tokens of the budget for each group
THRESHOLD = 32  # tokens of the budget at which a token is suppressed by one of the mean similarity
CAP = 5  # tokens of a group for each 64 of the budget


@dataclass(kw_only=True)
class PruneSID(ProjectorReducer, name="prunesid", paper="https://arxiv.org/abs/2603.09480", adaptive=False):
    """Tokens are grouped by principal components; each group keeps those with the highest [CLS] attention that are not alike.

    Features go through a sigmoid, and each token is centred over its channels. A token belongs to the component in which it weighs
    most; there are a quarter as many as the budget has tokens. In a group, a token is suppressed by one with more [CLS] attention
    that is more similar to it than budget / 32 times the mean similarity of the picture. Groups get tokens by how many were not
    suppressed, at least one and at most 5 for each 64 of the budget; suppressed tokens come after the others.

    As in the released code (commit 390d760), but for three things. Components are exact, where the code's are random. [CLS] is none
    of the tokens. What is kept stays in raster order, and is not sorted by group.

    Parameters
    ----------
    budget : tokens of each picture.
    goal, typical : instead of a budget, the paper's adaptive count. A picture whose tokens have the mean similarity ``typical``
        keeps ``goal`` of them, others in proportion to 1 - their mean similarity. The paper takes the mean of a data set for it.
    """

    reads_cls = True
    instead_of_budget = ("goal", "typical")

    goal: int | None = None
    typical: float | None = None

    def __post_init__(self) -> None:
        if (self.goal is None) != (self.typical is None):
            raise InputError(f"{self.name}: goal={self.goal}, typical={self.typical}; give both, or a budget and none of them")
        if self.goal is not None:
            self.check_range(goal=1, typical=-1)
            if self.budget is not None or not (self.typical or 0) < 1:
                raise InputError(f"{self.name}: budget={self.budget}, typical={self.typical}; goal goes with typical below 1 alone")
        super().__post_init__()

    def needs_budget(self) -> bool:
        return self.goal is None

    def encoder_layers(self, depth: int) -> tuple[EncoderLayer, ...]:
        return ("aligned",)

    def reduce(self, tokens: VisualTokens) -> Reduction:
        number, scores = tokens.number, cls_attention(tokens.taps["aligned"])
        unit = F.normalize(tokens.features.float(), dim=-1)
        total = unit.sum(1).square().sum(-1)
        mean = (total - number) / max(1, number * (number - 1))  # of all pairs
        counts = torch.full_like(mean, resolve_budget(self.budget, number) or number, dtype=torch.long)
        if self.goal is not None and self.typical is not None and not self.keeps_all:
            counts = (self.goal * (1 - mean) / (1 - self.typical)).round().long().clamp(1, number)
        kept = torch.zeros_like(scores, dtype=torch.bool)
        for count in counts.unique().tolist():  # the number of groups depends on it
            some = (counts == count).nonzero()[:, 0]
            kept[some] = chosen(tokens.features[some].float(), unit[some], scores[some], mean[some], int(count))
        place = torch.arange(number, device=kept.device).masked_fill(~kept, 2 * number)
        index, valid = take_in_order(place, int(counts.max()))
        return Reduction(index, valid, scores=scores)


def chosen(features: Tensor, unit: Tensor, scores: Tensor, mean: Tensor, count: int) -> Tensor:
    """[B, N] bool, ``count`` tokens of each picture."""
    group = components(features, max(1, count // GROUP))
    alive = unsuppressed(unit, scores, group, mean * count / THRESHOLD)
    groups = F.one_hot(group, max(1, count // GROUP))  # [B, N, G]
    sizes, survivors = groups.sum(1), (groups * alive[..., None]).sum(1)
    quota = quotas(sizes, survivors, count)
    # in each group those that were not suppressed come first, then by attention
    order = ranks(scores) + scores.shape[1] * ~alive
    earlier = (order[:, None] < order[:, :, None]) & (group[:, None] == group[:, :, None])
    return earlier.sum(-1) < quota.gather(1, group)


def components(features: Tensor, number: int) -> Tensor:
    """[B, N, C] -> [B, N] the principal component, of ``number``, in which each token weighs most."""
    states = features.sigmoid()
    states = states - states.mean(-1, keepdim=True)
    vectors = torch.linalg.eigh(states @ states.mT).eigenvectors.flip(-1)[..., :number]
    return vectors.abs().argmax(-1)


def unsuppressed(unit: Tensor, scores: Tensor, group: Tensor, threshold: Tensor) -> Tensor:
    """[B, N] bool: no token of the same group that has more attention, and is not suppressed itself, is more similar than that."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    unit = unit.gather(1, order[..., None].expand_as(unit))
    group = group.gather(1, order)
    close = ((unit @ unit.mT) > threshold[:, None, None]) & (group[:, :, None] == group[:, None])
    alive = torch.ones_like(order, dtype=torch.bool)
    for place in range(1, order.shape[1]):
        alive[:, place] = ~(close[:, place, :place] & alive[:, :place]).any(-1)
    return torch.empty_like(alive).scatter_(1, order, alive)


def quotas(sizes: Tensor, survivors: Tensor, count: int) -> Tensor:
    """[B, G] tokens of each group, ``count`` in all, of groups with so many tokens and so many that were not suppressed.

    One each first; the rest in proportion to the survivors, by rounded cumulative sums; what caps leave over goes to the groups
    with the most survivors.
    """
    least = sizes.clamp(max=1)
    most = sizes.minimum(survivors).clamp(max=CAP * math.ceil(count / 64))
    while bool((short := most.sum(-1, keepdim=True) < count).any()):
        most = torch.where(short, most + 1, most).minimum(sizes)
    rest = (count - least.sum(-1, keepdim=True)).clamp(min=0)
    shares = (survivors.cumsum(-1) / survivors.sum(-1, keepdim=True) * rest).round().long()
    found = (shares.diff(dim=-1, prepend=shares.new_zeros(len(shares), 1)) + least).minimum(most)
    order = survivors.argsort(dim=-1, descending=True, stable=True)
    room = (most - found).gather(1, order)
    before = room.cumsum(-1) - room
    more = (count - found.sum(-1, keepdim=True) - before).clamp(min=0).minimum(room)
    return found.scatter_add(1, order, more)
