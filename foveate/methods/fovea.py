"""Fovea: a selector of this project. How it works, and what it is worth: docs/fovea.md."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import FoveateError, InputError
from ..tokens import Budget, EncoderLayer, Reduction, VisualTokens, resolve_budget
from .base import ProjectorReducer
from .scope import coverage_first
from .tools.scorers import GuidedScorer, Scorer, Seen, described, last_words
from .tools.scoring import cls_attention
from .tools.selection import cosines
from .tools.teacher import lessons
from .trained import ModelShape, Trained

PAGE = "https://github.com/foveate/foveate/blob/main/docs/fovea.md"
FEW = 0.05  # tokens of a prompt that nobody answers
LAYERS = 4  # of the encoder, the last ones, whose [CLS] attention is read


@dataclass(kw_only=True)
class Fovea(Trained, ProjectorReducer, name="fovea", paper=PAGE, adaptive=False):
    """Salient tokens that cover the picture, in one order for all budgets; with trained weights or without.

    Greedy, as in SCOPE: the next token is the one with the largest gain of coverage over all tokens, times its saliency to the
    power of ``alpha``. A token is covered by its similarity to the most similar chosen one: the mean of two cosines, before and
    after the projector. A small ``alpha`` is what makes it good: coverage decides, and saliency among equals.

    Without weights, saliency is the geometric mean of the [CLS] attention of the last four encoder layers. With weights a small
    network scores each token by its features, this attention and its place. It was taught by the decoder: how much the loss of its
    answers hangs on the attention to each token. A guided one reads the question, too, in the decoder's embeddings.

    Parameters
    ----------
    alpha : weight of saliency; 0 is coverage alone.
    guided : whether the network reads the question. It belongs to the weights.
    """

    belongs_to_weights = ("guided",)
    learns = ("module",)
    needs_answers = False
    single_turns = False  # ``lessons`` tells turns apart
    reads_cls = True
    reads_projected = True

    budget: Budget = 0.25
    alpha: float = 0.3
    guided: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_range(alpha=0)

    @classmethod
    def to_tune(cls, shares: Sequence[float], layers: int) -> list[list[dict[str, Any]]]:
        """Budgets, with the weight of saliency as it is and smaller."""
        return [[{"alpha": alpha, "budget": share} for share in shares] for alpha in (cls.alpha, 0.1)]

    @property
    def reads_question(self) -> bool:  # type: ignore[override]
        return self.guided

    def trained(self) -> tuple[Trained, ...]:
        return (self,) if self.guided or self._state.name() is not None else ()

    def described(self) -> dict[str, Any]:
        return super().described() if self.trained() else ProjectorReducer.described(self)

    def encoder_layers(self, depth: int) -> tuple[EncoderLayer, ...]:
        return tuple(range(max(0, depth - LAYERS), depth))

    # -- choosing

    def reduce(self, tokens: VisualTokens) -> Reduction:
        if tokens.projected is None:
            raise FoveateError(f"{self.name}: the projected features are missing. This is a fault of the engine.")
        count = resolve_budget(self.budget, tokens.number) or tokens.number
        scores = self._saliency(tokens)
        both = torch.cat([F.normalize(part.float(), dim=-1) for part in (tokens.features, tokens.projected)], -1)
        few = both.device.type == "cpu"  # elsewhere the host would have to wait for a number from the device
        order = coverage_first(cosines(both), scores.double() ** self.alpha, count, few)
        return Reduction(order.sort(-1).values, scores=scores)

    def _saliency(self, tokens: VisualTokens) -> Tensor:
        """[B, N], of sum 1."""
        attention = torch.stack([cls_attention(tap) for tap in tokens.taps.values()], 1)
        if not self.trained():
            return attention.clamp(min=1e-12).log().mean(1).softmax(-1)
        question = None if tokens.question is None else last_words(tokens.question.text, tokens.question.valid)
        seen = Seen(described(tokens.features, attention, tokens.grid), *(question or ()))
        scorer: Any = self.module
        if scorer.record is not None:
            scorer.record.append(seen)
        with torch.no_grad():
            logits: Tensor = scorer(seen)
        return logits.softmax(-1)

    # -- weights

    def build(self, shape: ModelShape) -> nn.Module:
        inputs = shape.features + min(LAYERS, shape.encoder_layers) + 2
        return GuidedScorer(inputs, shape.width) if self.guided else Scorer(inputs)

    @torch.no_grad()
    def prepare(self, model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the scorer reads, and what it should say: of each picture [U, ...], or of each question about it if it is guided.

        Raises
        ------
        InputError : rows have no picture or several, or pictures are of different sizes.
        """
        scorer: Any = self.module
        record: list[Seen] = []
        scorer.record = record
        try:
            with self.with_budget(FEW)(model):  # only to see what there is to choose from
                model(**{name: value for name, value in batch.items() if name != "labels"})
        finally:
            scorer.record = None
        taught = lessons(model, batch)
        target = taught.worth / taught.worth.sum(1, keepdim=True).clamp(min=1e-12)
        if len(record) != 1 or record[0].tokens.shape[:2] != (len(batch["input_ids"]), target.shape[1]):
            raise InputError(f"{self.name} learns from batches of pictures of one size, each in one piece. Give it such pictures.")
        seen = record[0].tokens.half()
        if not self.guided:
            mean = [target[taught.row == row].mean(0) for row in range(len(seen))]
            return {"tokens": seen, "target": torch.stack(mean)}
        text = model.config.get_text_config()
        special = [getattr(text, f"{name}_token_id") for name in ("bos", "eos", "pad")]
        asked = taught.asked & ~torch.isin(taught.ids, torch.tensor([n for n in special if isinstance(n, int)]).to(taught.ids))
        words, valid = last_words(model.get_input_embeddings()(taught.ids).float(), asked)
        return {"tokens": seen[taught.row], "target": target, "words": words.half(), "valid": valid}

    def objective(self, model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        """How far the softmax of the scores is from the target, as a Kullback-Leibler divergence."""
        target = batch["target"]
        logits = self.module(Seen(batch["tokens"].float(), batch.get("words"), batch.get("valid")))
        loss = F.kl_div(logits.log_softmax(-1), target, reduction="batchmean")
        return loss, {"best": float(target.amax(-1).mean())}
