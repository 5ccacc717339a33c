"""Cross tokens of CrossGET: their learnt offsets, and how far those of the encoder and of the decoder are apart."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...tokens import Escort
from ..host import ModelShape


@dataclass
class Passed:
    """Cross tokens of one call before each layer, without their offsets: [B, C] of the encoder, [B, D] of the decoder."""

    encoder: dict[int, Escort]
    decoder: dict[int, Tensor]


class CrossTokens(nn.Module):
    """The offsets of cross tokens, one for each layer of the encoder and of the decoder; zero before training."""

    passed: Passed | None = None

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.image = nn.Parameter(torch.zeros(shape.encoder_layers, shape.encoder_width))
        self.text = nn.Parameter(torch.zeros(shape.decoder_layers, shape.width))

    def before(self, offsets: Tensor, layer: int, states: Tensor) -> Tensor:
        """[B, C] what a cross token is before a layer; the layers before it get no gradient from that."""
        return states.detach() + offsets[layer].to(states.dtype)

    @contextmanager
    def listening(self) -> Iterator[Passed]:
        """Within this, what cross tokens were before each layer is noted."""
        self.passed = Passed({}, {})
        try:
            yield self.passed
        finally:
            self.passed = None


def repeated(layers: Tensor, number: int) -> Tensor:
    """[E, ...] -> [number, ...]: layer i as often as whole steps of ``number`` / E end in it."""
    ends = torch.arange(len(layers) + 1, device=layers.device) * number // len(layers)
    return layers.repeat_interleave(ends.diff(), 0)


def divergence(image: Tensor, text: Tensor) -> Tensor:
    """[L, B, D] logits of both kinds -> the mean over layers and rows of half the sum of KL(M || P) and KL(M || Q).

    P and Q are the softmax over channels, M is their mean.
    """
    first, second = image.log_softmax(-1), text.log_softmax(-1)
    mean = torch.logaddexp(first, second) - torch.log(torch.tensor(2.0, device=image.device))
    apart = (mean.exp() * (2 * mean - first - second)).sum(-1) / 2
    return apart.mean()
