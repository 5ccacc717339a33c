"""IDPruner: "Harmonizing Importance and Diversity in Visual Token Pruning for MLLMs" (arXiv 2602.13315)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..errors import InputError
from .tools.selection import cosine_rows, relevant_first
from .visionselector import VisionSelector


@dataclass(kw_only=True)
class IDPruner(VisionSelector, name="idpruner", paper="https://arxiv.org/abs/2602.13315", adaptive=False):
    """Tokens that are important by the scores of ``visionselector`` and not alike: maximal marginal relevance.

    Importance is the score, from 0 to 1 in each picture. Greedy: first the most important token, then always the one with the
    largest ``share`` times importance minus (1 - ``share``) times its cosine similarity, after the projector, to the most similar
    chosen token. What is chosen stays in raster order. No attention is read.

    As in the released code (commit 6aeb9dc). It takes the weights of ``visionselector``, and can be trained in the same way.

    Parameters
    ----------
    share : of importance; 1 is ``visionselector``, 0 diversity alone. The paper has 0.5.
    begin, end : as of ``visionselector``.
    """

    weights_of = "visionselector"

    share: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.share <= 1:
            raise InputError(f"{self.name}: share={self.share}; expected a number from 0 to 1")

    def chosen(self, projected: Tensor, scores: Tensor, count: int) -> Tensor:
        low, high = scores.aminmax(dim=-1, keepdim=True)
        importance = (scores - low) / (high - low).clamp(min=1e-30)
        return relevant_first(importance, cosine_rows(projected), count, self.share).sort(-1).values
