"""AIM: Adaptive Inference of Multi-Modal LLMs, Zhong et al., ICCV 2025 (arXiv 2412.03248).

Visual tokens are merged in pairs before the projector, and what is left leaves the decoder by PageRank over its attention, on a
schedule that ends with none. The released code only masks the latter, with eager attention; here they really leave.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from typing_extensions import Self

from ..cuts import Cut, PromptTokens
from ..errors import InputError
from ..tokens import Budget
from .aim_merge import PAPER, AIMMerge
from .base import DecoderReducer, FrontReducer, Method
from .tools.schedule import steps
from .tools.scoring import page_rank
from .tools.selection import best_of_images


@dataclass(kw_only=True)
class AIMPrune(DecoderReducer, name="aim-prune", paper=PAPER):
    """Before each of a run of decoder layers, visual tokens with the lowest PageRank over the layer's attention leave, at last all.

    The schedule says how many; a budget is only heeded if it covers all tokens. In the released code tokens that were masked in an
    earlier layer go on voting for others; here they are gone, so that what stays differs from the second cut on.

    Parameters
    ----------
    begin, end : layers l1 and l2 of the schedule: before layer l, the share 1 - (l - l1) / (l2 - l1) of the tokens that entered the
        decoder is left; from layer l2 on none. None = 13 and 21 of 32 layers, in proportion, as in the code for Vicuna-7B.
    temperature : of the attention that PageRank walks on (the code).
    steps : of the walk (the code).
    """

    begin: int | None = None
    end: int | None = None
    temperature: float = 0.1
    steps: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_range(steps=1)
        if self.temperature <= 0:
            raise InputError(f"{self.name}: temperature={self.temperature}; it must be above 0")

    def cuts(self, layers: int) -> tuple[int, ...]:
        begin, end = self._schedule(layers)
        return tuple(range(begin + 1, end + 1))

    def _schedule(self, layers: int) -> tuple[int, int]:
        begin = max(0, round(13 / 32 * layers)) if self.begin is None else self.begin
        end = min(layers - 1, max(begin + 1, round(21 / 32 * layers))) if self.end is None else self.end
        if not 0 <= begin < end < layers:
            raise InputError(f"{self.name}: begin={begin}, end={end}; expected 0 <= begin < end < {layers}, the number of layers")
        return begin, end

    def left(self, total: int, layers: int) -> list[float] | None:
        begin, end = self._schedule(layers)
        return steps(total, layers, {layer: total * (end - layer) // (end - begin) for layer in self.cuts(layers)})

    def cut(self, tokens: PromptTokens) -> Cut:
        begin, end = self._schedule(tokens.layers)
        scores = page_rank(tokens, self.temperature, self.steps)
        counts = (tokens.initial * (end - tokens.layer)).div(end - begin, rounding_mode="floor")
        return Cut(best_of_images(scores, tokens.of_image, counts), scores)


@dataclass(kw_only=True)
class AIM(Method, name="aim", paper=PAPER, adaptive=False):
    """Merging before the projector, then pruning inside the decoder until no visual token is left.

    Parameters
    ----------
    budget : visual tokens that enter the decoder; 252 of 576 in the code for LLaVA-1.5 (72 for the smaller setting).
    begin, end : of the schedule, as in ``AIMPrune``.
    order : as in ``AIMMerge``.
    """

    stage = "before the projector and inside the decoder"

    budget: Budget = 252 / 576
    begin: int | None = None
    end: int | None = None
    order: Literal["raster", "released"] = "raster"

    @classmethod
    def released(cls, **fields: Any) -> Self:
        """With the order of tokens that the released code leaves."""
        return cls(**{**dict(order="released"), **fields})

    def at_budget(self, tokens: float, total: int, layers: int, at: Literal["mean", "last"] = "mean") -> Self:
        """As of any method; no visual token is left in the last layer, so that what enters the decoder is meant there."""
        return self.with_budget(round(tokens)) if at == "last" else super().at_budget(tokens, total, layers)

    def at_share(self, share: float, layers: int, at: Literal["mean", "last"] = "mean") -> Self:
        """As ``at_budget``, with a share."""
        whole = super().at_share(share, layers)
        return self.with_budget(float(share)) if at == "last" else whole

    def before_decoder(self) -> FrontReducer:
        return AIMMerge(budget=self.budget, order=self.order, positions=self.positions)

    def inside_decoder(self) -> tuple[DecoderReducer, ...]:
        return (AIMPrune(begin=self.begin, end=self.end),)
