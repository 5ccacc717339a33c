"""A model and its processor, ready for batches."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .errors import InputError, MissingExtraError, first_line
from .fingerprint import digest, fingerprint
from .pocket import ADAPTERS, NAME, load_pocket

POCKET = NAME


@dataclass(frozen=True)
class Loaded:
    """A model that several methods are run on, one after the other.

    Attributes
    ----------
    name : Hub id or folder; "pocket" is the shipped model, "pocket+prumerge" the same fine-tuned with that method.
    model, processor : stock Hugging Face classes; the processor pads on the left.
    weights : a fingerprint of the model, its processor and how it generates.
    """

    name: str
    model: Any
    processor: Any
    weights: str


def own_device(device: str | None) -> str | None:
    """In one of several processes a device of its own, where none is asked for; the processes find each other here."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return device
    from accelerate import PartialState

    state = PartialState(cpu=device == "cpu" or not torch.cuda.is_available())
    return device or str(state.device)


def part() -> None:
    """Let the processes of ``own_device`` go: one that ended while another still talks to it would end both with an error."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def load(
    name: str = POCKET, *, dtype: str | None = None, device: str | torch.device | None = None, attention: str | None = None
) -> Loaded:
    """Load a model for evaluation.

    Parameters
    ----------
    name : Hub id or folder, also one with an adapter of PEFT; "pocket" is the shipped model, "pocket+prumerge" the same with its
        adapter for that method.
    dtype : such as "bfloat16"; None = as saved, for the pocket model float32.
    device : None = the first GPU where there is one.
    attention : implementation, such as "sdpa"; None = transformers' choice.

    Raises
    ------
    InputError : the model cannot be loaded; the message gives the reason.
    MissingExtraError : the model is an adapter, and PEFT is not installed.
    """
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    options: dict[str, Any] = {} if attention is None else {"attn_implementation": attention}
    try:
        model, processor = _read(name, dtype, options)
        # what is quantised or spread over devices is where it belongs already
        if not getattr(model, "hf_device_map", None) and not getattr(model, "is_quantized", False):
            model = model.to(place)
    except (InputError, MissingExtraError):
        raise
    except Exception as error:  # whatever a broken config, processor, weight file or device leads to
        raise InputError(f"the model {name!r} cannot be loaded: {first_line(error)}") from error
    return prepared(name, model.eval(), processor)


def _read(name: str, dtype: str | None, options: dict[str, Any]) -> tuple[Any, Any]:
    """A model and its processor; those of an adapter are its base inside PEFT, and the processor of the base."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    if name == POCKET:
        return load_pocket(**options, **({} if dtype is None else {"dtype": dtype}))
    folder = ADAPTERS / name.removeprefix(f"{POCKET}+") if name.startswith(f"{POCKET}+") else Path(name)
    if folder.parent == ADAPTERS and not folder.is_dir():
        known = ", ".join(f"{POCKET}+{path.name}" for path in sorted(ADAPTERS.iterdir()))
        raise InputError(f"there is no model {name!r}. Shipped are {POCKET}, {known}.")
    if not (folder / "adapter_config.json").is_file():
        model = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype or "auto", **options)
        return model, AutoProcessor.from_pretrained(name)
    try:
        from peft import PeftModel
    except ImportError as error:
        raise MissingExtraError("peft", "peft") from error
    base = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base:
        raise InputError(f"{folder / 'adapter_config.json'} does not name its model. Write it there, as base_model_name_or_path.")
    model, processor = _read(base, dtype, options)
    return PeftModel.from_pretrained(model, folder), processor


def prepared(name: str, model: Any, processor: Any) -> Loaded:
    """A model and a processor that are in memory; the processor is changed to pad on the left.

    Raises
    ------
    InputError : what is called a processor has no tokenizer.
    """
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is None:
        raise InputError(f"the processor of {name!r} has no tokenizer. Give a folder or Hub id that holds the whole processor.")
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    written = (processor.to_json_string(), str(getattr(processor, "chat_template", None)), str(len(tokenizer)))
    return Loaded(name, model, processor, digest(fingerprint(model), model.generation_config.to_json_string(), *written))
