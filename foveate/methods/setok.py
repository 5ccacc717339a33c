"""SeTok: "Towards Semantic Equivalence of Tokenization in Multimodal LLM" (arXiv 2406.05127)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..tokens import Reduction, VisualTokens
from .host import ModelShape
from .networks.merger import Merger
from .setok_mean import PAPER, Clustering, placed
from .trained import Trained


@dataclass(kw_only=True)
class SeTok(Trained, Clustering, name="setok", paper=PAPER):
    """Tokens are clustered around peaks of density, as many as the picture has, and a trained merger makes each cluster a token.

    The features get a sine and cosine code of their positions first. The members of a cluster attend to each other and are
    averaged; the means attend to each other and go through a linear layer and the model's projector.

    As in the released code, which adds noise to densities; here of equally dense tokens the earlier counts as denser. The paper's
    training, by reconstruction and contrast, has no published weights of its losses: here answers teach alone.

    Parameters
    ----------
    readout : "mean" of the members, as in the code, or what became of the "centre".
    goal : mean tokens of a picture, for which training chooses the threshold.
    """

    learns = ("module", "projector", "lora")
    belongs_to_weights = ("readout", "neighbours")

    readout: Literal["mean", "centre"] = "mean"
    goal: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_range(goal=1)

    def build(self, shape: ModelShape) -> nn.Module:
        if shape.features % 2:
            raise InputError(f"{self.name}: {shape.features} channels cannot be shared by two heads")
        return Merger(shape.features)

    def reduce(self, tokens: VisualTokens) -> Reduction:
        found, module = self.clusters(tokens), self._merger
        if module.heard is not None:
            module.heard.append(found.scores)
        made = module(placed(tokens), found, self.readout)
        return Reduction(found.centres, found.valid, scores=found.scores, made=made, attention=found.shares())

    def initialise(self, model: Any, batches: Iterable[dict[str, Tensor]]) -> None:
        """Let it begin as the means of its clusters: attention and MLPs add nothing yet, and what follows them is the identity.

        This is ours; the released code begins with random weights.
        """
        merger = self._merger
        with torch.no_grad():
            for part in (merger.inner, merger.inter):
                for last in (*part.proj, part.mlp[3]):
                    nn.init.zeros_(last.weight)
            nn.init.eye_(merger.out.weight)

    @property
    def _merger(self) -> Merger:
        return cast(Merger, self.module)

    @torch.no_grad()
    def calibrate(self, model: Any, batches: list[dict[str, Tensor]], tolerance: float) -> dict[str, Any]:
        """The threshold at which the pictures have ``goal`` tokens on average; with a budget there is none to choose."""
        if self.budget is not None or not batches:
            return {}
        module = self._merger
        heard: list[Tensor] = []
        module.heard = heard
        try:
            for batch in batches:
                model(**batch)
        finally:
            module.heard = None
        return {"threshold": self.threshold_for(torch.cat(heard), self.goal)[0]} if heard else {}
