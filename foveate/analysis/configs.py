"""The architecture of a model from its config. No weights are needed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import InputError, UnsupportedModelError, first_line
from .architecture import Architecture, Decoder, Projector, Stack, Tower


@dataclass(frozen=True)
class _Kind:
    """How text decoders of one kind differ; a string names the field of the config that says so."""

    qkv: bool | str = False
    out: bool | str = False
    mlp: bool | str = False
    gated: bool = True
    norms: int = 2
    layer_norm: bool = False
    head_norms: bool | str = False
    head_bias: bool = False


_BIASED = _Kind(qkv="attention_bias", out="attention_bias")
_DECODERS = {
    "llama": _Kind(qkv="attention_bias", out="attention_bias", mlp="mlp_bias"),
    "mistral": _Kind(),
    **dict.fromkeys(("qwen2", "qwen2_vl_text", "qwen2_5_vl_text"), _Kind(qkv=True)),
    **dict.fromkeys(("qwen3", "qwen3_vl_text"), _Kind(qkv="attention_bias", out="attention_bias", head_norms=True)),
    "gemma": _BIASED,
    "gemma2": _Kind(qkv="attention_bias", out="attention_bias", norms=4),
    "gemma3_text": _Kind(qkv="attention_bias", out="attention_bias", norms=4, head_norms=True),
    "phi": _Kind(True, True, True, gated=False, norms=1, layer_norm=True, head_norms="qk_layernorm", head_bias=True),
    "phi3": _Kind(),
}


def read_decoder(whole: Any, causal: bool = True) -> Decoder:
    """The decoder of a config, or of the text config inside it.

    Raises
    ------
    UnsupportedModelError : it is of a kind that is not known here, or its layers differ in more than windows.
    """
    config = whole.get_text_config()
    name = config.model_type
    kind = _DECODERS.get(name)
    if kind is None:
        raise UnsupportedModelError(
            f"the cost of a text decoder of type {name!r} is not known: its layers may differ from those of {', '.join(_DECODERS)}."
        )

    def flag(value: bool | str) -> bool:
        return bool(getattr(config, value, False)) if isinstance(value, str) else value

    heads, layers = config.num_attention_heads, config.num_hidden_layers
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None) or ["full_attention" if window is None else "sliding_attention"] * layers
    unknown = sorted(set(types) - {"full_attention", "sliding_attention"})
    if unknown:
        raise UnsupportedModelError(f"the cost of layers of type {unknown[0]!r} is not known; only full and sliding attention are")
    stack = Stack(
        width=config.hidden_size,
        inner=config.intermediate_size,
        layers=layers,
        heads=heads,
        key_value_heads=getattr(config, "num_key_value_heads", None) or heads,
        head=getattr(config, "head_dim", None) or config.hidden_size // heads,
        gated=kind.gated,
        qkv_bias=flag(kind.qkv),
        out_bias=flag(kind.out),
        mlp_bias=flag(kind.mlp),
        norms=kind.norms,
        layer_norm=kind.layer_norm,
        head_norms=flag(kind.head_norms),
        rotary=True,
        windows=tuple(window if each == "sliding_attention" else None for each in types),
    )
    return Decoder(stack, config.vocab_size, bool(getattr(whole, "tie_word_embeddings", False)), kind.head_bias, causal)


def _area(size: Any) -> int:
    """Of a square side, or of a pair of sides."""
    return math.prod(size) if isinstance(size, list | tuple) else size**2


def _read_clip(vision: Any) -> Tower:
    heads = vision.num_attention_heads
    clip = vision.model_type == "clip_vision_model"
    stack = Stack(
        width=vision.hidden_size,
        inner=vision.intermediate_size,
        layers=vision.num_hidden_layers,
        heads=heads,
        key_value_heads=heads,
        head=vision.hidden_size // heads,
    )
    patches = _area(vision.image_size) // _area(vision.patch_size)
    return Tower(
        stack,
        patch=vision.num_channels * _area(vision.patch_size),
        patch_bias=not clip,
        patches=patches,
        prefix=int(clip),
        positions=patches + clip,
        outer_norms=2 if clip else 1,
        pools=not clip and getattr(vision, "vision_use_head", True),
    )


def _read_qwen(vision: Any) -> Tower:
    kind = vision.model_type
    width = vision.embed_dim if kind == "qwen2_vl_vision" else vision.hidden_size
    inner = int(width * vision.mlp_ratio) if kind == "qwen2_vl_vision" else vision.intermediate_size
    gated = kind == "qwen2_5_vl_vision"
    side = getattr(vision, "window_size", 0) // vision.patch_size  # of a window, in patches
    whole = getattr(vision, "fullatt_block_indexes", range(vision.depth))
    stack = Stack(
        width=width,
        inner=inner,
        layers=vision.depth,
        heads=vision.num_heads,
        key_value_heads=vision.num_heads,
        head=width // vision.num_heads,
        gated=gated,
        layer_norm=not gated,
        rotary=True,
        windows=tuple(None if layer in whole else side**2 for layer in range(vision.depth)),
    )
    return Tower(
        stack,
        patch=vision.in_channels * vision.temporal_patch_size * _area(vision.patch_size),
        patch_bias=kind == "qwen3_vl_vision",
        patches=None,
        positions=getattr(vision, "num_position_embeddings", 0),
    )


_TOWERS: dict[str, Callable[[Any], Tower]] = {
    **dict.fromkeys(("clip_vision_model", "siglip_vision_model"), _read_clip),
    **dict.fromkeys(("qwen2_vl_vision", "qwen2_5_vl_vision", "qwen3_vl_vision"), _read_qwen),
}


def _llava_projector(config: Any) -> tuple[Projector, ...]:
    layers = config.vision_feature_layer
    features = config.vision_config.hidden_size * (1 if isinstance(layers, int) else len(layers))
    width, newline = config.text_config.hidden_size, config.model_type not in ("llava", "vipllava", "video_llava")
    norm = 2 * features if config.model_type == "vipllava" else 0
    bias = getattr(config, "multimodal_projector_bias", True)
    return (Projector(((features, width), (width, width)), bias, norm, more=newline * width),)


def _gemma_projector(config: Any) -> tuple[Projector, ...]:
    features, width = config.vision_config.hidden_size, config.text_config.hidden_size
    pooled = config.model_type == "gemma3"  # pooled and normalised, then projected
    return (Projector(((features, width),), bias=not pooled, norm=features if pooled else 0),)


def _qwen_projector(config: Any) -> tuple[Projector, ...]:
    vision, width = config.vision_config, config.text_config.hidden_size
    features = vision.embed_dim if config.model_type == "qwen2_vl" else vision.hidden_size
    merge = vision.spatial_merge_size**2
    shapes = ((merge * features, merge * features), (merge * features, width))
    norm = features if config.model_type == "qwen2_5_vl" else 2 * features
    deep = [Projector(shapes, norm=merge * norm, merge=merge) for _ in getattr(vision, "deepstack_visual_indexes", ())]
    return (Projector(shapes, norm=norm, merge=merge), *deep)


_PROJECTORS: dict[str, Callable[[Any], tuple[Projector, ...]]] = {
    **dict.fromkeys(
        ("llava", "vipllava", "llava_next", "llava_next_video", "llava_onevision", "video_llava"),
        _llava_projector,
    ),
    **dict.fromkeys(("paligemma", "gemma3"), _gemma_projector),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl"), _qwen_projector),
}


LLAVA = {"llava-1.5-7b": (4096, 11008, 32), "llava-1.5-13b": (5120, 13824, 40)}
"""Width, inner width, and layers = heads of the decoders of LLaVA-1.5, whose vision encoder is what ``LlavaConfig`` brings."""


def _llava(name: str) -> Any:
    from transformers import LlamaConfig, LlavaConfig

    width, inner, layers = LLAVA[name]
    text = LlamaConfig(
        hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=layers, vocab_size=32064
    )
    config = LlavaConfig(text_config=text)
    config._name_or_path = name
    return config


def read_config(model: Any) -> Any:
    """The config of a model, a config itself, one of ``LLAVA``, or one from the Hub, a folder or a JSON file.

    Raises
    ------
    InputError : there is none, or it cannot be read.
    """
    if not isinstance(model, str | Path):
        config = getattr(model, "config", model)
        if not hasattr(config, "get_text_config"):
            raise InputError(f"{type(model).__name__} has no config. Give a model, a config, a Hub id, a folder or a config file.")
        return config
    if model in LLAVA:
        return _llava(str(model))
    from transformers import AutoConfig

    path = Path(model).expanduser()
    if (str(model).startswith((".", "/", "~")) or path.suffix == ".json") and not path.exists():
        raise InputError(f"there is no {model}")
    try:
        return AutoConfig.from_pretrained(str(path) if path.exists() else str(model))
    except Exception as error:  # whatever the Hub, the disk and broken files lead to
        raise InputError(f"the config of {str(model)!r} cannot be read: {first_line(error)}") from error


def read_architecture(model: Any) -> Architecture:
    """The shapes of a model.

    Parameters
    ----------
    model : a model, its config, one of ``LLAVA``, a Hub id, a folder, or a config file. An architecture is returned as it is.

    Raises
    ------
    InputError : the config cannot be read.
    UnsupportedModelError : a part of it is of a kind whose cost is not known; the message says which.
    """
    if isinstance(model, Architecture):
        return model
    config = read_config(model)
    kind = config.model_type
    name = getattr(config, "_name_or_path", "") or kind
    if getattr(config, "vision_config", None) is None:
        return Architecture(name, read_decoder(config))
    if kind not in _PROJECTORS:
        raise UnsupportedModelError(
            f"how a model of type {kind!r} joins pictures and text is not known; known types: {', '.join(_PROJECTORS)}."
        )
    vision = config.vision_config
    if vision.model_type not in _TOWERS:
        raise UnsupportedModelError(
            f"the cost of a vision encoder of type {vision.model_type!r} is not known; known types: {', '.join(_TOWERS)}."
        )
    tower = _TOWERS[vision.model_type](vision)
    if kind == "video_llava":  # one encoder for pictures, one for frames
        tower = replace(tower, copies=2)
    decoder = read_decoder(config, causal=kind not in ("paligemma", "gemma3"))  # their pictures see all of themselves
    whole = getattr(config, "vision_feature_select_strategy", "default") == "full"
    tokens = None if tower.patches is None else getattr(config, "mm_tokens_per_image", tower.patches + whole * tower.prefix)
    return Architecture(name, decoder, tower, _PROJECTORS[kind](config), tokens)
