"""vLLM's LLaVA as foveate's engine sees it: its own vision encoder, its own projector."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ...engine.model.anatomy import Anatomy
from ...errors import InputError, UnsupportedModelError
from ...families import FAMILIES, TOWERS
from ...methods.base import ProjectorReducer
from ...pictures import Pictures
from ...tokens import EncoderTap

Gather = Callable[[Tensor], Tensor]  # [..., C of this process] -> [..., C of all]


def check_reducible(config: Any) -> None:
    """Raise ``UnsupportedModelError`` unless visual tokens are a grid of patches from one layer of an encoder known in vLLM."""
    kind = config.vision_config.model_type
    if kind not in TOWERS or TOWERS[kind].vllm is None:
        able = ", ".join(name for name, tower in TOWERS.items() if tower.vllm)
        raise UnsupportedModelError(f"LLaVA with a {kind!r} vision encoder cannot be reduced inside vLLM; these can: {able}.")
    layer, strategy = config.vision_feature_layer, config.vision_feature_select_strategy
    if not isinstance(layer, int) or strategy not in (("default", "full") if TOWERS[kind].has_cls else ("full",)):
        raise UnsupportedModelError(
            f"vision_feature_layer={layer} and vision_feature_select_strategy={strategy!r}: visual tokens can only be reduced "
            "where they are the patches of one layer."
        )


def leading(config: Any) -> int:
    """Tokens before the grid, which stay: [CLS], or none."""
    return int(TOWERS[config.vision_config.model_type].has_cls and config.vision_feature_select_strategy == "full")


@contextmanager
def every_layer(config: Any) -> Iterator[None]:
    """Inside, vLLM builds all layers of the vision encoder, which methods may read, and not only those that make the features."""
    layer = config.vision_feature_layer
    config.vision_feature_layer = -1
    try:
        yield
    finally:
        config.vision_feature_layer = layer


class _Base:
    """What the engine calls to encode pictures."""

    def __init__(self, features: Callable[[Tensor], Tensor], projector: Any) -> None:
        self.features, self.projector = features, projector

    def get_image_features(self, pixel_values: Tensor, return_dict: bool) -> BaseModelOutputWithPooling:
        return BaseModelOutputWithPooling(pooler_output=self.projector(self.features(pixel_values)))


class ReducingTower:
    """Encodes pictures with vLLM's modules, and reduces their tokens with a method of foveate.

    Parameters
    ----------
    config : of the model.
    tower, projector : vLLM's modules.
    features : [B, 3, H, W] -> [B, L + N, C], what the projector reads.
    gather : brings together what processes of tensor parallelism hold of the attention heads; None = there is one process.
    """

    def __init__(
        self, config: Any, tower: Any, projector: Any, features: Callable[[Tensor], Tensor], gather: Gather | None
    ) -> None:
        kind = TOWERS[config.vision_config.model_type]
        kind = replace(kind, layers=kind.vllm or kind.layers, qkv="self_attn.qkv_proj", resizable=False)
        model: Any = SimpleNamespace(config=config, base_model=_Base(features, projector))
        self.parts = Anatomy(model, FAMILIES[config.model_type], kind, tower, projector)
        self.gather = gather

    @torch.inference_mode()
    def __call__(self, method: ProjectorReducer, pixels: Tensor) -> list[Tensor]:
        """Pictures [B, 3, H, W] -> for each, visual tokens [m, D] in the space of the decoder."""
        gather = self.gather
        tap = None if gather is None else (lambda recorded: self._whole(recorded, gather))
        return Pictures.of_parts(self.parts, {"pixel_values": pixels}, tap).reduce(method).embeds

    @staticmethod
    def _whole(tap: EncoderTap, gather: Gather) -> EncoderTap:
        """Queries and keys of all heads."""
        query, queries = (None if part is None else gather(part) for part in (tap.query, tap.queries))
        return replace(tap, query=query, queries=queries, keys=gather(tap.keys))


def check_count(method: ProjectorReducer, embeds: list[Tensor], expected: int) -> None:
    """Raise ``InputError`` where a method does not keep its budget: vLLM has made room for as many tokens already."""
    found = sorted({len(each) for each in embeds} - {expected})
    if found:
        raise InputError(f"{method.name} kept {found[0]} tokens where its budget is {expected}. It cannot be used inside vLLM.")
