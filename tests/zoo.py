"""Small random LLaVA models, saved to disk and loaded as a user loads them, and inputs for them. Other families: ``families``."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Ministral3Config,
    MistralConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    SiglipVisionConfig,
)

IMAGE, PAD, EOS = 5, 0, 2
VOCABULARY = 128
ROWS = COLUMNS = 8
TOKENS = ROWS * COLUMNS
PATCH = 14
SIDE = ROWS * PATCH
SCALED = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 16.0,
    "original_max_position_embeddings": 16,
    "llama_4_scaling_beta": 0.1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}


def text_config(kind: str) -> PreTrainedConfig:
    shared = dict(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=VOCABULARY,
        max_position_embeddings=2048,
        pad_token_id=PAD,
        bos_token_id=1,
        eos_token_id=EOS,
        initializer_range=0.3,
    )
    configs: dict[str, Callable[..., PreTrainedConfig]] = {
        "llama": LlamaConfig,
        "qwen2": Qwen2Config,
        "mistral": functools.partial(MistralConfig, sliding_window=40),  # shorter than the full prompts
        "gemma": GemmaConfig,
        "qwen3": Qwen3Config,
        "gemma2": functools.partial(Gemma2Config, sliding_window=40, query_pre_attn_scalar=16),  # every other layer has a window
        "gemma3": functools.partial(
            Gemma3TextConfig, sliding_window=40, query_pre_attn_scalar=16, layer_types=["sliding_attention", "full_attention"] * 2
        ),
        "phi": functools.partial(PhiConfig, partial_rotary_factor=0.5),
        "phi3": Phi3Config,
        # reads position_ids in its attention; the small context scales queries of all but the first tokens
        "ministral3": functools.partial(Ministral3Config, sliding_window=None, rope_parameters=dict(SCALED)),
    }
    return configs[kind](**shared)


def clip_config(**changes: object) -> CLIPVisionConfig:
    settings = dict(hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, image_size=SIDE)
    settings |= dict(patch_size=PATCH, projection_dim=32, initializer_range=0.3, initializer_factor=3.0)
    return CLIPVisionConfig(**(settings | changes))


def siglip_config() -> SiglipVisionConfig:
    return SiglipVisionConfig(
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=5,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=PATCH,
        vision_use_head=False,
    )


def build_llava(decoder: str, *, tower: PreTrainedConfig | None = None, strategy: str = "default") -> PreTrainedModel:
    """``decoder`` is a name of ``text_config``; with "-deep" behind it the vision encoder has five layers instead of three."""
    if decoder.endswith("-deep"):
        decoder, tower = decoder.removesuffix("-deep"), clip_config(num_hidden_layers=5)
    config = LlavaConfig(
        vision_config=tower or clip_config(),
        text_config=text_config(decoder),
        image_token_index=IMAGE,
        vision_feature_layer=-2,
        vision_feature_select_strategy=strategy,
        image_seq_length=TOKENS,
    )
    return LlavaForConditionalGeneration(config)


BUILDERS: dict[str, Callable[[str], PreTrainedModel]] = {"llava": build_llava}
DECODERS = ("llama", "qwen2", "mistral", "gemma")
CUT_DECODERS = (*DECODERS, "qwen3", "gemma2", "gemma3", "phi", "phi3", "ministral3")


@functools.cache
def saved(family: str, decoder: str) -> Path:
    """A folder with a random model of a family, written by ``save_pretrained``."""
    torch.manual_seed(0)
    model = BUILDERS[family](decoder)
    folder = Path(tempfile.mkdtemp(prefix="foveate-zoo-")) / f"{family}-{decoder}"
    model.generation_config.update(pad_token_id=PAD, eos_token_id=EOS)
    model.save_pretrained(folder)
    return folder


def load(family: str = "llava", decoder: str = "llama", attn: str = "sdpa", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model as a user loads it."""
    model = AutoModelForImageTextToText.from_pretrained(saved(family, decoder), attn_implementation=attn, dtype=dtype)
    return model.eval()


@functools.cache
def tower(name: str) -> PreTrainedModel:
    """A model with another vision encoder than ``load()``, or that uses its own in another way."""
    torch.manual_seed(0)
    if name == "siglip":
        return build_llava("llama", tower=siglip_config(), strategy="full").eval()
    return build_llava("llama", strategy="full").eval()


def pictures(number: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random pictures whose [CLS] attention has different numbers of outliers."""
    generator = torch.Generator().manual_seed(seed)
    strength = torch.tensor([1.0, 0.3, 2.0, 0.6])[torch.arange(number) % 4]
    return (torch.randn(number, 3, SIDE, SIDE, generator=generator) * strength[:, None, None, None]).to(dtype)


def prompt(images: int, before: int, after: int, seed: int, tokens: int = TOKENS) -> list[int]:
    """Token ids: <s>, text, then each image with text behind it."""
    generator = torch.Generator().manual_seed(seed)

    def words(n: int) -> list[int]:
        return torch.randint(10, VOCABULARY, (n,), generator=generator).tolist()

    ids = [1, *words(before)]
    for _ in range(images):
        ids += [IMAGE] * tokens + words(after)
    return ids


def pad(rows: Sequence[Sequence[int]], side: str = "left") -> dict[str, Tensor]:
    width = max(map(len, rows))
    ids, mask = [], []
    for row in rows:
        filler = [PAD] * (width - len(row))
        real, none = [1] * len(row), [0] * len(filler)
        ids.append([*filler, *row] if side == "left" else [*row, *filler])
        mask.append([*none, *real] if side == "left" else [*real, *none])
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


ROWS_OF_BATCH = ((1, 3, 6, 1), (2, 2, 5, 2), (0, 9, 0, 3), (1, 8, 4, 4))  # images, words before, words after, seed


def batch(
    side: str = "left", rows: Sequence[int] = (0, 1, 2, 3), dtype: torch.dtype = torch.float32, tokens: int = TOKENS
) -> dict[str, Tensor]:
    """Rows with one, two, no and one image, padded; ``rows`` picks some of them, with their own pictures."""
    total = sum(images for images, *_ in ROWS_OF_BATCH)
    every, first, picked = pictures(total, dtype=dtype), 0, []
    for number, (images, *_) in enumerate(ROWS_OF_BATCH):
        if number in rows:
            picked += range(first, first + images)
        first += images
    inputs = pad([prompt(*ROWS_OF_BATCH[row], tokens) for row in rows], side)
    if picked:
        inputs["pixel_values"] = every[picked]
    return inputs
