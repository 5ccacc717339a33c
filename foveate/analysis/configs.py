"""The architecture of a model from its config. No weights are needed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import InputError, first_line
from ..families import FAMILIES
from ..places import user_path
from .architecture import Architecture
from .decoders import read_decoder
from .projectors import read_projectors
from .towers import read_tower

LLAVA = {"llava-1.5-7b": (4096, 11008, 32), "llava-1.5-13b": (5120, 13824, 40)}
"""Width, inner width, and layers = heads of the decoders of LLaVA-1.5, whose vision encoder is what ``LlavaConfig`` brings."""


def _llava(name: str) -> Any:
    from transformers import LlamaConfig, LlavaConfig

    width, inner, layers = LLAVA[name]
    text = LlamaConfig(
        hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=layers, vocab_size=32064
    )
    config = LlavaConfig(text_config=text)
    config._name_or_path = name
    return config


def read_config(model: Any) -> Any:
    """The config of a model, a config itself, one of ``LLAVA``, or one from the Hub, a folder or a JSON file.

    Raises
    ------
    InputError : there is none, or it cannot be read.
    """
    if not isinstance(model, str | Path):
        config = getattr(model, "config", model)
        if not hasattr(config, "get_text_config"):
            raise InputError(f"{type(model).__name__} has no config. Give a model, a config, a Hub id, a folder or a config file.")
        return config
    if model in LLAVA:
        return _llava(str(model))
    from transformers import AutoConfig

    path = user_path(model)
    if (str(model).startswith((".", "/", "~")) or path.suffix == ".json") and not path.exists():
        raise InputError(f"there is no {model}")
    try:
        return AutoConfig.from_pretrained(str(path) if path.exists() else str(model))
    except Exception as error:  # whatever the Hub, the disk and broken files lead to
        raise InputError(f"the config of {str(model)!r} cannot be read: {first_line(error)}") from error


def _tied(model: Any, config: Any) -> bool:
    """Whether the head shares the embeddings: as a model has it, whose checkpoint may know better than its config."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None:
        return bool(getattr(config, "tie_word_embeddings", False))
    return head.weight is model.get_input_embeddings().weight


def read_architecture(model: Any) -> Architecture:
    """The shapes of a model.

    Parameters
    ----------
    model : a model, its config, one of ``LLAVA``, a Hub id, a folder, or a config file. An architecture is returned as it is.

    Raises
    ------
    InputError : the config cannot be read.
    UnsupportedModelError : a part of it is of a kind whose cost is not known; the message says which.
    """
    if isinstance(model, Architecture):
        return model
    config = read_config(model)
    kind = config.model_type
    name, tied = getattr(config, "_name_or_path", "") or kind, _tied(model, config)
    if getattr(config, "vision_config", None) is None:
        return Architecture(name, read_decoder(config, tied))
    projectors = read_projectors(config)
    tower = read_tower(config.vision_config)
    family = FAMILIES[kind]
    if family.video_tower is not None:  # one encoder for pictures, one for frames
        tower = replace(tower, copies=2)
    # small models of a family may read from left to right only, where others do not
    two_way = family.two_way and getattr(config.get_text_config(), "use_bidirectional_attention", True) is not None
    decoder = read_decoder(config, tied, causal=not two_way)
    whole = getattr(config, "vision_feature_select_strategy", "default") == "full"
    tokens = None
    if tower.patches is not None:
        seen = tower.patches + whole * tower.prefix
        tokens = getattr(config, "mm_tokens_per_image", seen // projectors[0].merge)
    return Architecture(name, decoder, tower, projectors, tokens)
