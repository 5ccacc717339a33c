"""Qwen3-VL in vLLM, with embeddings that stand where they stood in the whole image, for all layers that read them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.model_executor.models.qwen3_vl import (
    Qwen3VLDummyInputsBuilder,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMultiModalDataParser,
    Qwen3VLMultiModalProcessor,
    Qwen3VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalKwargsItems
from vllm.multimodal.parse import MultiModalDataItems

from ...errors import InputError
from .qwen import POSITIONS, Placing, PlacingFields, PlacingInfo, PlacingParser


class StampedParser(PlacingParser):
    """Knows that videos have times, too."""

    embedding_fields = Qwen3VLMultiModalDataParser.embedding_fields


class StampedInfo(PlacingInfo, Qwen3VLProcessingInfo):
    """Knows that embeddings bring the features of deeper layers along."""

    video_needs_metadata = True
    parser = StampedParser

    def width(self) -> int | None:
        expected = super().width()
        return None if expected is None else expected * (1 + len(self.get_hf_config().vision_config.deepstack_visual_indexes))


class StampedProcessor(PlacingFields, Qwen3VLMultiModalProcessor):
    """Hands places on to the model."""

    info: StampedInfo

    def _get_prompt_updates(
        self, mm_items: MultiModalDataItems, hf_processor_mm_kwargs: Mapping[str, Any], out_mm_kwargs: MultiModalKwargsItems
    ) -> Any:
        if "video" in mm_items and any(POSITIONS in item for item in out_mm_kwargs.get("image", ()) if item is not None):
            raise InputError(f"{POSITIONS}: Qwen3-VL takes videos and placed images in prompts of their own. Ask twice.")
        return super()._get_prompt_updates(mm_items, hf_processor_mm_kwargs, out_mm_kwargs)


@MULTIMODAL_REGISTRY.register_processor(StampedProcessor, info=StampedInfo, dummy_inputs=Qwen3VLDummyInputsBuilder)
class FoveateQwen3VL(Placing, Qwen3VLForConditionalGeneration):
    """Qwen3-VL; without its vision encoder, too, vLLM's decoder gets what that would have given to its first layers."""

    use_deepstack: bool
    deepstack_num_level: int

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "model") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        levels = len(self.config.vision_config.deepstack_visual_indexes)
        if self.deepstack_num_level == levels:
            return
        self.use_deepstack, self.deepstack_num_level, self.multiscale_dim = bool(levels), levels, self.visual_dim * levels
        size = vllm_config.scheduler_config.max_num_batched_tokens, self.config.text_config.hidden_size
        self.deepstack_input_embeds = [torch.zeros(size) for _ in range(levels)]
        self.deepstack_input_embeds_num_tokens = 0
