"""A LLaVA with random weights on disk, as transformers, vLLM and foveate read it, and requests for it."""

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
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from foveate.pocket import WEIGHTS
from foveate.pocket.vocabulary import FUNCTION_WORDS, IMAGE, VOCABULARY

SIDE, PATCH = 336, 14
CELLS = (SIDE // PATCH) ** 2
TEXT = 32  # tokens of a request beside its picture
FRAME = 3  # of the text: the first token, "user:" and "assistant:"
SHAPES = {  # width, MLP, layers, heads
    "full": dict(tower=(256, 1024, 6, 4), decoder=(1024, 2816, 12, 16)),
    "small": dict(tower=(64, 128, 2, 2), decoder=(64, 128, 2, 2)),
}


def write_model(size: str, folder: Path) -> Path:
    """Write a LLaVA of random bfloat16 weights with the tokenizer of the pocket model."""
    width, mlp, layers, heads = SHAPES[size]["tower"]
    vision = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        image_size=SIDE,
        patch_size=PATCH,
    )
    width, mlp, layers, heads = SHAPES[size]["decoder"]
    text = LlamaConfig(
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=len(VOCABULARY),
        max_position_embeddings=2048,
    )
    torch.manual_seed(0)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, image_seq_length=CELLS)
    torch.set_default_dtype(torch.bfloat16)
    model = LlavaForConditionalGeneration(config).eval()
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(WEIGHTS / file, folder)
    processor = json.loads((WEIGHTS / "processor_config.json").read_text()) | {"patch_size": PATCH}
    processor["image_processor"] |= {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    (folder / "processor_config.json").write_text(json.dumps(processor))
    return folder


def published(source: Path, folder: Path) -> Path:
    """The same with the keys of published checkpoints, which vLLM expects: transformers 5 leaves out a part of those of CLIP."""
    shutil.copytree(source, folder)
    weights = load_file(folder / "model.safetensors")
    renamed = {name.replace("vision_tower.", "vision_tower.vision_model."): weight for name, weight in weights.items()}
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def picture(number: int) -> str:
    """A picture like no other, as a data URL: smooth areas with some grain, a JPEG of about 30 KB."""
    numbers = np.random.default_rng(number)
    areas = Image.fromarray(numbers.integers(0, 256, (9, 9, 3), dtype=np.uint8)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    grain = numbers.normal(0, 8, (SIDE, SIDE, 3))
    saved = BytesIO()
    Image.fromarray((np.asarray(areas) + grain).clip(0, 255).astype(np.uint8)).save(saved, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(saved.getvalue()).decode()


def request(number: int, method: str | None, budget: int | None, answer: int) -> dict[str, Any]:
    """A request about a picture of its own, for an answer of so many tokens; without a method it is one for vLLM."""
    words = random.Random(number).choices(FUNCTION_WORDS, k=TEXT - FRAME)
    content = [{"type": "image_url", "image_url": {"url": picture(number)}}, {"type": "text", "text": " ".join(words)}]
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        "max_tokens": answer,
        "ignore_eos": True,
        "skip_special_tokens": False,  # so that each token is seen when it comes
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return body | ({} if method is None else {"foveate": {"method": method} | ({} if budget is None else {"budget": budget})})
