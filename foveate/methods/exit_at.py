"""A fixed exit of all visual tokens from the decoder."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..cuts import Cut, PromptTokens
from ..errors import InputError
from .base import DecoderReducer


@dataclass(kw_only=True)
class ExitAt(DecoderReducer, name="exit-at", listed=False):
    """All visual tokens leave before one decoder layer, which is fixed: the label of DyVTE's gates, and a baseline beside them."""

    reads = "nothing"

    layer: int = 1

    def cuts(self, layers: int) -> tuple[int, ...]:
        if not 0 < self.layer < layers:
            raise InputError(f"exit-at: layer={self.layer}; this decoder has {layers} layers, expected 1 to {layers - 1}")
        return (self.layer,)

    def cut(self, tokens: PromptTokens) -> Cut:
        return Cut(torch.zeros_like(tokens.visual))
