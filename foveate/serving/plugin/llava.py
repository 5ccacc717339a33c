"""LLaVA-1.5 in vLLM with fewer visual tokens, and with embeddings of different lengths."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PixtralVisionConfig
from vllm.config import VllmConfig
from vllm.distributed import tensor_model_parallel_all_gather
from vllm.model_executor.models.llava import (
    BaseLlavaProcessingInfo,
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    LlavaMultiModalProcessor,
    LlavaProcessingInfo,
    PixtralHFMultiModalProcessor,
    PixtralHFProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems
from vllm.multimodal.parse import ImageProcessorItems, MultiModalDataItems, MultiModalDataParser
from vllm.multimodal.processing import BaseMultiModalProcessor, InputProcessingContext, PromptReplacement

from ...families import TOWERS
from ..checks import check_embeds
from .embeds import check_picture
from .settings import REQUESTED, kept, method_of
from .tower import ReducingTower, check_count, check_reducible, every_layer, leading

KEEP = "foveate_keep"  # of each image, tokens of its grid that stay


class CheckedParser(MultiModalDataParser):
    """Takes ``image_embeds`` that the engine can take."""

    def _parse_image_data(self, data: Any) -> Any:
        if self.expected_hidden_size is not None and isinstance(data, Tensor | list):
            for each in data:
                if self.is_embeddings(data):
                    check_embeds(each, self.expected_hidden_size)
                else:
                    check_picture(each)
        return super()._parse_image_data(data)


class FoveateInfo(LlavaProcessingInfo):
    """Knows the method of the server."""

    def __init__(self, ctx: InputProcessingContext) -> None:
        super().__init__(ctx)
        self.method = method_of(self.get_hf_config())
        if self.method is not None:
            check_reducible(self.get_hf_config())

    @cached_property
    def cells(self) -> int:
        """Tokens of an image's grid."""
        return int(self.get_vision_encoder_info().get_patch_grid_length()) ** 2

    def get_data_parser(self) -> MultiModalDataParser:
        return CheckedParser(
            expected_hidden_size=self._get_expected_hidden_size(),
            allow_missing_mm_embeddings=self.allow_missing_mm_embeddings,
        )


class FoveateProcessor(LlavaMultiModalProcessor):
    """Makes as many placeholders as tokens will stay."""

    info: FoveateInfo

    def _call_hf_processor(self, hf_data: Mapping[str, object], hf_kwargs: Mapping[str, object]) -> Any:
        others = dict(hf_kwargs)
        keep = kept(self.info.method, others.pop(REQUESTED, None), self.info.cells)  # type: ignore[arg-type]
        made = super()._call_hf_processor(hf_data, others)
        if keep is not None:
            made[KEEP] = torch.full((len(made["pixel_values"]),), keep)
        return made

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, object]) -> Mapping[str, Any]:
        fields = super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs)
        return {**fields, KEEP: MultiModalFieldConfig.batched("image", keep_on_cpu=True)}

    def _get_prompt_updates(
        self, mm_items: MultiModalDataItems, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: MultiModalKwargsItems
    ) -> Any:
        if self.info.method is None or not isinstance(mm_items.get("image"), ImageProcessorItems):
            return super()._get_prompt_updates(mm_items, hf_processor_mm_kwargs, out_mm_kwargs)
        token = self.info.get_hf_config().image_token_index

        def placeholders(item: int) -> list[int]:
            return [token] * (leading(self.info.get_hf_config()) + int(out_mm_kwargs["image"][item][KEEP].data))

        return [PromptReplacement(modality="image", target=[token], replacement=placeholders)]


def _info(ctx: InputProcessingContext) -> BaseLlavaProcessingInfo:
    config = ctx.get_hf_config()
    if not isinstance(config.vision_config, PixtralVisionConfig):
        return FoveateInfo(ctx)
    if method_of(config) is not None:
        check_reducible(config)
    return PixtralHFProcessingInfo(ctx)


def _processor(info: BaseLlavaProcessingInfo, dummy_inputs: Any) -> BaseMultiModalProcessor:
    kind = FoveateProcessor if isinstance(info, FoveateInfo) else PixtralHFMultiModalProcessor
    return kind(info, dummy_inputs)


@MULTIMODAL_REGISTRY.register_processor(_processor, info=_info, dummy_inputs=LlavaDummyInputsBuilder)
class FoveateLlava(LlavaForConditionalGeneration):
    """LLaVA-1.5 whose visual tokens are reduced between encoder and projector, where the config names a method."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        config = vllm_config.model_config.hf_config
        method = method_of(config)
        with nullcontext() if method is None else every_layer(config):
            super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.method = method
        self.supports_tower_connector_lora = method is None  # adapters count tokens before their reduction
        self.embeds_dtype = vllm_config.model_config.dtype
        self.most_tokens = int(vllm_config.scheduler_config.max_num_batched_tokens)

    @cached_property
    def reducing(self) -> ReducingTower:
        """Vision encoder, method and projector."""
        tower = self.vision_tower
        shared = tower.vision_model.encoder.layers[0].self_attn.tp_size > 1
        gather = (lambda part: tensor_model_parallel_all_gather(part.contiguous())) if shared else None
        return ReducingTower(self.config, tower, self.multi_modal_projector, self._features, gather)

    def _features(self, pixels: Tensor) -> Tensor:
        return self._image_pixels_to_features(self.vision_tower, pixels)

    def _image_pixels_to_features(self, vision_tower: Any, pixel_values: Any) -> Any:
        if self.method is None:
            return super()._image_pixels_to_features(vision_tower, pixel_values)
        return vision_tower(
            pixel_values,
            select_layers=[self.config.vision_feature_layer],
            feature_select_strategy=self.config.vision_feature_select_strategy,
        )

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """Visual tokens of each image [n_i, D]; n_i may differ."""
        keep, embeds = kwargs.pop(KEEP, None), kwargs.get("image_embeds")
        if embeds is not None and not TOWERS[self.config.vision_config.model_type].any_size:
            return [each.to(self.embeds_dtype) for each in embeds]
        if keep is None or self.method is None:
            return super().embed_multimodal(**kwargs)
        return self._reduced(self._parse_and_validate_image_input(**kwargs)["pixel_values"], keep.flatten())

    def _reduced(self, pixels: Tensor, keep: Tensor) -> list[Tensor]:
        """Images [B, 3, H, W] -> visual tokens of each; as many images at once as vLLM would encode without reduction."""
        rows, columns = self.reducing.parts.grid(*pixels.shape[-2:])
        cells = rows * columns
        found: dict[int, Tensor] = {}
        for count in keep.unique().tolist():
            images = (keep == count).nonzero().flatten()
            for some in images.split(max(1, self.most_tokens // cells)):
                found |= zip(some.tolist(), self._alike(pixels[some.to(pixels.device)], count, cells), strict=True)
        return [found[image] for image in range(len(pixels))]

    def _alike(self, pixels: Tensor, count: int, cells: int) -> list[Tensor]:
        """Images that all keep ``count`` of ``cells`` tokens."""
        if count >= cells or self.method is None:
            return list(self.multi_modal_projector(self._features(pixels)))
        method = self.method.with_budget(count)
        embeds = self.reducing(method, pixels)
        check_count(method, embeds, count + leading(self.config))
        return embeds
