"""The pocket model before training: stock Hugging Face classes with an initialisation that shortens the training.

The initial values are ordinary weights inside the standard architecture; nothing of them needs code at inference:
a patch embedding that whitens patches of scenes, a sine-cosine position table, attention heads that begin by looking at the
neighbouring patches, and decoder heads that begin by copying from tokens with similar content.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from random import Random
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from .scenes import GRID, PATCH, SIDE, draw_scene
from .vocabulary import BOS, CHAT_TEMPLATE, EOS, IMAGE, PAD, VOCABULARY, build_tokenizer

PIXEL_MEAN, PIXEL_STD = 0.5, 0.25
POSITION_CHANNELS = 32
# (row, column) offsets that the heads of the first three encoder blocks begin by looking at
NEIGHBOURS = (((0, -1), (0, 1), (-1, 0), (1, 0)), ((0, -2), (0, 2), (-1, 0), (1, 0)), ((0, -1), (0, 1)))


def build_processor() -> LlavaProcessor:
    """Processor of the pocket model: 192 x 192 pixels, 576 image placeholders, the pocket tokenizer and chat template."""
    images = CLIPImageProcessor(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_mean=[PIXEL_MEAN] * 3,
        image_std=[PIXEL_STD] * 3,
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=build_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def pocket_config() -> LlavaConfig:
    """A LLaVA-1.5 in small: CLIP tower with [CLS], features of the block before the last, two-layer projector, Llama."""
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=PATCH,
        projection_dim=128,
        hidden_act="gelu_pytorch_tanh",
    )
    text = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=192,
        intermediate_size=384,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=6,
        rms_norm_eps=1e-5,
        max_position_embeddings=4096,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
        tie_word_embeddings=False,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        projector_hidden_act="gelu",
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=GRID * GRID,
        tie_word_embeddings=False,
    )


def build_model(seed: int = 0) -> LlavaForConditionalGeneration:
    """The untrained pocket model (float32); the caller's random state is left as it was."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(seed)
        model = LlavaForConditionalGeneration(pocket_config())
        spread_linear(model)
        _initialise_encoder(model.model.vision_tower, seed)
        _initialise_decoder(model.model.language_model)
        nn.init.zeros_(model.lm_head.weight)
    model.generation_config.update(bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, do_sample=False, max_new_tokens=16)
    return model


def _frequencies() -> Tensor:
    return 2.36 * (0.1 / 2.36) ** (torch.arange(8).float() / 7)


def _position_table(width: int) -> Tensor:
    """[1 + GRID * GRID, width]: sines and cosines of row and column in the first 32 channels; row 0 ([CLS]) is zero."""
    row, column = torch.meshgrid(torch.arange(GRID).float(), torch.arange(GRID).float(), indexing="ij")
    table = torch.zeros(1 + GRID * GRID, width)
    for axis, place in enumerate((row, column)):
        angle = place.flatten()[:, None] * _frequencies()
        table[1:, axis * 16 : axis * 16 + 16] = torch.cat([angle.sin(), angle.cos()], 1)
    return table


def _shift(row: int, column: int) -> Tensor:
    """[32, 32] rotation that turns the position channels of a patch into those of the patch ``row``, ``column`` further."""
    rotation = torch.zeros(POSITION_CHANNELS, POSITION_CHANNELS)
    for axis, step in enumerate((row, column)):
        cos, sin = (_frequencies() * step).cos(), (_frequencies() * step).sin()
        s = torch.arange(8) + axis * 16
        rotation[s, s], rotation[s, s + 8], rotation[s + 8, s + 8], rotation[s + 8, s] = cos, sin, cos, -sin
    return rotation


def spread_linear(model: nn.Module) -> None:
    """Weights of linear layers by what they read, and no biases."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.6 * module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def whitening(images: Iterable[tuple[NDArray[np.uint8], NDArray[np.bool_]]], channels: int) -> Tensor:
    """[channels, 3 * PATCH * PATCH] principal directions of patches, scaled to equal strength.

    Parameters
    ----------
    images : pictures [h, w, 3], and which of their patches count [h / PATCH * w / PATCH], those that show something.
    """
    patches = []
    for image, shown in images:
        rows, columns = image.shape[0] // PATCH, image.shape[1] // PATCH
        pixels = (torch.from_numpy(image).permute(2, 0, 1).float() / 255 - PIXEL_MEAN) / PIXEL_STD
        grid = pixels.view(3, rows, PATCH, columns, PATCH).permute(1, 3, 0, 2, 4).reshape(rows * columns, -1)
        patches.append(grid[torch.from_numpy(shown)])
    samples = torch.cat(patches)
    values, vectors = torch.linalg.eigh(samples.T @ samples / len(samples))
    values, vectors = values.flip(0), vectors.flip(1)
    return (vectors / (values + 2e-3 * values[0]).sqrt()).T[:channels]


def _scenes(seed: int) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.bool_]]]:
    random = Random(seed)
    for _ in range(500):
        scene = draw_scene(random, side=8, level=2)
        yield scene.image, scene.owner >= 0


def _initialise_encoder(tower: Any, seed: int) -> None:
    embeddings, width = tower.embeddings, tower.config.hidden_size
    head = width // tower.config.num_attention_heads
    nn.init.normal_(embeddings.class_embedding, std=0.02)
    embeddings.position_embedding.weight.copy_(_position_table(width) * 1.2)
    weight = embeddings.patch_embedding.weight
    nn.init.normal_(weight, std=0.06 * weight[0].numel() ** -0.5)
    weight[POSITION_CHANNELS:] = 0.75 * whitening(_scenes(seed), width - POSITION_CHANNELS).view(-1, *weight.shape[1:])
    for layer in tower.encoder.layers:
        layer.self_attn.out_proj.weight.mul_(0.5)
        layer.mlp.fc2.weight.mul_(0.3)
    strength = 2.3
    for layer, offsets in zip(tower.encoder.layers, NEIGHBOURS, strict=False):
        for h, offset in enumerate(offsets):
            rows = slice(h * head, (h + 1) * head)
            for projection, matrix in ((layer.self_attn.q_proj, _shift(*offset)), (layer.self_attn.k_proj, torch.eye(head))):
                projection.weight[rows] = 0
                projection.weight[rows, :POSITION_CHANNELS] = strength * matrix


def _initialise_decoder(decoder: Any) -> None:
    """Blocks start as the identity; three heads of the first two match content (in slow rotary channels) and copy it."""
    width, heads = decoder.config.hidden_size, decoder.config.num_attention_heads
    head = width // heads
    slow = [i for i in range(head) if i % (head // 2) >= head // 4]
    nn.init.normal_(decoder.embed_tokens.weight, std=0.5)
    for index, layer in enumerate(decoder.layers):
        attention = layer.self_attn
        nn.init.zeros_(attention.o_proj.weight)
        nn.init.zeros_(layer.mlp.down_proj.weight)
        for h in range(3 if index < 2 else 0):
            basis = torch.linalg.qr(torch.randn(width, width)).Q
            rows = torch.tensor(slow) + h * head
            attention.q_proj.weight[rows] += 1.5 * basis[: len(slow)]
            attention.k_proj.weight[rows] += 1.5 * basis[: len(slow)]
            copied = basis[50 : 50 + head]
            attention.v_proj.weight[h * head : (h + 1) * head] += 0.7 * copied
            attention.o_proj.weight[:, h * head : (h + 1) * head] += 0.7 * copied.T
