"""A LLaVA or a Qwen2.5-VL with random weights on disk, as transformers, vLLM and foveate read it, and requests for it."""

from __future__ import annotations

import base64
import json
import random
import shutil
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from foveate.pocket import MODELS, NAME, QWEN
from foveate.pocket.native import vocabulary as qwen_words
from foveate.pocket.vocabulary import FUNCTION_WORDS, IMAGE, VOCABULARY

FAMILIES = ("llava", "qwen")
PATCH = 14
CELLS = 576  # visual tokens of a picture
SIDES = {"llava": 336, "qwen": 672}  # of a picture, in pixels: Qwen2.5-VL merges four patches
TEXT = 32  # tokens of a request beside its picture
FRAME = {"llava": 3, "qwen": 7}  # of them, those that the chat template writes
SHAPES = {  # width, MLP, layers, heads
    "full": dict(tower=(256, 1024, 6, 4), decoder=(1024, 2816, 12, 16)),
    "small": dict(tower=(64, 128, 2, 2), decoder=(64, 128, 2, 2)),
}
FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def write_model(family: str, size: str, folder: Path) -> Path:
    """Write a model of random bfloat16 weights with the tokenizer of a pocket model."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = (_qwen if family == "qwen" else _llava)(**SHAPES[size]).eval()
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    shipped, side = MODELS[QWEN if family == "qwen" else NAME], SIDES[family]
    for file in FILES:
        shutil.copy(shipped / file, folder)
    processor = json.loads((shipped / "processor_config.json").read_text())
    if family == "qwen":
        pixels = {"shortest_edge": (4 * PATCH) ** 2, "longest_edge": side**2}
        processor["image_processor"] |= {"size": pixels, "patch_size": PATCH}
        processor["video_processor"] |= {"patch_size": PATCH}
    else:
        processor |= {"patch_size": PATCH}
        processor["image_processor"] |= {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    (folder / "processor_config.json").write_text(json.dumps(processor))
    return folder


def _sizes(shape: tuple[int, int, int, int]) -> dict[str, int]:
    return dict(zip(("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"), shape, strict=True))


def _llava(tower: tuple[int, int, int, int], decoder: tuple[int, int, int, int]) -> PreTrainedModel:
    vision = CLIPVisionConfig(**_sizes(tower), image_size=SIDES["llava"], patch_size=PATCH)
    text = LlamaConfig(**_sizes(decoder), num_key_value_heads=decoder[-1], vocab_size=len(VOCABULARY), max_position_embeddings=2048)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, image_seq_length=CELLS)
    return LlavaForConditionalGeneration(config)


def _qwen(tower: tuple[int, int, int, int], decoder: tuple[int, int, int, int]) -> PreTrainedModel:
    width, mlp, layers, heads = tower
    vision = {"hidden_size": width, "intermediate_size": mlp, "depth": layers, "num_heads": heads, "patch_size": PATCH}
    vision |= {"window_size": 8 * PATCH, "fullatt_block_indexes": [layers // 2 - 1, layers - 1], "out_hidden_size": decoder[0]}
    half = decoder[0] // decoder[-1] // 2  # pairs of channels that turn in a head, shared out among t, h and w
    sections = [half - 2 * (3 * half // 8), 3 * half // 8, 3 * half // 8]
    text = {
        **_sizes(decoder),
        "num_key_value_heads": decoder[-1],
        "vocab_size": len(qwen_words.VOCABULARY),
        "max_position_embeddings": 2048,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": sections},
        "bos_token_id": None,
        "eos_token_id": qwen_words.END,
        "pad_token_id": qwen_words.PAD,
    }
    config = Qwen2_5_VLConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=qwen_words.IMAGE,
        video_token_id=qwen_words.VIDEO,
        vision_start_token_id=qwen_words.VISION_START,
        vision_end_token_id=qwen_words.VISION_END,
        tie_word_embeddings=False,
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def published(source: Path, folder: Path) -> Path:
    """The same with the keys of published checkpoints, which vLLM expects: transformers 5 leaves out a part of those of CLIP."""
    shutil.copytree(source, folder)
    weights = load_file(folder / "model.safetensors")
    renamed = {name.replace("vision_tower.", "vision_tower.vision_model."): weight for name, weight in weights.items()}
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def picture(number: int, side: int) -> str:
    """A picture like no other, as a data URL: smooth areas with some grain, a JPEG of about 30 KB where its side is 336."""
    numbers = np.random.default_rng(number)
    areas = Image.fromarray(numbers.integers(0, 256, (9, 9, 3), dtype=np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
    grain = numbers.normal(0, 8, (side, side, 3))
    saved = BytesIO()
    Image.fromarray((np.asarray(areas) + grain).clip(0, 255).astype(np.uint8)).save(saved, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(saved.getvalue()).decode()


def content(number: int, family: str) -> list[dict[str, Any]]:
    """A message about a picture of its own."""
    known = [word for word in FUNCTION_WORDS if word in VOCABULARY and word in qwen_words.VOCABULARY]
    text = " ".join(random.Random(number).choices(known, k=TEXT - FRAME[family]))
    return [{"type": "image_url", "image_url": {"url": picture(number, SIDES[family])}}, {"type": "text", "text": text}]


def body(method: str | None, budget: int | None) -> dict[str, Any]:
    """Further fields of a request; without a method it is one for vLLM itself."""
    asked = {} if method is None else {"foveate": {"method": method} | ({} if budget is None else {"budget": budget})}
    return {"skip_special_tokens": False} | asked  # so that each token is seen when it comes
