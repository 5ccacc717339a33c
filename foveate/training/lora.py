"""LoRA: low-rank adapters on the linear layers of a decoder, with the projector trained in full beside them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..engine.model.anatomy import Anatomy, anatomy
from ..errors import InputError, MissingExtraError

PARTS = ("module", "projector", "lora")  # what can be trained


def adapted(model: Any, rank: int, *, projector: bool = True, seed: int = 0) -> Any:
    """A model inside PEFT, with adapters that change nothing yet; everything else is frozen.

    Parameters
    ----------
    model : a supported model.
    rank : of the adapters; their scale is 2.
    projector : whether a copy of the projector is trained, too, where it works on each token by itself.
    seed : of the random half of the adapters; random numbers of others go on as they were.

    Raises
    ------
    MissingExtraError : PEFT is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise MissingExtraError("peft", "peft") from error
    parts = anatomy(model)
    whole = [parts.family.projector] if projector and parts.family.projector else None
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=decoder_linears(parts), modules_to_save=whole)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return get_peft_model(model, config)


def decoder_linears(parts: Anatomy) -> str:
    """A pattern for the names of all linear layers in the decoder's layers; those of a vision encoder may have the same endings."""
    layers: Any = parts.decoder.layers
    path = next(name for name, module in parts.model.named_modules() if module is layers)
    ends = {name.rpartition(".")[2] for name, module in layers.named_modules() if isinstance(module, nn.Linear)}
    return rf".*{re.escape(path)}\.\d+\..*\.({'|'.join(sorted(ends))})"


def save_adapter(model: Any, folder: Path, base: str) -> None:
    """Write an adapter (bfloat16 safetensors) in PEFT's format; ``base`` is the name of the model it belongs to."""
    weights = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(folder, state_dict=weights, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's form of a model card, not filled in


def checked_parts(names: tuple[str, ...], has_weights: bool) -> tuple[str, ...]:
    """What is to be trained; ``has_weights`` says whether the method can have weights.

    Raises
    ------
    InputError : there is no such part, or these cannot be trained together.
    """
    unknown = next((name for name in names if name not in PARTS), None)
    if unknown is not None or not names:
        raise InputError(f"--train {','.join(names)!r}: expected some of {', '.join(PARTS)}")
    if "module" in names and not has_weights:
        raise InputError("this method has no weights of its own. Train lora, or projector,lora.")
    if "projector" in names and "lora" not in names:
        raise InputError("the projector is saved in an adapter of LoRA: --train module,projector,lora")
    return names
