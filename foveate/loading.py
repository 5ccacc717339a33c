"""The one loader of models: a Hub id, a folder, a shipped model or ``pocket+ADAPTER``; whole, or without layers of the decoder."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .engine.model.anatomy import anatomy
from .errors import FoveateError, InputError, MissingExtraError, first_line
from .fingerprint import digest, fingerprint
from .jsonl import parsed
from .places import user_path
from .pocket import ADAPTERS, MODELS, NAME

POCKET = NAME
ADAPTER = "adapter_config.json"
SPREAD = "auto"  # the device that stands for all of them


@dataclass(frozen=True)
class Loaded:
    """A model and its processor, as every command uses them.

    Attributes
    ----------
    name : Hub id or folder; "pocket" and "pocket-qwen" are shipped, "pocket+prumerge" is the first fine-tuned with that method.
    model, processor : stock Hugging Face classes; the processor pads on the left.
    """

    name: str
    model: Any
    processor: Any

    @functools.cached_property
    def weights(self) -> str:
        """A fingerprint of the model, its processor and how it generates, taken when first asked for."""
        processor = self.processor
        written = (processor.to_json_string(), str(getattr(processor, "chat_template", None)), str(len(processor.tokenizer)))
        return digest(fingerprint(self.model), self.model.generation_config.to_json_string(), *written)


def load(
    name: str = POCKET, *, dtype: str | None = None, device: str | torch.device | None = None, attention: str | None = None
) -> Loaded:
    """Load a model and its processor.

    Parameters
    ----------
    name : Hub id or folder, also one with an adapter of PEFT; "pocket" and "pocket-qwen" are shipped, "pocket+prumerge" is the
        first with its adapter for that method.
    dtype : such as "bfloat16"; None = as saved, for the pocket model float32.
    device : None = the first GPU where there is one; "auto" = spread over all of them, by accelerate.
    attention : implementation, such as "sdpa"; None = transformers' choice.

    Raises
    ------
    InputError : the model cannot be loaded; the message gives the reason.
    MissingExtraError : the model is an adapter, and PEFT is not installed.
    """
    options: dict[str, Any] = {} if attention is None else {"attn_implementation": attention}
    try:
        with quiet_loading(bars=not name.startswith(POCKET)):
            model, processor = _read(name, dtype, options | _spread(device))
            # what is quantised or spread over devices is where it belongs already
            if not getattr(model, "hf_device_map", None) and not getattr(model, "is_quantized", False):
                model = model.to(_place(device))
    except (FoveateError, KeyboardInterrupt):
        raise
    except ImportError as error:
        raise InputError(f"the model {name!r} needs another library: {first_line(error).partition('. ')[0]}") from error
    except Exception as error:  # whatever a broken config, processor, weight file or device leads to
        raise InputError(f"the model {name!r} cannot be loaded: {first_line(error)}") from error
    return prepared(name, model.eval(), processor)


def load_encoder(name: str = POCKET, *, dtype: str | None = None, device: str | None = None) -> Loaded:
    """Load a model without the layers of its decoder: pictures need its vision encoder, projector and word embeddings.

    Parameters
    ----------
    name, dtype, device : as for ``load``; an adapter is merged into its model.

    Raises
    ------
    InputError : the model cannot be loaded.
    """
    if is_adapter(name):
        return _without_layers(merged(load(name, dtype=dtype, device=device)))
    from transformers import AutoConfig

    try:
        with quiet_loading(bars=False):
            config = AutoConfig.from_pretrained(source_of(name))
            text = config.get_text_config()
            text.num_hidden_layers = 0
            if getattr(text, "layer_types", None):
                text.layer_types = []
            model, processor = _read_whole(name, dtype, {"config": config})
            model = model.to(_place(device))
    except FoveateError:
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
    return Loaded(name, model, processor)


def source_of(name: str) -> str:
    """The folder or Hub id that a name stands for.

    Raises
    ------
    InputError : there is no such shipped model, or no such folder.
    """
    if name in MODELS:
        return str(MODELS[name])
    if name.startswith(f"{POCKET}+"):
        folder = ADAPTERS / name.removeprefix(f"{POCKET}+")
        if folder.parent != ADAPTERS or not folder.is_dir():
            known = ", ".join(f"{POCKET}+{path.name}" for path in sorted(ADAPTERS.iterdir()))
            raise InputError(f"there is no model {name!r}. Shipped are {', '.join(MODELS)}, {known}.")
        return str(folder)
    if name.startswith((".", "/", "~")) and not user_path(name).exists():
        raise InputError(f"there is no folder {name}. Give {POCKET}, a folder that holds a model, or a Hub id.")
    return str(user_path(name)) if name.startswith("~") else name


def is_adapter(name: str) -> bool:
    """Whether a name is that of an adapter of PEFT."""
    return (Path(source_of(name)) / ADAPTER).is_file()


def base_of(folder: Path) -> str:
    """The model that an adapter in a folder belongs to.

    Raises
    ------
    InputError : the adapter does not say.
    """
    try:
        base = parsed((folder / ADAPTER).read_text(encoding="utf-8"))["base_model_name_or_path"]
        if not isinstance(base, str) or not base:
            raise ValueError("no name of a model")
        if user_path(base).resolve() == folder.resolve():
            raise ValueError("it names itself")
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = f"{ADAPTER} does not name its model ({type(error).__name__}: {first_line(error)})"
        raise InputError(f"the adapter {folder} cannot be loaded: {why}. Write it there, as base_model_name_or_path.") from error
    return base


def _place(device: str | torch.device | None) -> torch.device:
    device = None if device == SPREAD else device
    return usable_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def usable_device(device: str | torch.device) -> torch.device:
    """The device of a name.

    Raises
    ------
    InputError : there is no such device, or PyTorch cannot use it here.
    """
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(
            f"device {str(device)!r} cannot be used here. Use cpu or, where PyTorch finds a GPU, cuda or cuda:1."
        ) from error
    return place


def _spread(device: str | torch.device | None) -> dict[str, Any]:
    """Options that spread a model over all GPUs, where that is asked for and can be had."""
    from transformers.utils.import_utils import is_accelerate_available

    there = device == SPREAD and torch.cuda.is_available() and is_accelerate_available()
    return {"device_map": "auto"} if there else {}


def _read(name: str, dtype: str | None, options: dict[str, Any]) -> tuple[Any, Any]:
    """A model and its processor; those of an adapter are its base inside PEFT, and the processor of the base."""
    if not is_adapter(name):
        return _read_whole(name, dtype, options)
    try:
        from peft import PeftModel
    except ImportError as error:
        raise MissingExtraError("peft", "peft") from error
    folder = Path(source_of(name))
    model, processor = _read(base_of(folder), dtype, options)
    return PeftModel.from_pretrained(model, folder), processor


def _read_whole(name: str, dtype: str | None, options: dict[str, Any]) -> tuple[Any, Any]:
    """A model that is no adapter, with all of its weights, and its processor."""
    from transformers import AutoModelForImageTextToText

    from .frames import load_processor

    source, dtype = source_of(name), dtype or ("float32" if name in MODELS else "auto")
    found: Any = AutoModelForImageTextToText.from_pretrained(source, dtype=dtype, output_loading_info=True, **options)
    model, told = found
    missing = sorted(told["missing_keys"])
    if missing:
        raise InputError(f"the model {name!r} is incomplete: {len(missing)} weights are missing, {missing[0]} for one")
    return model, load_processor(source)


def merged(loaded: Loaded) -> Loaded:
    """A model with the adapter, if it has one, merged into its weights."""
    if not hasattr(loaded.model, "merge_and_unload"):
        return loaded
    return replace(loaded, model=loaded.model.merge_and_unload().eval())


def _without_layers(loaded: Loaded) -> Loaded:
    """A model without the layers of its decoder."""
    anatomy(loaded.model).decoder.layers = nn.ModuleList()
    loaded.model.config.get_text_config().num_hidden_layers = 0
    return loaded


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


@contextmanager
def quiet_loading(bars: bool = True) -> Iterator[None]:
    """Without the tables and retries that libraries report while they load, and without their progress ``bars`` if so wished.

    Errors still come.
    """
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    levels, shown = (logging.get_verbosity(), hub_logging.get_verbosity()), logging.is_progress_bar_enabled()
    if not bars:
        logging.disable_progress_bar()
    logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
        logging.set_verbosity(levels[0])
        hub_logging.set_verbosity(levels[1])
