"""Small random models of every family, saved to disk and loaded as a user loads them, and batches for them.

``SPECS`` must cover ``foveate.families.FAMILIES`` (test_families checks it).
"""

from __future__ import annotations

import functools
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    AyaVisionConfig,
    CLIPVisionConfig,
    Cohere2Config,
    Gemma3Config,
    Glm4vConfig,
    Idefics3Config,
    InternVLConfig,
    LlavaConfig,
    LlavaNextConfig,
    LlavaNextVideoConfig,
    LlavaOnevisionConfig,
    Mistral3Config,
    PaliGemmaConfig,
    PixtralVisionConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
    Qwen3VLConfig,
    SiglipVisionConfig,
    SmolVLMConfig,
    VideoLlavaConfig,
    VipLlavaConfig,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from foveate.families import FAMILIES

from . import zoo
from .family_prompts import (
    END,
    FIRST_WORD,
    IMAGE,
    INDICATORS,
    NEWLINE,
    START,
    VIDEO,
    Anyres,
    Collate,
    Laid,
    Lay,
    Medium,
    Pixels,
    apart,
    framed,
    in_pixels,
    lines,
    packed,
    packed_patches,
    padded_patches,
    padded_pictures,
    padded_rows,
    placed_patches,
    plain,
    stacked,
    tiles_apart,
    tiles_in_one_run,
    tiles_of,
    tiles_with_breaks,
    tiles_with_indicators,
    tiles_with_separators,
)

WINDOW = 12  # of decoders with sliding layers: shorter than the prompts, and than a picture of Gemma 3
TOKENS = {"image_token_index": IMAGE, "video_token_index": VIDEO}
MARKS = {"image_token_id": IMAGE, "video_token_id": VIDEO}
PATCH = 4  # of Qwen and GLM


def clip(side: int, layers: int = 3) -> CLIPVisionConfig:
    return zoo.clip_config(image_size=side * zoo.PATCH, num_hidden_layers=layers)


def siglip(side: int, **changes: object) -> SiglipVisionConfig:
    settings = dict(hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, vision_use_head=False)
    return SiglipVisionConfig(**settings, image_size=side * zoo.PATCH, patch_size=zoo.PATCH, **changes)


def windowed(kind: str, window: int | None) -> PreTrainedConfig:
    config = zoo.text_config(kind)
    config.sliding_window = window
    return config


def cohere2() -> Cohere2Config:
    shared = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)
    ids = dict(vocab_size=zoo.VOCABULARY, pad_token_id=zoo.PAD, bos_token_id=1, eos_token_id=zoo.EOS)
    return Cohere2Config(**shared, **ids, sliding_window=WINDOW, initializer_range=0.3, logit_scale=1.0)


def mrope_text(layers: int = 4, **changes: object) -> dict[str, object]:
    rope = dict(rope_type="default", rope_theta=10000.0, mrope_section=[2, 3, 3])
    shape = dict(hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, vocab_size=zoo.VOCABULARY)
    ids = dict(pad_token_id=zoo.PAD, bos_token_id=1, eos_token_id=zoo.EOS)
    return shape | ids | dict(num_hidden_layers=layers, rope_parameters=rope, initializer_range=0.3) | changes


def packed_vision(**changes: object) -> dict[str, object]:
    return dict(depth=4, hidden_size=32, num_heads=4, patch_size=PATCH) | changes


NEXT = Anyres(side=6, shapes=((1, 2), (2, 1), (2, 2)))
NEXT_VIDEO = Anyres(side=6, shapes=((1, 2), (2, 1), (2, 2)), frame=3)
ONEVISION = Anyres(side=5, shapes=((1, 1), (1, 2), (2, 1), (2, 2), (3, 4)), frame=3, most=9)


def small_vit(side: int, **changes: object) -> dict[str, object]:
    shape = dict(hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4)
    return shape | dict(image_size=side, patch_size=zoo.PATCH) | changes


def pixtral() -> PixtralVisionConfig:
    return PixtralVisionConfig(**small_vit(168), head_dim=12)


def intern_vision() -> dict[str, object]:
    return small_vit(0, image_size=[84, 84], patch_size=[14, 14], layer_scale_init_value=1.0, use_qk_norm=True)


def hybrid_text(**changes: object) -> dict[str, object]:
    """Qwen3.5: three of four layers hold a state; two heads of keys for four of values there."""
    heads = dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=12)
    return mrope_text(head_dim=16, **heads, **changes) | HALF | dict(initializer_range=0.11)  # their states amplify rounding


def chunked_text() -> dict[str, object]:
    """Llama 4: chunks shorter than the prompts; every other layer has experts and no rotary embeddings."""
    shape = dict(hidden_size=64, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)
    ids = dict(vocab_size=zoo.VOCABULARY, pad_token_id=zoo.PAD, bos_token_id=1, eos_token_id=zoo.EOS)
    experts = dict(intermediate_size_mlp=96, num_local_experts=4, interleave_moe_layer_step=2)
    more = dict(head_dim=16, attention_chunk_size=16, no_rope_layer_interval=2, initializer_range=0.3)
    return shape | ids | experts | more


def layered_text(**changes: object) -> dict[str, object]:
    """Gemma 4: the last layers read keys and values of earlier ones; all have embeddings of their own, global ones other heads."""
    shape = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2)
    ids = dict(vocab_size=zoo.VOCABULARY, pad_token_id=zoo.PAD, bos_token_id=1, eos_token_id=zoo.EOS)
    own = dict(hidden_size_per_layer_input=8, vocab_size_per_layer_input=zoo.VOCABULARY, num_kv_shared_layers=2)
    more = dict(head_dim=16, global_head_dim=32, layer_types=["sliding_attention", "full_attention"] * 3)
    sees = dict(use_bidirectional_attention="vision", sliding_window=WINDOW, use_double_wide_mlp=True)
    return shape | ids | own | more | sees | dict(initializer_range=0.16) | changes


def convolving_text() -> dict[str, object]:
    """LFM2: every other layer is a convolution."""
    shape = dict(hidden_size=64, intermediate_size=150, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)
    ids = dict(vocab_size=zoo.VOCABULARY, pad_token_id=zoo.PAD, bos_token_id=1, eos_token_id=zoo.EOS)
    more = dict(block_multiple_of=8, layer_types=["conv", "full_attention"] * 2, initializer_range=0.3)
    return shape | ids | more | dict(model_type="lfm2")


# half of the channels of a head are turned
HALF = dict(rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[1, 1, 2], partial_rotary_factor=0.5))
EXPERTS = dict(num_experts=6, num_experts_per_tok=2, moe_intermediate_size=48)
ROUTED = dict(n_routed_experts=6, n_shared_experts=1, num_experts_per_tok=2, moe_intermediate_size=48)
DEEP = dict(intermediate_size=64, out_hidden_size=64)
IMAGES = dict(image_token_id=IMAGE)
GEMMA_VISION = small_vit(0, patch_size=PATCH, num_key_value_heads=4, head_dim=16, pooling_kernel_size=2)
GEMMA_VISION |= dict(position_embedding_size=64, image_size=None)
GEMMA_MARKS = IMAGES | dict(video_token_id=VIDEO, boi_token_id=START, eoi_token_id=END)
GEMMA_MARKS |= dict(audio_token_id=zoo.VOCABULARY)  # sounds are not in these prompts
# of families whose configs are found by their names: vision encoder, decoder and fields of a small config
NEWER: dict[str, Callable[[], tuple[object, object, dict[str, object]]]] = {
    "qianfan_ocr": lambda: (intern_vision(), zoo.text_config("qwen3"), IMAGES | dict(image_seq_length=9)),
    "lighton_ocr": lambda: (pixtral(), zoo.text_config("qwen3"), IMAGES | dict(spatial_merge_size=2)),
    "cohere2_vision": lambda: (siglip(6), cohere2(), IMAGES | dict(downsample_factor=2, alignment_intermediate_size=128)),
    "qwen3_vl_moe": lambda: (
        packed_vision(**DEEP, deepstack_visual_indexes=[0, 1, 2], num_position_embeddings=64),
        mrope_text(6, head_dim=16, **EXPERTS, mlp_only_layers=[1]),
        MARKS,
    ),
    "qwen3_5": lambda: (packed_vision(**DEEP, num_position_embeddings=64), hybrid_text(), MARKS),
    "qwen3_5_moe": lambda: (
        packed_vision(**DEEP, num_position_embeddings=64),
        hybrid_text(**EXPERTS, shared_expert_intermediate_size=32),
        MARKS,
    ),
    "glm4v_moe": lambda: (packed_vision(**DEEP, image_size=8 * PATCH), mrope_text(head_dim=16, **ROUTED) | HALF, MARKS),
    "lfm2_vl": lambda: (
        small_vit(0, patch_size=PATCH, num_patches=64, vision_use_head=False),
        convolving_text(),
        IMAGES | dict(downsample_factor=2, projector_hidden_size=80),
    ),
    "llama4": lambda: (
        small_vit(84, intermediate_size=4 * 48, projector_input_dim=80, projector_output_dim=80, vision_output_dim=80),
        chunked_text(),
        dict(image_token_index=IMAGE, boi_token_index=START, eoi_token_index=END),
    ),
    "gemma4": lambda: (dict(GEMMA_VISION), layered_text(), GEMMA_MARKS),
    # all layers have keys and values of their own; in global ones the values are the keys; experts beside the MLPs
    "gemma4, apart": lambda: (
        dict(GEMMA_VISION),
        layered_text(
            **dict(num_kv_shared_layers=0, attention_k_eq_v=True, num_global_key_value_heads=1),
            **dict(enable_moe_block=True, num_experts=6, top_k_experts=2, moe_intermediate_size=48),
        ),
        GEMMA_MARKS,
    ),
    "paddleocr_vl": lambda: (small_vit(112), mrope_text(head_dim=16), MARKS),
    "ovis2": lambda: (
        small_vit(84, vocab_size=40, hidden_stride=2),
        zoo.text_config("qwen2"),
        IMAGES | dict(hidden_size=64, vocab_size=zoo.VOCABULARY, visual_indicator_token_ids=list(INDICATORS)),
    ),
    "glm46v": lambda: (
        packed_vision(**DEEP, image_size=8 * PATCH) | dict(model_type="glm4v_vision"),
        mrope_text() | dict(model_type="glm4v_text"),
        MARKS,
    ),
}


def parts_of(family: str) -> tuple[type[PreTrainedConfig], object, object, dict[str, object]]:
    """Of a small config: its class, vision encoder, decoder (of the kind that the family has) and fields."""
    llama, one = zoo.text_config("llama"), {"image_token_index": IMAGE}
    vit = small_vit(84)
    if family in NEWER:
        return CONFIG_MAPPING[family.split(",")[0]], *NEWER[family]()
    match family:
        case "llava":
            return LlavaConfig, zoo.clip_config(), llama, one
        case "vipllava":
            return VipLlavaConfig, clip(6, layers=5), llama, one | dict(vision_feature_layer=[-2, -4, 2])
        case "llava_next":  # the decoder has a window of 40 tokens
            return LlavaNextConfig, clip(6), zoo.text_config("mistral"), one | dict(image_grid_pinpoints=NEXT.pinpoints)
        case "llava_next_video":
            return LlavaNextVideoConfig, clip(6), llama, TOKENS | dict(image_grid_pinpoints=NEXT_VIDEO.pinpoints)
        case "llava_onevision":
            points = dict(image_grid_pinpoints=ONEVISION.pinpoints)
            return LlavaOnevisionConfig, siglip(5), zoo.text_config("qwen2"), TOKENS | points
        case "video_llava":
            return VideoLlavaConfig, clip(4), llama, TOKENS
        case "qwen2_vl":
            return Qwen2VLConfig, packed_vision(embed_dim=32, hidden_size=64, mlp_ratio=2), mrope_text(), MARKS
        case "qwen2_5_vl":
            windows = dict(window_size=4 * PATCH, fullatt_block_indexes=[1, 3], tokens_per_second=2)
            return Qwen2_5_VLConfig, packed_vision(**DEEP, **windows), mrope_text(), MARKS
        case "qwen3_vl":
            vision = packed_vision(**DEEP, deepstack_visual_indexes=[0, 1, 2], num_position_embeddings=64)
            return Qwen3VLConfig, vision, mrope_text(6, head_dim=16), MARKS
        case "glm4v":
            return Glm4vConfig, packed_vision(**DEEP, image_size=8 * PATCH), mrope_text(), MARKS
        case "internvl":
            return InternVLConfig, intern_vision(), zoo.text_config("qwen2"), dict(image_token_id=IMAGE, image_seq_length=9)
        case "gemma3":
            marks = dict(boi_token_index=START, eoi_token_index=END, mm_tokens_per_image=16)
            return Gemma3Config, siglip(8), windowed("gemma3", WINDOW), one | marks
        case "paligemma":
            return PaliGemmaConfig, siglip(8, projection_dim=64), zoo.text_config("gemma"), one | dict(projection_dim=64)
        case "idefics3":
            return Idefics3Config, vit, llama, dict(scale_factor=2, image_token_id=IMAGE, pad_token_id=zoo.PAD)
        case "smolvlm":
            return SmolVLMConfig, vit, llama, dict(scale_factor=2, image_token_id=IMAGE, pad_token_id=zoo.PAD)
        case "mistral3":
            return Mistral3Config, pixtral(), windowed("mistral", None), one | dict(spatial_merge_size=2)
        case "aya_vision":
            return AyaVisionConfig, siglip(6), cohere2(), one | dict(downsample_factor=2)
    raise KeyError(family)


@dataclass(frozen=True)
class Spec:
    """How prompts of a family look.

    Attributes
    ----------
    rows : the media of each row of the batch.
    lay : token ids of a medium, and what its placeholders stand for.
    shape : of the pixels of a medium.
    collate : pixels of all rows -> what the model takes.
    types : further inputs with one entry per token: "gemma" (1 = picture), "prefix" (0 = bidirectional), "mrope" (1 = picture,
        2 = video), or "typed", which are those of "gemma" by the name of those of "mrope".
    """

    rows: tuple[tuple[Medium, ...], ...]
    lay: Lay
    shape: Callable[[Medium], tuple[int, ...]]
    collate: Collate = stacked
    types: str = ""


def placed(medium: Medium) -> tuple[int, ...]:
    return (max(1, medium.frames), math.prod(medium.size), 3 * PATCH * PATCH)


def square(side: int) -> Callable[[Medium], tuple[int, ...]]:
    pixels = side * zoo.PATCH
    return lambda medium: (medium.frames, 3, pixels, pixels) if medium.frames else (3, pixels, pixels)


def tiled(side: int, *, whole: bool) -> Callable[[Medium], tuple[int, ...]]:
    return lambda medium: (tiles_of(medium, whole=whole), 3, side * zoo.PATCH, side * zoo.PATCH)


def patches(medium: Medium) -> tuple[int, ...]:
    return (max(1, medium.frames) * medium.size[0] * medium.size[1], 3 * 2 * PATCH * PATCH)


PICTURE, FILM = Medium(), Medium(frames=3)
ROWS = ((PICTURE,), (PICTURE, PICTURE), (), (PICTURE,))
PICTURED_ROWS = ((PICTURE,), (PICTURE, PICTURE), (PICTURE,))
MOVING_ROWS = ((PICTURE,), (FILM, PICTURE), (), (FILM,))
HALVES, QUARTERS = Medium((1, 2)), Medium((2, 2))  # tiles
TILED_ROWS = ((HALVES,), (PICTURE, HALVES), (), (QUARTERS,))
WIDE, TALL, LARGE = Medium((84, 150)), Medium((160, 90)), Medium((168, 168))  # pixels
NEXT_ROWS = ((WIDE,), (TALL, LARGE), (), (Medium((90, 160)),))
NEXT_VIDEO_ROWS = ((WIDE,), (FILM, TALL), (), (FILM,))
ONEVISION_ROWS = ((Medium((210, 280)),), (Medium((70, 70)), Medium((120, 140))), (), (Medium((100, 130)), FILM), (FILM,))
MISTRAL_ROWS = ((Medium((112, 84)),), (Medium((84, 84)), Medium((112, 140))), (), (Medium((84, 140)),))
GLM_ROWS = ((Medium((12, 8)),), (Medium((8, 8)), Medium((6, 12))), (), (Medium((8, 10)),))  # patches
SHAPED_ROWS = ((Medium((8, 8)),), (Medium((8, 8)), Medium((4, 16))), (), (Medium((8, 10)),))  # patches, too
LONG, SHORT = Medium((6, 8), frames=4), Medium((8, 8), frames=2)
PLACED_ROWS = ((Medium((8, 8)),), (Medium((8, 8)), Medium((4, 16))), (), (LONG, Medium((8, 10)), SHORT))
QWEN_ROWS = ((Medium((12, 8)),), (Medium((8, 8)), LONG), (), (SHORT,), (Medium((6, 12)), Medium((8, 10))))

SPECS: dict[str, Spec] = {
    "llava": Spec(ROWS, plain(8), square(8)),
    "vipllava": Spec(ROWS, plain(6), square(6)),
    "llava_next": Spec(NEXT_ROWS, NEXT.lay, NEXT.shape, NEXT.collate),
    "llava_next_video": Spec(NEXT_VIDEO_ROWS, NEXT_VIDEO.lay, NEXT_VIDEO.shape, NEXT_VIDEO.collate),
    "llava_onevision": Spec(ONEVISION_ROWS, ONEVISION.lay, ONEVISION.shape, ONEVISION.collate),
    "video_llava": Spec(MOVING_ROWS, plain(4, lead=1), square(4)),
    "qwen2_vl": Spec(QWEN_ROWS, packed(), patches, packed_patches(), "mrope"),
    "qwen2_5_vl": Spec(QWEN_ROWS, packed(), patches, packed_patches(seconds=1.5), "mrope"),
    "qwen3_vl": Spec(QWEN_ROWS, packed(timestamps=True), patches, packed_patches(), "mrope"),
    "glm4v": Spec(GLM_ROWS, framed(), patches, packed_patches(), "mrope"),
    "internvl": Spec(TILED_ROWS, tiles_in_one_run(3), tiled(6, whole=False)),
    "gemma3": Spec(ROWS, plain(4, (NEWLINE, START), (END, NEWLINE)), square(8), types="gemma"),
    "paligemma": Spec(PICTURED_ROWS, plain(8), square(8), types="prefix"),
    "idefics3": Spec(TILED_ROWS, tiles_apart(3, breaks=True), tiled(6, whole=True), padded_rows),
    "smolvlm": Spec(TILED_ROWS, tiles_apart(3, breaks=True), tiled(6, whole=True), padded_rows),
    "mistral3": Spec(MISTRAL_ROWS, lines(28), lambda medium: (3, *medium.size), padded_pictures),
    "aya_vision": Spec(TILED_ROWS, tiles_apart(3, breaks=False), tiled(6, whole=True)),
    "qianfan_ocr": Spec(TILED_ROWS, tiles_in_one_run(3), tiled(6, whole=False)),
    "lighton_ocr": Spec(MISTRAL_ROWS, in_pixels(28), lambda medium: (3, *medium.size), padded_pictures),
    "cohere2_vision": Spec(TILED_ROWS, tiles_with_breaks(3), tiled(6, whole=True)),
    "qwen3_vl_moe": Spec(QWEN_ROWS, packed(timestamps=True), patches, packed_patches(), "mrope"),
    "qwen3_5": Spec(QWEN_ROWS, packed(timestamps=True), patches, packed_patches(), "mrope"),
    "qwen3_5_moe": Spec(QWEN_ROWS, packed(timestamps=True), patches, packed_patches(), "mrope"),
    "gemma4": Spec(PLACED_ROWS, apart(2), placed, placed_patches, "typed"),
    "llama4": Spec(TILED_ROWS, tiles_with_separators(3), tiled(6, whole=True)),
    "paddleocr_vl": Spec(
        GLM_ROWS, packed(), lambda medium: (math.prod(medium.size), 3, zoo.PATCH, zoo.PATCH), packed_patches(), "mrope"
    ),
    "lfm2_vl": Spec(SHAPED_ROWS, in_pixels(2), lambda medium: (math.prod(medium.size), 3 * PATCH * PATCH), padded_patches),
    "ovis2": Spec(TILED_ROWS, tiles_with_indicators(3), tiled(6, whole=True)),
    "glm4v_moe": Spec(GLM_ROWS, framed(), patches, packed_patches(), "mrope"),
    "glm46v": Spec(GLM_ROWS, framed(), patches, packed_patches(), "mrope"),
}
SPECS["gemma4, apart"] = SPECS["gemma4"]
APART = ("gemma4, apart",)  # other models of a family
# with a time at each frame
STAMPED = ("qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "glm4v", "glm4v_moe", "glm46v", "gemma4")
LEVELS = {"qwen3_vl": 3, "qwen3_vl_moe": 3}  # decoder layers that still get features of the vision encoder
ONE_PLACEHOLDER = tuple(kind for kind, row in FAMILIES.items() if row.one_placeholder)  # of pictures and videos
# nothing can be cut inside these
UNCUT = (*(kind for kind, row in FAMILIES.items() if row.recurrent or row.uncut), "gemma4")
LATE = tuple(kind for kind, row in FAMILIES.items() if row.late)  # whose own beam search loses pictures
# those that the installed transformers can do
USABLE = [kind for kind, row in FAMILIES.items() if Version(transformers.__version__) >= Version(f"{row.since}.dev0")]
WORDS = ((3, 6), (2, 5), (9, 0), (8, 4), (5, 3))  # of each row: in front of the media, and behind each of them


def spread(model: PreTrainedModel) -> None:
    """Wider weights where a family's own initialisation leaves pictures without effect on the logits; norms unlike each other."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1 and parameter.std() < 0.1:
                parameter.normal_(std=0.2)
            elif parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))


@functools.cache
def saved(family: str) -> Path:
    """A folder with a random model of a family, written by ``save_pretrained``."""
    torch.manual_seed(0)
    kind, vision, text, fields = parts_of(family)
    model = AutoModelForImageTextToText.from_config(kind(vision_config=vision, text_config=text, **fields))
    spread(model)
    model.generation_config.update(pad_token_id=zoo.PAD, eos_token_id=None, bos_token_id=1)
    folder = Path(tempfile.mkdtemp(prefix="foveate-families-")) / family
    model.save_pretrained(folder)
    return folder


@functools.cache
def load(family: str) -> PreTrainedModel:
    """The model as a user loads it; one for all tests, which leave it as it is."""
    model = AutoModelForImageTextToText.from_pretrained(saved(family), attn_implementation="sdpa").eval()
    return running(model)


def decoder_of(model: PreTrainedModel) -> torch.nn.Module:
    """The language model without its head."""
    return model.language_model.model if model.config.model_type == "llama4" else model.get_decoder()


def running(model: PreTrainedModel) -> PreTrainedModel:
    """The model, with what Llama 4's forward misses in transformers 5.24.0: a field of its language model's output."""
    if model.config.model_type == "llama4":
        model.language_model.register_forward_hook(lambda _, __, output: setattr(output, "image_outputs", None))
    return model


def laid_row(family: str, media: Sequence[Medium]) -> list[Laid]:
    pictures = sum(not medium.frames for medium in media)
    return [SPECS[family].lay(medium, pictures) for medium in media]


def prompt(family: str, media: Sequence[Medium], before: int, after: int, seed: int) -> list[int]:
    """Token ids of a row; PaliGemma's processor puts pictures first, and nothing between them."""
    generator = torch.Generator().manual_seed(seed)

    def words(number: int) -> list[int]:
        return torch.randint(FIRST_WORD, zoo.VOCABULARY, (number,), generator=generator).tolist()

    parts = [laid.ids for laid in laid_row(family, media)]
    if SPECS[family].types == "prefix":
        return [*chain(*parts), 1, *words(before + after), NEWLINE]
    ids = [1, *words(before)]
    for part in parts:
        ids += part + words(after)
    return ids


def pixels(family: str, medium: Medium, seed: int) -> Tensor:
    strength = (1.0, 0.3, 2.0, 0.6)[seed % 4]
    return strength * torch.randn(SPECS[family].shape(medium), generator=torch.Generator().manual_seed(seed))


def inputs_of(family: str, ids: Sequence[list[int]], media: Sequence[Pixels], side: str = "left") -> dict[str, Tensor]:
    """What a processor returns for rows of token ids with media."""
    spec, inputs = SPECS[family], zoo.pad(ids, side)
    tokens = inputs["input_ids"]
    if any(media):
        inputs |= spec.collate(media)
    if spec.types == "gemma":
        inputs["token_type_ids"] = (tokens == IMAGE).long()
    elif spec.types == "prefix":
        inputs["token_type_ids"] = torch.zeros_like(tokens)
    elif spec.types == "typed":
        inputs["mm_token_type_ids"] = (tokens == IMAGE).int() + 2 * (tokens == VIDEO).int()
    elif spec.types == "mrope":
        films = family in ONE_PLACEHOLDER and any(medium.frames for row in media for medium, _ in row)
        inputs["mm_token_type_ids"] = (1 + films) * (tokens == IMAGE).int() + 2 * (tokens == VIDEO).int()
    return inputs


def generate(model: PreTrainedModel, inputs: dict[str, Tensor], new: int) -> Any:
    """``new`` greedy tokens with their logits; none of them stands for a picture."""
    return model.generate(
        **inputs,
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        suppress_tokens=[IMAGE, VIDEO],
        output_logits=True,
        return_dict_in_generate=True,
    )


def row_numbers(family: str) -> range:
    return range(len(SPECS[family].rows))


def batch(family: str, rows: Sequence[int] | None = None, side: str = "left") -> dict[str, Tensor]:
    """The rows of a family, or some of them with their own pictures, padded."""
    every = SPECS[family].rows
    rows = range(len(every)) if rows is None else rows
    ids = [prompt(family, every[row], *WORDS[row], seed=row) for row in rows]
    media = [[(medium, pixels(family, medium, 5 * row + n)) for n, medium in enumerate(every[row])] for row in rows]
    return inputs_of(family, ids, media, side)


def next_with_processor() -> Path:
    """A saved LLaVA-NeXT with its processor: tiles, and a prompt as long as its pictures are large."""
    words = ["<pad>", "<s>", "</s>", "<unk>", "user", "<image>", *(f"w{number}" for number in range(6, 128))]
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlavaNextImageProcessorPil, LlavaNextProcessor, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "additional_special_tokens": ["<image>"]}
    side = {"size": {"shortest_edge": 84}, "crop_size": {"height": 84, "width": 84}}
    processor = LlavaNextProcessor(
        image_processor=LlavaNextImageProcessorPil(**side, image_grid_pinpoints=NEXT.pinpoints),
        tokenizer=PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names, padding_side="right"),
        patch_size=14,
        num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
        chat_template="<s>{% for m in messages %}{% for p in m['content'] %}"
        "{% if p['type'] == 'image' %} <image>{% else %} {{ p['text'] }}{% endif %}{% endfor %}{% endfor %}",
    )
    folder = saved("llava_next")
    processor.save_pretrained(folder)
    return folder
