"""A model and its processor, ready for batches."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import InputError, first_line
from ..pocket import load_pocket
from .ledger import digest, fingerprint

POCKET = "pocket"


@dataclass(frozen=True)
class Loaded:
    """A model that several methods are run on, one after the other.

    Attributes
    ----------
    name : Hub id or folder; "pocket" is the shipped model.
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


def load(
    name: str = POCKET, *, dtype: str | None = None, device: str | torch.device | None = None, attention: str | None = None
) -> Loaded:
    """Load a model for evaluation.

    Parameters
    ----------
    name : Hub id or folder; "pocket" is the shipped model.
    dtype : such as "bfloat16"; None = as saved, for the pocket model float32.
    device : None = the first GPU where there is one.
    attention : implementation, such as "sdpa"; None = transformers' choice.

    Raises
    ------
    InputError : the model cannot be loaded; the message gives the reason.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    options: dict[str, Any] = {} if attention is None else {"attn_implementation": attention}
    try:
        if name == POCKET:
            model: Any
            model, processor = load_pocket(**options, **({} if dtype is None else {"dtype": dtype}))
        else:
            model = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype or "auto", **options)
            processor = AutoProcessor.from_pretrained(name)
        # what is quantised or spread over devices is where it belongs already
        if not getattr(model, "hf_device_map", None) and not getattr(model, "is_quantized", False):
            model = model.to(place)
    except InputError:
        raise
    except Exception as error:  # whatever a broken config, processor, weight file or device leads to
        raise InputError(f"the model {name!r} cannot be loaded: {first_line(error)}") from error
    return prepared(name, model.eval(), processor)


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
