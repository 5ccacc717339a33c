"""The vision encoder of a model from its config."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ..errors import UnsupportedModelError
from .architecture import LAYER_NORM, RMS_NORM, Stack, Tower


def _area(size: Any) -> int:
    """Of a square side, or of a pair of sides."""
    return math.prod(size) if isinstance(size, list | tuple) else size**2


def _stack(vision: Any, **more: Any) -> Stack:
    """With the names of most encoders."""
    heads = vision.num_attention_heads
    sizes = {"width": vision.hidden_size, "inner": vision.intermediate_size, "layers": vision.num_hidden_layers}
    return Stack(**(sizes | {"heads": heads, "key_value_heads": heads, "head": vision.hidden_size // heads} | more))


def _clip(vision: Any) -> Tower:
    """CLIP, SigLIP, and the SigLIP inside Idefics 3 and SmolVLM."""
    clip = vision.model_type == "clip_vision_model"
    patches = _area(vision.image_size) // _area(vision.patch_size)
    return Tower(
        _stack(vision),
        patch=vision.num_channels * _area(vision.patch_size),
        patch_bias=not clip,
        patches=patches,
        prefix=int(clip),
        positions=patches + clip,
        before=LAYER_NORM if clip else None,
        behind=LAYER_NORM,
        cls_alone=clip,
        pools=vision.model_type == "siglip_vision_model" and getattr(vision, "vision_use_head", True),
    )


def _internvl(vision: Any) -> Tower:
    patches = _area(vision.image_size) // _area(vision.patch_size)
    stack = _stack(
        vision,
        qkv_bias=vision.attention_bias,
        norm=LAYER_NORM if vision.norm_type == "layer_norm" else RMS_NORM,
        query_norm=RMS_NORM if vision.use_qk_norm else None,
        across_heads=True,
        scaled=True,
    )
    return Tower(
        stack,
        patch=vision.num_channels * _area(vision.patch_size),
        patch_bias=True,
        patches=patches,
        prefix=1,
        positions=patches + 1 if vision.use_absolute_position_embeddings else 0,
        behind=None if vision.use_mean_pooling else LAYER_NORM,
        unused=vision.hidden_size if vision.use_mask_token else 0,
    )


def _pixtral(vision: Any) -> Tower:
    bare: dict[str, Any] = dict.fromkeys(("qkv_bias", "out_bias", "mlp_bias"), False)
    return Tower(
        _stack(vision, gated=True, norm=RMS_NORM, rotary=True, **bare),
        patch=vision.num_channels * _area(vision.patch_size),
        patch_bias=False,
        patches=None,
        before=RMS_NORM,
        packed=True,
    )


def _qwen(vision: Any) -> Tower:
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
        norm=RMS_NORM if gated else LAYER_NORM,
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


def _glm(vision: Any) -> Tower:
    """Its MLP is as wide as what it hands on; ``intermediate_size`` is of the projector."""
    stack = Stack(
        width=vision.hidden_size,
        inner=vision.out_hidden_size,
        layers=vision.depth,
        heads=vision.num_heads,
        key_value_heads=vision.num_heads,
        head=vision.hidden_size // vision.num_heads,
        gated=True,
        qkv_bias=vision.attention_bias,
        out_bias=False,
        mlp_bias=False,
        norm=RMS_NORM,
        rotary=True,
    )
    return Tower(
        stack,
        patch=vision.in_channels * vision.temporal_patch_size * _area(vision.patch_size),
        patch_bias=True,
        patches=None,
        positions=_area(vision.image_size // vision.patch_size),
        before=RMS_NORM,
        behind=RMS_NORM,
    )


_TOWERS: dict[str, Callable[[Any], Tower]] = {
    **dict.fromkeys(("clip_vision_model", "siglip_vision_model", "idefics3_vision", "smolvlm_vision"), _clip),
    **dict.fromkeys(("qwen2_vl_vision", "qwen2_5_vl_vision", "qwen3_vl_vision"), _qwen),
    "glm4v_vision": _glm,
    "internvl_vision": _internvl,
    "pixtral": _pixtral,
}


def read_tower(vision: Any) -> Tower:
    """The encoder of a vision config.

    Raises
    ------
    UnsupportedModelError : it is of a kind that is not known here.
    """
    read = _TOWERS.get(vision.model_type)
    if read is None:
        raise UnsupportedModelError(
            f"the cost of a vision encoder of type {vision.model_type!r} is not known; known types: {', '.join(_TOWERS)}."
        )
    return read(vision)
