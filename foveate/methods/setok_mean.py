"""SeTok without its trained merger: "Towards Semantic Equivalence of Tokenization in Multimodal LLM" (arXiv 2406.05127)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..tokens import Reduction, VisualTokens, resolve_budget
from .base import ProjectorReducer
from .networks.merger import Clusters
from .tools.density import distances, members_of, peak_scores, position_code
from .tools.selection import ranks, take_in_order

PAPER = "https://arxiv.org/abs/2406.05127"
STEPS = 2000  # thresholds that are tried


@dataclass(kw_only=True)
class Clustering(ProjectorReducer):
    """What both forms of SeTok share: tokens are clustered around peaks of density, as many as the picture has.

    Parameters
    ----------
    budget : how many centres, those with the highest scores; None = by the threshold.
    threshold : a token whose density times distance to a denser token is above this is a centre. Both depend on the scale of the
        features: it has to be chosen for the encoder. The released code has 0.5, 0.53 and 0.55.
    neighbours : whose distances make the density.
    least : how many centres where no token is above the threshold.
    most : no more centres than these; None = a quarter of the tokens.
    """

    threshold: float = 0.5
    neighbours: int = 64
    least: int = 64
    most: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_range(threshold=0, neighbours=1, least=1)
        if self.most is not None:
            self.check_range(most=1)

    @torch.no_grad()
    def clusters(self, tokens: VisualTokens) -> Clusters:
        """Centres and members of the features with the code of their positions added."""
        number, distance = tokens.number, distances(placed(tokens))
        scores = peak_scores(distance, self.neighbours)
        counts = self.counts(scores)
        raster = torch.arange(number, device=scores.device)
        key = torch.where(ranks(scores) < counts[:, None], raster, 2 * number)
        index, valid = take_in_order(key, resolve_budget(self.budget, number) or int(counts.max()))
        return Clusters(index, valid, members_of(distance, index, valid), scores)

    def counts(self, scores: Tensor) -> Tensor:
        """[B] how many centres pictures with these scores [B, N] have."""
        number = scores.shape[1]
        budget = resolve_budget(self.budget, number)
        if budget is not None:
            return torch.full_like(scores[:, 0], budget, dtype=torch.long)
        above, most = (scores > self.threshold).sum(1), self._most(number)
        return torch.where(above > 0, above, self.least).clamp(max=most)

    def _most(self, number: int) -> int:
        return min(number, max(1, number // 4) if self.most is None else self.most)

    def threshold_for(self, scores: Tensor, goal: float) -> tuple[float, float]:
        """The smallest threshold at which pictures with these scores [P, N] have at most ``goal`` tokens on average, and that mean.

        Where none does, because pictures without a token above a threshold have ``least``, the one with the smallest mean.
        """
        tried = scores.flatten().sort().values[:: max(1, scores.numel() // STEPS)].tolist()
        means = [float(self.with_fields(threshold=each).counts(scores).float().mean()) for each in tried]
        found = next((number for number, mean in enumerate(means) if mean <= goal), means.index(min(means)))
        return tried[found], means[found]


def placed(tokens: VisualTokens) -> Tensor:
    """[B, N, C] float32 features with the code of their positions."""
    code = position_code(*tokens.grid, tokens.features.shape[-1])
    return tokens.features.float() + code.to(tokens.features.device)


@dataclass(kw_only=True)
class SeTokMean(Clustering, name="setok-mean", paper=PAPER):
    """Tokens are clustered around peaks of density, and each cluster becomes its mean: SeTok without its trained merger.

    Features are averaged without the code of their positions, which only clustering sees.
    """

    def reduce(self, tokens: VisualTokens) -> Reduction:
        found = self.clusters(tokens)
        return Reduction(found.centres, found.valid, found.shares(), scores=found.scores)
