"""DART: Wen et al., EMNLP 2025 (arXiv 2502.11494)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..cuts import Cut, PromptTokens
from ..errors import FoveateError
from ..tokens import Budget, resolve_budget
from .base import DecoderReducer
from .tools.merging import similarity
from .tools.schedule import steps
from .tools.selection import counts_of_images, ranks


@dataclass(kw_only=True)
class DART(DecoderReducer, name="dart", paper="https://arxiv.org/abs/2502.11494", adaptive=False):
    """Before decoder layer K only a few pivots of each image stay, and the visual tokens that duplicate them least.

    Pivots are visual tokens, and tokens of the question, whose keys in layer K - 1 have the largest norms over all heads. In turn
    each takes an equal share of tokens, out of those not kept so far: the ones whose hidden states are least similar to its own, by
    cosine. Visual pivots stay, too.

    The code takes pivots in no fixed order. Here visual pivots come before those of the text, those with larger norms first.
    Exactly the budget is kept: what does not divide by the number of pivots goes to the first ones, one token each (the code adds
    the visual pivots to a rounded share for each pivot: 132 of 576 in its scripts for 128, 124 by the ratio alone). The code
    compares states after the final norm of the model, whose weights a method does not see; here they are compared as they are.
    Each image of a prompt keeps a count of its own; all of them share the pivots of the question.

    Parameters
    ----------
    budget : visual tokens of each image that are left from layer K on; the released scripts remove 77.8 %.
    layer : K, 2 in the scripts.
    visual_pivots, text_pivots : how many, at most; an image or a question may have fewer.
    norm : of the keys; not the code's by default. "l1" (the code) depends on the rotation of keys, and so on where a prompt begins:
        rows that are padded on the left choose other pivots than the same rows alone, if the caller gives no position ids. "l2"
        does not.
    """

    budget: Budget = 0.222
    layer: int = 2
    visual_pivots: int = 4
    text_pivots: int = 4
    norm: Literal["l1", "l2"] = "l2"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_range(layer=1, visual_pivots=1, text_pivots=0)

    def cuts(self, layers: int) -> tuple[int, ...]:
        return (self.layer,)

    def left(self, total: int, layers: int) -> list[float] | None:
        return steps(total, layers, {self.layer: resolve_budget(self.budget, total) or total})

    @torch.no_grad()
    def cut(self, tokens: PromptTokens) -> Cut:
        of_image, present = tokens.of_image, tokens.of_image.sum(-1)
        counts = counts_of_images(self.budget, tokens.initial).minimum(present)
        pivots, real = self._pivots(tokens, counts)
        visual = (torch.zeros_like(of_image, dtype=torch.long).scatter_add(2, pivots, real.long()) > 0) & of_image
        numbers = real.sum(-1, keepdim=True).clamp(min=1)
        wanted = (counts - visual.sum(-1))[..., None]
        share = wanted // numbers + (real.cumsum(-1) - 1 < wanted % numbers)
        share = share.masked_fill(~real, 0)
        similar = similarity(tokens.hidden, pivots.flatten(1), "cosine").unflatten(1, pivots.shape[1:])
        similar = similar.masked_fill(~real[..., None], 0)
        keep = visual
        for pivot in range(pivots.shape[-1]):
            pool = of_image & ~keep
            unlike = (-similar[:, :, pivot]).masked_fill(~pool, float("-inf"))
            keep = keep | ((ranks(unlike) < share[..., pivot, None]) & pool)
        mean = similar.sum(2) / numbers
        return Cut(keep.any(1), 1 - (mean * of_image).sum(1))

    def _pivots(self, tokens: PromptTokens, counts: Tensor) -> tuple[Tensor, Tensor]:
        """[B, I, P] places of the pivots of each image, and which of them are real, [B, I, P] bool."""
        if tokens.tap is None:
            raise FoveateError("the decoder layer has no keys recorded. This is a fault of the engine.")
        keys = tokens.tap.keys[:, :, -tokens.hidden.shape[1] :].float()
        norms = (keys.abs() if self.norm == "l1" else keys.square()).sum((1, 3))
        images = counts.shape[1]
        seen = norms[:, None].masked_fill(~tokens.of_image, float("-inf")).argsort(dim=-1, descending=True, stable=True)
        read = norms.masked_fill(~tokens.question, float("-inf")).argsort(dim=-1, descending=True, stable=True)
        seen, read = seen[..., : self.visual_pivots], read[:, : self.text_pivots]
        mine = torch.arange(seen.shape[-1], device=norms.device) < counts[..., None]
        text = torch.arange(read.shape[-1], device=norms.device) < tokens.question.sum(-1, keepdim=True)
        places = torch.cat([seen, read[:, None].expand(-1, images, -1)], -1)
        return places, torch.cat([mine, text[:, None].expand(-1, images, -1)], -1)
