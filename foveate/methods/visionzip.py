"""VisionZip: Yang et al., CVPR 2025 (arXiv 2412.04467)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import Self

from ..errors import FoveateError, InputError
from ..tokens import EncoderLayer, EncoderTap, Reduction, VisualTokens, resolve_budget
from .base import ProjectorReducer
from .tools.merging import Links, links_of, similarity
from .tools.plans import outputs_of
from .tools.scoring import cls_attention


@dataclass(kw_only=True)
class VisionZip(ProjectorReducer, name="visionzip", paper="https://arxiv.org/abs/2412.04467", adaptive=False):
    """Dominant tokens, with the highest [CLS] attention, and contextual ones, into which all others are merged.

    Attention and keys are those of the layer that made the features. Targets are spread evenly over what the dominant tokens left,
    every ``n // c``-th of its n tokens; every other token goes to the target with the most similar key (averaged over heads).

    The plain constructor makes every output of patches, leaves the scale of the tokens as it was and keeps raster order, a merged
    token at the cell of its target. ``released()`` follows the authors' code.

    Parameters
    ----------
    contextual : share of the budget that is merged tokens, rounded to the nearest count: 64 are 54 and 10, as published. At least
        one token is dominant.
    normalise_weights : a contextual token is the mean of its target and of the mean of what went there; else their sum (the code).
    keep_cls : the first dominant token is [CLS] itself, as the layer put it out (the code). Encoders without [CLS] have none.
    order : "raster", or "dominant" tokens in raster order and then the contextual ones (the code).
    """

    reads_cls = True

    contextual: float = 10 / 64
    normalise_weights: bool = True
    keep_cls: bool = False
    order: Literal["raster", "dominant"] = "raster"

    @classmethod
    def released(cls, **fields: Any) -> Self:
        """As the released code does (commit 3151f6d); 54 and 10 tokens there are [CLS], 53 patches and 10 merged tokens here."""
        return cls(**{**dict(normalise_weights=False, keep_cls=True, order="dominant"), **fields})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_range(contextual=0)
        if self.contextual > 1:
            raise InputError(f"{self.name}: contextual={self.contextual}; it is a share and at most 1")

    def encoder_layers(self, depth: int) -> tuple[EncoderLayer, ...]:
        return ("aligned",)

    def reduce(self, tokens: VisualTokens) -> Reduction:
        tap, number = tokens.taps["aligned"], tokens.number
        scores, cls = cls_attention(tap), self._cls(tap, tokens.features)
        count = resolve_budget(self.budget, number) or number
        merged = min(round(count * self.contextual), count - 1)
        first = count - merged - (0 if cls is None else 1)
        order = scores.argsort(dim=-1, descending=True, stable=True)
        dominant, rest = order[:, :first].sort(-1).values, order[:, first:].sort(-1).values
        step = max(1, rest.shape[1] // max(1, merged))
        target = rest[:, : step * merged : step]
        index = torch.cat([dominant, target], 1)
        index = index.sort(-1).values if self.order == "raster" else index
        links = self._merged(tap, index, target) if merged else None
        if cls is not None:  # it stands at the first cell that nothing else stands at
            spot = 0 if merged == 0 else 1 if step > 1 else merged
            index = torch.cat([rest[:, spot : spot + 1], index], 1)
            links = None if links is None else links._replace(into=links.into + 1)
        return Reduction(index, scores=scores, added=cls, **({} if links is None else links._asdict()))

    def _merged(self, tap: EncoderTap, index: Tensor, target: Tensor) -> Links:
        """Tokens that stand nowhere in ``index`` [B, M] go to the target that is most like them."""
        keys = tap.patch_keys.float().unflatten(-1, (tap.heads, -1)).mean(2)
        own = outputs_of(index, keys.shape[1], -1)
        moves = own < 0
        nearest = similarity(keys, target, "cosine").argmax(1)
        owner = torch.where(moves, own.gather(1, target.gather(1, nearest)), own)
        others = torch.zeros_like(index, dtype=torch.float32).scatter_add(1, owner, moves.float()).gather(1, owner)
        share = torch.where(moves, 1 / others.clamp(min=1), 1.0)
        return links_of(owner, share / (1 + (others > 0)) if self.normalise_weights else share)

    def _cls(self, tap: EncoderTap, features: Tensor) -> Tensor | None:
        """[B, 1, C] the state of [CLS], where it is kept."""
        if not self.keep_cls or tap.query is None:
            return None
        if tap.states is None:
            raise FoveateError("the encoder layer has no output recorded. This is a fault of the engine.")
        if tap.states.shape[-1] != features.shape[-1]:
            raise InputError(
                f"{self.name}: the features of this model are not what one encoder layer put out, so that [CLS] does not fit among "
                "them. Use keep_cls=False."
            )
        return tap.states[:, :1]
