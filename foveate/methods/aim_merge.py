"""The merging of AIM before the projector: Zhong et al., ICCV 2025 (arXiv 2412.03248)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..tokens import EncoderLayer, Reduction, VisualTokens, resolve_budget, sums_of_links
from .base import ProjectorReducer
from .tools.merging import best_partners, links_of
from .tools.plans import outputs_of

PAPER = "https://arxiv.org/abs/2412.03248"


@dataclass(kw_only=True)
class AIMMerge(ProjectorReducer, name="aim-merge", paper=PAPER, adaptive=False):
    """Bipartite merging: tokens at even places merge into the most similar token at an odd place, at most half at a time.

    Merged tokens are plain means, whatever they were made of (the code keeps no sizes, unlike ToMe). Similarity is that of the keys
    of the last encoder layer, as in the code for images.

    Parameters
    ----------
    order : "raster", or "released": tokens that did not merge first, the most similar ones in front, as the code leaves them.
    """

    order: Literal["raster", "released"] = "raster"

    def encoder_layers(self, depth: int) -> tuple[EncoderLayer, ...]:
        return ("last",)

    def reduce(self, tokens: VisualTokens) -> Reduction:
        metric, number = tokens.taps["last"].patch_keys.float(), tokens.number
        goal = resolve_budget(self.budget, number) or number
        index = owner = torch.arange(number, device=metric.device).expand(len(metric), -1)
        share = torch.ones_like(metric[..., 0])  # of each token in the output that it went to
        while index.shape[1] > goal:
            left, target = self._step(metric, index, min(index.shape[1] - goal, index.shape[1] // 2))
            parts = torch.zeros_like(left, dtype=torch.float32).scatter_add(1, target, torch.ones_like(metric[..., 0]))
            part = 1 / parts.gather(1, target)
            index = index.gather(1, left)
            owner, share = target.gather(1, owner), share * part.gather(1, owner)
            if index.shape[1] > goal:
                metric = sums_of_links(metric, *links_of(target, part), left.shape[1])
        return Reduction(index, **links_of(owner, share)._asdict())

    def _step(self, metric: Tensor, index: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Of one round, the place [B, T - count] that each output sits at, and the output [B, T] that each token goes to."""
        unit = F.normalize(metric, dim=-1)
        alike, partner = best_partners(unit[:, 0::2], unit[:, 1::2])
        ranked = alike.argsort(dim=-1, descending=True, stable=True)
        merging, staying = 2 * ranked[:, :count], 2 * ranked[:, count:]
        length = metric.shape[1]
        odd = torch.arange(1, length, 2, device=metric.device).expand(len(metric), -1)
        left = torch.cat([staying, odd], 1)
        if self.order == "raster":
            left = left.gather(1, index.gather(1, left).argsort(dim=1))
        target = outputs_of(left, length, 0)
        into = 2 * partner.gather(1, ranked[:, :count]) + 1
        return left, target.scatter(1, merging, target.gather(1, into))
