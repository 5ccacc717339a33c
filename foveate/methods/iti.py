"""Image-text interaction: "Balancing Performance and Efficiency", Chen et al., 2024 (arXiv 2409.01162).

Visual tokens are cut twice: before the projector at the inflection point of the sorted similarity to [CLS], and inside the decoder
by their relevance to the text. Neither full text nor code could be read: the abstract says what is done, not how. docs/iti.md lists
what the paper specifies and what was filled in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from typing_extensions import Self

from ..errors import InputError
from ..tokens import Budget, EncoderLayer, check_budget
from .base import DecoderReducer, FrontReducer, Method
from .inflection_cut import FILLED, PAPER, InflectionCut
from .text_relevance import TextRelevanceCut
from .tools.inflection import Detector

SECOND = 0.73  # of what entered the decoder


@dataclass(kw_only=True)
class ITI(Method, name="iti", paper=PAPER, reconstruction=FILLED):
    """Both stages: an inflection cut by [CLS] before the projector, and one by relevance to the text inside the decoder.

    The plain constructor is how we fill what the abstract leaves open: the knee of the logarithm of the sorted curve says how many
    tokens enter the decoder, rounded up to a whole grid, and in both stages tokens are spread over the picture. ``paper()`` stays
    closer to the abstract's words.

    Parameters
    ----------
    budget : visual tokens that enter the decoder; None = the inflection rule. A budget that covers all tokens leaves the model as
        it is, without a second stage (which is there by itself as ``text-relevance``).
    second : what the second stage keeps: a count, or a share of what entered the decoder; None = its inflection rule. With the
        default, decoder layers of the pocket model run 22 % of the visual tokens on average, which is how we read the paper's
        "average of 22 % of the original token quantity".
    similarity, layer, detector, slope, whole_grid : of the first stage, as in ``InflectionCut``; the detector is that of the second
        stage, too.
    choice, alpha : of both stages, as in ``InflectionCut`` and ``TextRelevanceCut``.
    second_slope : of the inflection rule of the second stage.
    layers : of the second stage, as in ``TextRelevanceCut``.
    prune_text : as in ``TextRelevanceCut``.
    positions : of what enters the decoder. The second stage leaves positions as they are.
    """

    stage = "before the projector and inside the decoder"

    second: Budget = SECOND
    similarity: Literal["attention", "cosine", "dot"] = "attention"
    layer: EncoderLayer | Literal["both"] = "both"
    detector: Detector = "log-knee"
    slope: float = 0.4
    whole_grid: bool = True
    choice: Literal["head", "coverage"] = "coverage"
    alpha: float = 0.3
    second_slope: float = 1.0
    layers: tuple[int, ...] = (2,)
    prune_text: bool = False
    positions: Literal["compact", "original"] = "compact"

    @classmethod
    def paper(cls, **fields: Any) -> Self:
        """As the first version says: the head of the curve stays, and text with low relevance leaves, too.

        How the point is found, and by what similarity, is ours here, too: where the cumulative curve of the last layer's attention
        gets less steep. With ``prune_text=False``, as the second version says.
        """
        literal = dict(layer="last", detector="cumulative", whole_grid=False, choice="head", second=None)
        return cls(**{**literal, **dict(prune_text=True, positions="original"), **fields})

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            check_budget(self.second)
        except InputError as error:
            raise InputError(str(error).replace("budget", "second", 1)) from error
        if self.budget == 1.0 and isinstance(self.budget, float) and self.second not in (None, SECOND):
            raise InputError(f"{self.name}: budget=1.0 leaves the model as it is, and second={self.second}; use 'text-relevance'")
        self.before_decoder(), self.inside_decoder()  # raise what they have to say of the fields now

    def with_share(self, share: float) -> Self:
        return self.with_fields(budget=share, second=share if share < 1 else None)

    def before_decoder(self) -> FrontReducer:
        return InflectionCut(
            budget=self.budget,
            similarity=self.similarity,
            layer=self.layer,
            detector=self.detector,
            slope=self.slope,
            whole_grid=self.whole_grid,
            choice=self.choice,
            alpha=self.alpha,
            positions=self.positions,
        )

    def inside_decoder(self) -> tuple[DecoderReducer, ...]:
        return (
            TextRelevanceCut(
                budget=self.second,
                layers=self.layers,
                detector=self.detector,
                slope=self.second_slope,
                choice=self.choice,
                alpha=self.alpha,
                prune_text=self.prune_text,
            ),
        )
