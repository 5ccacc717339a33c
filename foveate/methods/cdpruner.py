"""CDPruner: Zhang et al., NeurIPS 2025 (arXiv 2506.10967)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import FoveateError
from ..tokens import Question, Reduction, VisualTokens, resolve_budget
from .base import ProjectorReducer
from .tools.selection import cosine_rows


@dataclass(kw_only=True)
class CDPruner(ProjectorReducer, name="cdpruner", paper="https://arxiv.org/abs/2506.10967", adaptive=False):
    """Tokens that are diverse and matter to the question: greedy MAP inference of a determinantal point process.

    Its kernel is the cosine of two tokens after the projector, times the relevance of both. Relevance is the mean cosine of a
    token to the text, brought to [0, 1] by the extremes of its image (the code takes those of the whole batch, so that an image
    depends on its neighbours, and adds 1e-6 to the difference from the lowest). It is 1 everywhere where nothing is asked about an
    image, or where all its tokens are alike. What stays is in raster order; tokens are scored by relevance.

    Parameters
    ----------
    relevance : "positive", or "negative": the less similar to the question, the more relevant, as in the code, whose author saw
        this in CLIP only. "auto" is negative for the text encoder of CLIP and positive for anything else.
    text_tower : the CLIP model whose text encoder reads the question, a name on the Hub or a folder; None = the decoder's
        embeddings do. Published results for LLaVA-1.5 need its CLIP, openai/clip-vit-large-patch14-336. The text after the first
        picture is read to the end of the prompt, words of the chat template included; the code reads the bare question.
    """

    reads_projected = True
    reads_question = True

    relevance: Literal["auto", "negative", "positive"] = "auto"
    text_tower: str | None = None

    def text_encoder(self) -> str | None:
        return self.text_tower

    def reduce(self, tokens: VisualTokens) -> Reduction:
        question = tokens.question
        if question is None or question.visual is None or tokens.projected is None:
            raise FoveateError(f"{self.name}: the question or the projected features are missing. This is a fault of the engine.")
        count = resolve_budget(self.budget, tokens.number) or tokens.number
        scores = self._relevance(question, question.visual)
        chosen = determinant_first(cosine_rows(tokens.projected), scores.square(), count)
        return Reduction(chosen.sort(-1).values, scores=scores)

    @torch.no_grad()
    def _relevance(self, question: Question, visual: Tensor) -> Tensor:
        """[B, N] in [0, 1]."""
        words = F.normalize(question.text.float(), dim=-1).masked_fill(~question.valid[..., None], 0).sum(1)
        words = words / question.valid.sum(1, keepdim=True).clamp(min=1)
        cosine = (F.normalize(visual.float(), dim=-1) * words[:, None]).sum(-1)
        negative = question.paired if self.relevance == "auto" else self.relevance == "negative"
        cosine = -cosine if negative else cosine
        low, high = cosine.aminmax(dim=-1, keepdim=True)
        same = low == high  # also where there is no text: all cosines are 0 then
        return ((cosine - low) / torch.where(same, 1.0, high - low)).masked_fill(same, 1.0)


@torch.no_grad()
def determinant_first(rows: Callable[[Tensor], Tensor], weight: Tensor, count: int, least: float = 1e-6) -> Tensor:
    """Greedy MAP of a determinantal point process (Chen et al. 2018), with the kernel sqrt(w_i w_j) s_ij.

    Each token chosen multiplies the determinant of the kernel of those chosen most: its weight times what of it they do not span.
    The latter, by an incremental Cholesky factor of the similarities alone, is exact however small the weights are; below ``least``
    it is rounding, and taken as 0. Ties go to the earlier token.

    Parameters
    ----------
    rows : gives those at [B, 1] of the similarities, [B, 1, N], 1 on the diagonal.
    weight : [B, N], not negative.
    count : how many to choose.

    Returns
    -------
    [B, count] in the order they were chosen.
    """
    left, taken = torch.ones_like(weight), torch.zeros_like(weight, dtype=torch.bool)
    factor, order = weight.new_empty(len(weight), count, weight.shape[1]), []
    for step in range(count):
        best = (weight * left).masked_fill(taken, -1).argmax(-1, keepdim=True)
        taken = taken.scatter(1, best, True)
        order.append(best)
        before = factor[:, :step]
        at = before.gather(2, best[:, None].expand(-1, step, -1))
        row = rows(best)[:, 0] - (at.transpose(1, 2) @ before)[:, 0]
        pivot = left.gather(1, best)
        factor[:, step] = row * pivot.clamp(min=least).rsqrt()
        left = left - factor[:, step].square()
        left = torch.where(left > least, left, 0.0)
    return torch.cat(order, 1)
