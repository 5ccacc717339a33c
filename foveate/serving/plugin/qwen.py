"""Qwen2-VL and Qwen2.5-VL in vLLM, with embeddings of visual tokens that stand where they stood in the whole image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models.qwen2_5_vl import (
    Qwen2_5_VLDummyInputsBuilder,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLMultiModalProcessor,
    Qwen2_5_VLProcessingInfo,
)
from vllm.model_executor.models.qwen2_vl import (
    Qwen2VLDummyInputsBuilder,
    Qwen2VLForConditionalGeneration,
    Qwen2VLMultiModalDataParser,
    Qwen2VLMultiModalProcessor,
    Qwen2VLProcessingInfo,
    _create_qwen2vl_field_factory,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import DictEmbeddingItems

from ...errors import InputError
from ..checks import check_embeds
from .embeds import check_grid, check_placed

POSITIONS, EXTENTS = "image_positions", "image_extents"


def _fields(merge: int, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """How the placed tokens of several images lie in their fields; on the CPU, where positions are counted."""
    counts = inputs.get("image_grid_thw", torch.empty((0, 3))).prod(-1) // merge**2
    return {
        POSITIONS: MultiModalFieldConfig.flat_from_sizes("image", counts, keep_on_cpu=True),
        EXTENTS: MultiModalFieldConfig.batched("image", keep_on_cpu=True),
    }


class PlacingParser(Qwen2VLMultiModalDataParser):
    """Takes embeddings that the engine can take, with or without their places.

    Parameters
    ----------
    longest : what extents of a prompt may be together.
    """

    def __init__(self, merge: int, longest: int, *, pruned: bool, **settings: Any) -> None:
        super().__init__(merge, **settings)
        self.merge, self.longest, self.pruned = merge, longest, pruned

    def _parse_image_data(self, data: Any) -> Any:
        if not isinstance(data, dict):
            return super()._parse_image_data(data)
        self._check(data)
        required, optional = self.embedding_field_sets("image")
        stock = _create_qwen2vl_field_factory(self.merge)
        return DictEmbeddingItems(
            data,
            modality="image",
            required_fields=required,
            optional_fields=optional,
            fields_factory=lambda inputs: {**stock(inputs), **_fields(self.merge, inputs)},
        )

    def _check(self, data: Mapping[str, Any]) -> None:
        embeds, positions, extents = (data.get(name) for name in ("image_embeds", POSITIONS, EXTENTS))
        counts = check_grid(data.get("image_grid_thw"), self.merge)
        if embeds is not None and self.expected_hidden_size is not None:
            check_embeds(embeds, self.expected_hidden_size)
            if len(embeds) != sum(counts):
                raise InputError(f"{len(embeds)} image_embeds, and image_grid_thw is of {sum(counts)} visual tokens")
        if positions is None and extents is None:
            return
        if not isinstance(positions, Tensor) or not isinstance(extents, Tensor):
            raise InputError(f"{POSITIONS} and {EXTENTS} go together: give both, as foveate.serving.plugin.qwen_request does")
        if self.pruned:
            raise InputError(f"{POSITIONS}: a server that prunes videos (--video-pruning-rate) counts positions anew")
        check_placed(positions, extents, counts, self.longest)


class PlacingInfo(Qwen2VLProcessingInfo):
    """Hands out the parser."""

    video_needs_metadata = False
    parser = PlacingParser

    def width(self) -> int | None:
        """Of an embedding, None where none are taken."""
        expected: int | None = self._get_expected_hidden_size()
        return expected

    def get_data_parser(self) -> PlacingParser:
        return self.parser(
            self.get_hf_config().vision_config.spatial_merge_size,
            int(self.ctx.model_config.max_model_len),
            pruned=bool(self.ctx.get_mm_config().video_pruning_rate),
            video_needs_metadata=self.video_needs_metadata,
            expected_hidden_size=self.width(),
            allow_missing_mm_embeddings=self.allow_missing_mm_embeddings,
        )


class NewerInfo(PlacingInfo, Qwen2_5_VLProcessingInfo):
    """The same for Qwen2.5-VL."""

    video_needs_metadata = True


class PlacingFields:
    """Hands places on to the model; mixed into a processor of vLLM."""

    info: PlacingInfo

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, object]) -> Mapping[str, Any]:
        stock: Any = super()
        merge = self.info.get_hf_config().vision_config.spatial_merge_size
        return {**stock._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs), **_fields(merge, hf_inputs)}


class PlacingProcessor(PlacingFields, Qwen2VLMultiModalProcessor):
    """For Qwen2-VL."""


class NewerProcessor(PlacingFields, Qwen2_5_VLMultiModalProcessor):
    """For Qwen2.5-VL."""


class Placing:
    """Numbers the tokens of prompts with placed visual tokens; all other prompts are vLLM's own affair."""

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[Any]) -> tuple[Tensor, int]:
        """(t, h, w) positions [3, S] of a prompt, and by how much what follows is ahead of its tokens."""
        stock: Any = super()
        if not any(POSITIONS in feature.data for feature in mm_features):
            positions, ahead = stock.get_mrope_input_positions(input_tokens, mm_features)
            return positions, ahead
        parts: list[Tensor] = []
        token, position = 0, 0

        def text(until: int) -> None:
            nonlocal token, position
            parts.append(torch.arange(position, position + until - token).expand(3, -1))
            token, position = until, position + until - token

        for feature in sorted(mm_features, key=lambda each: each.mm_position.offset):
            text(feature.mm_position.offset)
            inside, extent = self._places(feature)
            parts.append(inside + position)
            token, position = token + inside.shape[1], position + extent
        text(len(input_tokens))
        return torch.cat(parts, 1), position - len(input_tokens)

    def _places(self, feature: Any) -> tuple[Tensor, int]:
        """[3, n] positions of an image or video counted from its beginning, and by how much it moves on what is after it."""
        if POSITIONS in feature.data:
            return feature.data[POSITIONS].data.long().T, int(feature.data[EXTENTS].data)
        own: Any = self
        ((_, *sides, seconds),) = own.iter_mm_grid_thw([feature])
        inside = torch.cartesian_prod(*(torch.arange(side) for side in sides)).T.clone()
        inside[0] = (inside[0] * seconds).long()
        return inside, int(inside.max()) + 1


@MULTIMODAL_REGISTRY.register_processor(PlacingProcessor, info=PlacingInfo, dummy_inputs=Qwen2VLDummyInputsBuilder)
class FoveateQwen2VL(Placing, Qwen2VLForConditionalGeneration):
    """Qwen2-VL."""


@MULTIMODAL_REGISTRY.register_processor(NewerProcessor, info=NewerInfo, dummy_inputs=Qwen2_5_VLDummyInputsBuilder)
class FoveateQwen25VL(Placing, Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL."""
