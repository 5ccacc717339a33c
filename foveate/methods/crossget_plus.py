"""CrossGET with its trained cross tokens: "Cross-Guided Ensemble of Tokens", Shi et al., ICML 2024 (arXiv 2305.17455)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..tokens import EncoderTap, Escort
from .base import FirstTokens
from .crossget import CrossGET
from .networks.cross_tokens import CrossTokens, Passed, divergence, repeated
from .tools.scoring import received_attention, token_attention
from .trained import ModelShape, Trained


@dataclass(kw_only=True)
class CrossGETPlus(Trained, CrossGET, name="crossget+", paper="https://arxiv.org/abs/2305.17455"):
    """CrossGET with its cross tokens: a copy of [CLS] runs along in the encoder, and learnt offsets guide it and the decoder.

    The copy attends and is attended to and never merges; before each block a learnt offset is added to it. A patch is important by
    the mean attention that it receives, [CLS] among those that look, plus that of the copy. The decoder gets the copy as the last
    visual token. Before each of its layers a learnt offset is added to the first token of the prompt, while prompts with pictures
    are read. Gradients do not pass from an offset to the blocks before it. With offsets of zero, which is what there is without
    ``weights``, this is the released code before its training: 277 patches and the copy, of 576 (commit dc32975).

    Training aligns both kinds of cross tokens: those of the encoder after the projector, repeated to as many layers as the decoder
    has, as distributions over channels. The divergences are those of the released code, from the mean of both to each, which is the
    other way round than in Jensen and Shannon's.

    Parameters
    ----------
    budget : tokens that the decoder gets, the copy among them. None = ``r``.
    r, layers : as of ``crossget``.
    alignment : weight of the divergence in the loss. The paper has 0.001 for 7B and 0.1 for 13B.
    """

    learns = ("module", "projector", "lora")
    escorts = True
    without_cls = f"{CrossGET.without_cls}; cross tokens begin as the mean of the patches"

    alignment: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_range(alignment=0)
        if self.weights is None and self._state.seed is None:
            self._state.seed = 0  # offsets of zero

    def build(self, shape: ModelShape) -> nn.Module:
        return CrossTokens(shape)

    @property
    def _cross(self) -> CrossTokens:
        return cast(CrossTokens, self.module)

    def plan(self, depth: int, patches: int) -> dict[int, int]:
        try:
            return super().plan(depth, patches)
        except InputError as error:
            raise InputError(f"{error} One of its tokens is the copy of [CLS].") from error

    def patches_of(self, tokens: int) -> int:
        return tokens - 1

    def importance(self, tap: EncoderTap) -> Tensor:
        if tap.queries is None:
            raise InputError(f"{self.name}: the queries of the encoder layer were not recorded.")
        cross = token_attention(tap, tap.queries[:, -1]).mean(1)
        return received_attention(tap, cls_looks=True) + cross[:, tap.lead : tap.end]

    def escort(self, token: Escort) -> Tensor:
        if self._cross.passed is not None:
            self._cross.passed.encoder[token.layer] = token
        return self._cross.before(self._cross.image, token.layer, token.states)

    def first_tokens(self, tokens: int | None = None) -> FirstTokens | None:
        return None if self.keeps_all or (tokens is not None and self.covers(tokens)) else self._first

    def _first(self, layer: int, states: Tensor) -> Tensor:
        if self._cross.passed is not None:
            self._cross.passed.decoder[layer] = states.detach()
        return self._cross.before(self._cross.text, layer, states)

    def objective(self, model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        """The loss of the model, and how far apart cross tokens are. For conversations of one picture or none."""
        with self._cross.listening() as passed:
            loss = model(**batch).loss
        if not passed.encoder:
            return loss, {}
        apart = self._apart(passed)
        return loss + self.alignment * apart, {"apart": apart.item()}

    def _apart(self, passed: Passed) -> Tensor:
        image = torch.stack([passed.encoder[layer].states.detach().float() for layer in sorted(passed.encoder)])
        text = torch.stack([passed.decoder[layer].float() for layer in sorted(passed.decoder)])
        if image.shape[1] != text.shape[1]:
            raise InputError(
                f"{self.name} is trained on conversations of one picture each; here are {image.shape[1]} pictures of "
                f"{text.shape[1]} conversations."
            )
        project = passed.encoder[0].project
        image = project(image + self._cross.image[:, None]).float()
        return divergence(repeated(image, len(text)), text + self._cross.text[:, None])
