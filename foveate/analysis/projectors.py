"""What leads from the vision encoder of a model to its decoder, from its config."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..errors import UnsupportedModelError
from .architecture import LAYER_NORM, RMS_NORM, Linear, Projector

Projectors = tuple[Projector, ...]


def _llava(config: Any) -> Projectors:
    taken = config.vision_feature_layer
    features = config.vision_config.hidden_size * (1 if isinstance(taken, int) else len(taken))
    width, newline = config.text_config.hidden_size, config.model_type not in ("llava", "vipllava", "video_llava")
    norm = LAYER_NORM if config.model_type == "vipllava" else None
    bias = getattr(config, "multimodal_projector_bias", True)
    layers = (Linear(features, width, bias, norm), Linear(width, width, bias, activation="plain"))
    return (Projector(layers, more=newline * width),)


def _gemma(config: Any) -> Projectors:
    features, width = config.vision_config.hidden_size, config.text_config.hidden_size
    pooled = config.model_type == "gemma3"  # pooled and normalised, then projected
    return (Projector((Linear(features, width, bias=not pooled, norm=RMS_NORM if pooled else None),)),)


def _qwen(config: Any) -> Projectors:
    vision, width = config.vision_config, config.text_config.hidden_size
    features = vision.embed_dim if config.model_type == "qwen2_vl" else vision.hidden_size
    merge = vision.spatial_merge_size**2
    wide = merge * features
    norm = RMS_NORM if config.model_type == "qwen2_5_vl" else LAYER_NORM

    def projector(channels: int) -> Projector:
        return Projector((Linear(wide, wide, norm=norm, channels=channels), Linear(wide, width, activation="plain")), merge)

    return (projector(features), *(projector(wide) for _ in getattr(vision, "deepstack_visual_indexes", ())))


def _glm(config: Any) -> Projectors:
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


def _internvl(config: Any) -> Projectors:
    merge, width = int(1 / config.downsample_ratio) ** 2, config.text_config.hidden_size
    first = Linear(merge * config.vision_config.hidden_size, width, norm=LAYER_NORM)
    return (Projector((first, Linear(width, width, activation="plain")), merge),)


def _idefics(config: Any) -> Projectors:
    merge = config.scale_factor**2
    return (Projector((Linear(merge * config.vision_config.hidden_size, config.text_config.hidden_size, bias=False),), merge),)


def _mistral(config: Any) -> Projectors:
    features, width = config.vision_config.hidden_size, config.text_config.hidden_size
    merge, bias = config.spatial_merge_size**2, config.multimodal_projector_bias
    layers = (
        Linear(merge * features, features, bias=False, norm=RMS_NORM, channels=features),
        Linear(features, width, bias),
        Linear(width, width, bias, activation="plain"),
    )
    return (Projector(layers, merge),)


def _aya(config: Any) -> Projectors:
    merge, width = config.downsample_factor**2, config.text_config.hidden_size
    inner = getattr(config, "alignment_intermediate_size", width)
    first = Linear(merge * config.vision_config.hidden_size, inner, norm=LAYER_NORM)
    return (Projector((first, Linear(inner // 2, width, activation="gated")), merge),)


_PROJECTORS: dict[str, Callable[[Any], Projectors]] = {
    **dict.fromkeys(("llava", "vipllava", "llava_next", "llava_next_video", "llava_onevision", "video_llava"), _llava),
    **dict.fromkeys(("paligemma", "gemma3"), _gemma),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl"), _qwen),
    **dict.fromkeys(("idefics3", "smolvlm"), _idefics),
    "glm4v": _glm,
    "internvl": _internvl,
    "mistral3": _mistral,
    "aya_vision": _aya,
}


def read_projectors(config: Any) -> Projectors:
    """Of a model's config; several where encoder layers are projected one by one.

    Raises
    ------
    UnsupportedModelError : the model is of a kind that is not known here.
    """
    read = _PROJECTORS.get(config.model_type)
    if read is None:
        raise UnsupportedModelError(
            f"how a model of type {config.model_type!r} joins pictures and text is not known; known: {', '.join(_PROJECTORS)}."
        )
    return read(config)
