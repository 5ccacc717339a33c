"""The second pocket model before training: stock Hugging Face classes, with a patch embedding that whitens patches of scenes."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor, Qwen2VLImageProcessorPil

from ... import frames
from ..build import PIXEL_MEAN, PIXEL_STD, spread_linear, whitening
from ..scenes import PATCH, owners
from .clips import FRAMES, RATE
from .pictures import CELL, LARGEST, SMALLEST, draw_picture
from .vocabulary import CHAT_TEMPLATE, END, IMAGE, PAD, VIDEO, VISION_END, VISION_START, VOCABULARY, build_tokenizer

MERGE = CELL // PATCH
WINDOW = 64  # pixels
LONGEST_FRAME = 176 * 176


def build_processor() -> Qwen2_5_VLProcessor:
    """Processor of the model: pictures keep their size where they have 64 to 600 tokens, frames of clips up to 176 x 176 pixels."""
    settings: dict[str, Any] = {"patch_size": PATCH, "temporal_patch_size": FRAMES, "merge_size": MERGE}
    settings |= {"image_mean": [PIXEL_MEAN] * 3, "image_std": [PIXEL_STD] * 3}
    images = Qwen2VLImageProcessorPil(size={"shortest_edge": SMALLEST * CELL**2, "longest_edge": LARGEST * CELL**2}, **settings)
    videos = frames.build_video_processor(
        size={"shortest_edge": 16 * CELL**2, "longest_edge": LONGEST_FRAME}, do_sample_frames=False, **settings
    )
    return frames.build_processor(
        Qwen2_5_VLProcessor,
        image_processor=images,
        tokenizer=build_tokenizer(),
        video_processor=videos,
        chat_template=CHAT_TEMPLATE,
    )


def pocket_config() -> Qwen2_5_VLConfig:
    """A Qwen2.5-VL in small: native resolution, windows in half of the encoder's layers, grouped queries, three-part positions."""
    vision = {
        "depth": 6,
        "hidden_size": 128,
        "intermediate_size": 320,
        "num_heads": 4,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": FRAMES,
        "window_size": WINDOW,
        "fullatt_block_indexes": [1, 3, 5],
        "out_hidden_size": 192,
        "tokens_per_second": int(RATE),
    }
    text = {
        "vocab_size": len(VOCABULARY),
        "hidden_size": 192,
        "intermediate_size": 384,
        "num_hidden_layers": 8,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 8192,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [4, 6, 6]},
        "bos_token_id": None,
        "eos_token_id": END,
        "pad_token_id": PAD,
        "tie_word_embeddings": False,
    }
    return Qwen2_5_VLConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        tie_word_embeddings=False,
    )


def build_model(seed: int = 0) -> Qwen2_5_VLForConditionalGeneration:
    """The untrained model (float32); the caller's random state is left as it was."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(pocket_config())
        spread_linear(model)
        embedding = model.model.visual.patch_embed.proj.weight
        frame = whitening(_pictures(seed), embedding.shape[0]).view(-1, 3, 1, PATCH, PATCH)
        embedding.copy_(0.5 * 0.75 * frame.expand_as(embedding))  # both frames of a patch are the same in pictures
        for block in model.model.visual.blocks:
            block.attn.proj.weight.mul_(0.5)
            block.mlp.down_proj.weight.mul_(0.3)
        nn.init.normal_(model.model.language_model.embed_tokens.weight, std=0.5)
        for layer in model.model.language_model.layers:  # they begin as the identity
            nn.init.zeros_(layer.self_attn.o_proj.weight)
            nn.init.zeros_(layer.mlp.down_proj.weight)
        nn.init.normal_(model.lm_head.weight, std=0.02)
    model.generation_config.update(eos_token_id=END, pad_token_id=PAD, do_sample=False, max_new_tokens=16)
    return model


def _pictures(seed: int) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.bool_]]]:
    random = Random(seed)
    for _ in range(120):
        picture = draw_picture(random, (192, 192))
        yield picture.image, owners(picture.item_map, len(picture.items)) >= 0
