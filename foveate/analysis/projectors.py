"""What leads from the vision encoder of a model to its decoder, from its config."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from ..errors import UnsupportedModelError
from ..families import FAMILIES, TOWERS
from .architecture import BARE_NORM, LAYER_NORM, RMS_NORM, Linear, Norm, Projector

Projectors = tuple[Projector, ...]


def _mlp(config: Any, norm: Norm | None = None, newline: bool = False) -> Projectors:
    taken = config.vision_feature_layer
    features = config.vision_config.hidden_size * (1 if isinstance(taken, int) else len(taken))
    width = config.text_config.hidden_size
    bias = getattr(config, "multimodal_projector_bias", True)
    layers = (Linear(features, width, bias, norm), Linear(width, width, bias, activation="plain"))
    return (Projector(layers, more=newline * width),)


def _linear(config: Any, bias: bool = True, norm: Norm | None = None) -> Projectors:
    return (Projector((Linear(config.vision_config.hidden_size, config.text_config.hidden_size, bias, norm),)),)


def _pooled(config: Any) -> Projectors:
    """A norm without weights after the means of patches, and a layer."""
    width = config.text_config.hidden_size
    layer = Linear(config.vision_config.hidden_size, width, bias=False, norm=BARE_NORM)
    return (Projector((layer,), config.vision_config.pooling_kernel_size**2),)


def _merger(config: Any) -> Projectors:
    vision, width = config.vision_config, config.text_config.hidden_size
    features = getattr(vision, "embed_dim", None) or vision.hidden_size
    merge = vision.spatial_merge_size**2
    wide = merge * features
    norm = RMS_NORM if TOWERS[vision.model_type].gated else LAYER_NORM

    def projector(channels: int) -> Projector:
        return Projector((Linear(wide, wide, norm=norm, channels=channels), Linear(wide, width, activation="plain")), merge)

    return (projector(features), *(projector(wide) for _ in getattr(vision, "deepstack_visual_indexes", ())))


def _convolution(config: Any) -> Projectors:
    """Four patches become one by a convolution; then a layer, and a gated MLP whose two first matrices are one here."""
    vision = config.vision_config
    merge, width, inner = vision.spatial_merge_size**2, vision.out_hidden_size, vision.intermediate_size
    layers = (
        Linear(merge * vision.hidden_size, width),
        Linear(width, width, bias=False),
        Linear(width, 2 * inner, bias=False, norm=LAYER_NORM, activation="plain"),
        Linear(inner, width, bias=False, activation="gated"),
    )
    return (Projector(layers, merge),)


def _shuffle(config: Any) -> Projectors:
    merge, width = int(1 / config.downsample_ratio) ** 2, config.text_config.hidden_size
    first = Linear(merge * config.vision_config.hidden_size, width, norm=LAYER_NORM)
    return (Projector((first, Linear(width, width, activation="plain")), merge),)


def _normed_shuffle(config: Any) -> Projectors:
    merge, inner, bias = config.downsample_factor**2, config.projector_hidden_size, config.projector_bias
    norm = LAYER_NORM if config.projector_use_layernorm else None
    first = Linear(merge * config.vision_config.hidden_size, inner, bias, norm)
    return (Projector((first, Linear(inner, config.text_config.hidden_size, bias, activation="plain")), merge),)


def _one(config: Any) -> Projectors:
    merge = config.scale_factor**2
    return (Projector((Linear(merge * config.vision_config.hidden_size, config.text_config.hidden_size, bias=False),), merge),)


def _merged_mlp(config: Any) -> Projectors:
    features, width = config.vision_config.hidden_size, config.text_config.hidden_size
    merge, bias = config.spatial_merge_size**2, getattr(config, "multimodal_projector_bias", False)
    layers = (
        Linear(merge * features, features, bias=False, norm=RMS_NORM, channels=features),
        Linear(features, width, bias),
        Linear(width, width, bias, activation="plain"),
    )
    return (Projector(layers, merge),)


def _gated(config: Any, norm: Norm | None = LAYER_NORM) -> Projectors:
    merge, width = config.downsample_factor**2, config.text_config.hidden_size
    inner = getattr(config, "alignment_intermediate_size", width)
    first = Linear(merge * config.vision_config.hidden_size, inner, norm=norm)
    return (Projector((first, Linear(inner // 2, width, activation="gated")), merge),)


def _shuffled_mlp(config: Any) -> Projectors:
    """An MLP of the encoder's own on blocks of patches, with an activation after each layer, and a layer."""
    vision = config.vision_config
    inner = vision.projector_output_dim
    layers = (
        Linear(vision.intermediate_size, vision.projector_input_dim, bias=False),
        Linear(inner, inner, bias=False, activation="plain"),
        Linear(vision.vision_output_dim, config.text_config.hidden_size, bias=False, activation="plain"),
    )
    return (Projector(layers, round(1 / vision.pixel_shuffle_ratio) ** 2),)


def _words(config: Any) -> Projectors:
    """A choice among visual words, of which their embeddings are mixed."""
    vision, width, merge = config.vision_config, config.text_config.hidden_size, config.vision_config.hidden_stride**2
    chosen = vision.vocab_size - vision.num_visual_indicator_tokens
    first = Linear(merge * vision.hidden_size, chosen, bias=False)
    mixed = Linear(vision.vocab_size, width, bias=False, norm=LAYER_NORM, channels=chosen, activation="plain")
    return (Projector((first, mixed), merge),)


SHAPES: dict[str, Callable[[Any], Projectors]] = {
    "mlp": _mlp,
    "mlp, newline": partial(_mlp, newline=True),  # one learnt token at the end of each line of tiles
    "normed mlp": partial(_mlp, norm=LAYER_NORM),
    "merged mlp": _merged_mlp,
    "linear": _linear,
    "pooled": partial(_linear, bias=False, norm=RMS_NORM),  # pooled and normalised, then projected
    "pooled, no weights": _pooled,
    "merger": _merger,
    "convolution": _convolution,
    "shuffle": _shuffle,
    "normed shuffle": _normed_shuffle,
    "one": _one,
    "shuffled mlp": _shuffled_mlp,
    "words": _words,
    "gated": _gated,
    "gated, no norm": partial(_gated, norm=None),
}


def read_projectors(config: Any) -> Projectors:
    """Of a model's config; several where encoder layers are projected one by one.

    Raises
    ------
    UnsupportedModelError : the model is of a kind that is not known here.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise UnsupportedModelError(
            f"how a model of type {config.model_type!r} joins pictures and text is not known; known: {', '.join(FAMILIES)}."
        )
    return SHAPES[family.joins](config)
