"""The vision encoder of a model from its config."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ..errors import UnsupportedModelError
from ..families import TOWERS, TowerKind
from .architecture import LAYER_NORM, RMS_NORM, Stack, Tower


def _area(size: Any) -> int:
    """Of a square side, or of a pair of sides."""
    return math.prod(size) if isinstance(size, list | tuple) else size**2


def _stack(vision: Any, **more: Any) -> Stack:
    """With the names of most encoders."""
    heads = vision.num_attention_heads
    sizes = {"width": vision.hidden_size, "inner": vision.intermediate_size, "layers": vision.num_hidden_layers}
    return Stack(**(sizes | {"heads": heads, "key_value_heads": heads, "head": vision.hidden_size // heads} | more))


def _plain(vision: Any, kind: TowerKind) -> Tower:
    """With learnt positions, perhaps rotary ones as well, and plain MLPs."""
    cls = kind.has_cls
    patches = _area(vision.image_size) // _area(vision.patch_size)
    return Tower(
        _stack(vision, rotary=kind.rotary),
        patch=vision.num_channels * _area(vision.patch_size),
        patch_bias=kind.patch_bias,
        patches=patches,
        prefix=int(cls),
        positions=patches + cls,
        before=LAYER_NORM if cls else None,
        after=LAYER_NORM,
        cls_alone=cls and not kind.cls_last,
        pools=kind.pools and getattr(vision, "vision_use_head", True),
    )


def _rotated(vision: Any, kind: TowerKind) -> Tower:
    """For pictures of any size, with rotary and perhaps learnt positions."""
    return Tower(
        _stack(vision, rotary=kind.rotary),
        patch=vision.num_channels * _area(vision.patch_size),
        patch_bias=kind.patch_bias,
        patches=None,
        positions=_area(getattr(vision, "image_size", 0) // vision.patch_size),
        after=LAYER_NORM,
    )


def _resampled(vision: Any, kind: TowerKind) -> Tower:
    """For pictures of any size, with learnt positions that are resampled to them."""
    return Tower(
        _stack(vision),
        patch=vision.num_channels * _area(vision.patch_size),
        patch_bias=kind.patch_bias,
        patches=None,
        positions=vision.num_patches,
        after=LAYER_NORM,
        pools=kind.pools and vision.vision_use_head,
        resampled=True,
    )


def _root(vision: Any, kind: TowerKind) -> Tower:
    """With learnt positions, gated MLPs, and norms without means, also of what patches are embedded to."""
    patches = _area(vision.image_size) // _area(vision.patch_size)
    qkv, mlp = vision.qkv_bias, vision.mlp_bias
    return Tower(
        _stack(vision, gated=kind.gated, norm=RMS_NORM, qkv_bias=qkv, out_bias=qkv, mlp_bias=mlp),
        patch=vision.num_channels * _area(vision.patch_size),
        patch_bias=kind.patch_bias,
        patches=patches,
        positions=patches,
        before=RMS_NORM,
        after=RMS_NORM,
    )


def _averaged(vision: Any, kind: TowerKind) -> Tower:
    """For pictures of any size, with a table of positions for each axis; four norms a layer, and heads of a width of their own."""
    bare: dict[str, Any] = dict.fromkeys(("qkv_bias", "out_bias", "mlp_bias"), False)
    heads = {"head": vision.head_dim, "key_value_heads": vision.num_key_value_heads}
    norms = {"norms": 4, "norm": RMS_NORM, "query_norm": RMS_NORM}
    return Tower(
        _stack(vision, gated=kind.gated, rotary=kind.rotary, **norms, **heads, **bare),
        patch=3 * _area(vision.patch_size),
        patch_bias=kind.patch_bias,
        patches=None,
        positions=2 * vision.position_embedding_size,
        averaged=vision.pooling_kernel_size**2,
    )


def _scaled(vision: Any, kind: TowerKind) -> Tower:
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
        patch_bias=kind.patch_bias,
        patches=patches,
        prefix=int(kind.has_cls),
        positions=patches + 1 if vision.use_absolute_position_embeddings else 0,
        after=None if vision.use_mean_pooling else LAYER_NORM,
        unused=vision.hidden_size if vision.use_mask_token else 0,
    )


def _sized(vision: Any, kind: TowerKind) -> Tower:
    bare: dict[str, Any] = dict.fromkeys(("qkv_bias", "out_bias", "mlp_bias"), False)
    return Tower(
        _stack(vision, gated=kind.gated, norm=RMS_NORM, rotary=kind.rotary, **bare),
        patch=vision.num_channels * _area(vision.patch_size),
        patch_bias=kind.patch_bias,
        patches=None,
        before=RMS_NORM,
        packed=True,
    )


def _fused(vision: Any, kind: TowerKind) -> Tower:
    width = getattr(vision, "embed_dim", None) or vision.hidden_size
    inner = int(width * vision.mlp_ratio) if hasattr(vision, "mlp_ratio") else vision.intermediate_size
    side = getattr(vision, "window_size", 0) // vision.patch_size  # of a window, in patches
    whole = getattr(vision, "fullatt_block_indexes", range(vision.depth))
    stack = Stack(
        width=width,
        inner=inner,
        layers=vision.depth,
        heads=vision.num_heads,
        key_value_heads=vision.num_heads,
        head=width // vision.num_heads,
        gated=kind.gated,
        norm=RMS_NORM if kind.gated else LAYER_NORM,
        rotary=True,
        windows=tuple(None if layer in whole else side**2 for layer in range(vision.depth)),
    )
    return Tower(
        stack,
        patch=vision.in_channels * vision.temporal_patch_size * _area(vision.patch_size),
        patch_bias=kind.patch_bias,
        patches=None,
        positions=getattr(vision, "num_position_embeddings", 0),
    )


def _normed(vision: Any, kind: TowerKind) -> Tower:
    """Its MLP is as wide as what it hands on; ``intermediate_size`` is of the projector."""
    stack = Stack(
        width=vision.hidden_size,
        inner=vision.out_hidden_size,
        layers=vision.depth,
        heads=vision.num_heads,
        key_value_heads=vision.num_heads,
        head=vision.hidden_size // vision.num_heads,
        gated=kind.gated,
        qkv_bias=vision.attention_bias,
        out_bias=False,
        mlp_bias=False,
        norm=RMS_NORM,
        rotary=True,
    )
    return Tower(
        stack,
        patch=vision.in_channels * vision.temporal_patch_size * _area(vision.patch_size),
        patch_bias=kind.patch_bias,
        patches=None,
        positions=_area(vision.image_size // vision.patch_size),
        before=RMS_NORM,
        after=RMS_NORM,
    )


SHAPES: dict[str, Callable[[Any, TowerKind], Tower]] = {
    "plain": _plain,
    "rotated": _rotated,
    "resampled": _resampled,
    "root": _root,
    "averaged": _averaged,
    "scaled": _scaled,
    "sized": _sized,
    "fused": _fused,
    "normed": _normed,
}


def read_tower(vision: Any) -> Tower:
    """The encoder of a vision config.

    Raises
    ------
    UnsupportedModelError : it is of a kind that is not known here.
    """
    kind = TOWERS.get(vision.model_type)
    if kind is None:
        raise UnsupportedModelError(
            f"the cost of a vision encoder of type {vision.model_type!r} is not known; known types: {', '.join(TOWERS)}."
        )
    return SHAPES[kind.shape](vision, kind)
