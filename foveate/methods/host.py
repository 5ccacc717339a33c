"""The model that a trained method acts on, as far as its weights depend on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a model that a trained method depends on.

    Attributes
    ----------
    model_type : ``config.model_type``.
    features : C, channels of ``VisualTokens.features``.
    width : D, channels of the decoder.
    encoder_width, encoder_heads, encoder_layers : of the vision encoder.
    feature_layer : index of the encoder layer that makes the features; None where a config names none of its layers.
    decoder_layers : layers of the decoder.
    grid : rows and columns of patches of a picture; None where pictures keep their own sizes.
    """

    model_type: str
    features: int
    width: int
    encoder_width: int
    encoder_heads: int
    encoder_layers: int
    feature_layer: int | None
    decoder_layers: int
    grid: tuple[int, int] | None


@dataclass(frozen=True)
class Host:
    """The model that a method is about to act on.

    Attributes
    ----------
    shape : its sizes.
    device : of its features.
    adapted : whether it has adapters of LoRA.
    signature : samples of its weights, by which others of the same sizes are told apart (``fingerprint.signature``).
    """

    shape: ModelShape
    device: torch.device
    signature: Callable[[], dict[str, list[float]]]
    adapted: bool = False
