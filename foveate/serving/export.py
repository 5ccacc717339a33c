"""Writes the language model of a vision-language model as a plain causal LM that reads visual tokens as embeddings."""

from __future__ import annotations

import json
import shutil
import tempfile
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.model.anatomy import Anatomy, anatomy, decoder_of
from ..engine.model.late import mended
from ..engine.vision.front import prepare
from ..errors import InputError
from ..jsonl import parsed
from ..loading import Loaded, is_adapter, load, merged, quiet_loading
from ..methods.base import Method
from ..methods.trained import Trained
from ..places import ready_folder, user_path, writing
from .conversations import ExportError, check_conversations
from .files import fingerprint
from .handover import Handover, ImageEmbeds, PromptEmbeds, handover_of
from .template import PLACEHOLDER, chat_template, placeholder

MARK, METHOD = "foveate_export.json", "method"
# settings of a tokenizer that are of its processor, or of the place it was loaded from
STALE = ("chat_template", "processor_class", "image_token", "model_specific_special_tokens", "is_local", "local_files_only")


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes
    ----------
    source : Hub id or folder of the vision-language model.
    files : a fingerprint of its files.
    architecture : the class of what was written.
    width : of its embeddings.
    dtype : of its weights.
    parameters : how many there are.
    logit_difference : to the language model in its place, the largest over a text and over embeddings; 0 for a whole model.
    conversations : how many were compared, token by token, with what the processor makes of them.
    no_chat : why there is no chat template, "" where there is one; without it, prompts have to come as tokens.
    foveate : version that wrote it.
    method : whose weights are in the folder ``method`` beside, with their digest; "" = none are.
    handover : how vLLM gets visual tokens (a name in ``handover.HANDOVERS``).
    """

    source: str
    files: str
    architecture: str
    width: int
    dtype: str
    parameters: int
    logit_difference: float
    conversations: int
    no_chat: str
    foveate: str
    method: str = ""
    handover: str = PromptEmbeds.name


def export(name: str, out: Path, *, dtype: str | None = None, method: Method | None = None) -> Exported:
    """Write the language model of a checkpoint as a folder for vLLM: weights, tokenizer, chat template.

    Where a chat template of the model writes a picture, the new one writes the word for embeddings in a prompt of vLLM,
    ``<prompt_embeds>``; and it writes the first token of a prompt, if the processor does. Models whose visual tokens have (t, h, w)
    positions are written whole, as they are: vLLM knows these positions of the whole model only.

    Parameters
    ----------
    name : as for ``foveate.loading.load``; an adapter is merged into its model.
    out : a folder that is new, empty, or an earlier export.
    dtype : of the weights; None = as saved.
    method : with weights of its own, which are written into the folder ``method`` there; None = none are.

    Raises
    ------
    InputError : the model cannot be loaded, ``out`` holds something else, or the method has no weights or those of another model.
    UnsupportedModelError : its language model needs more than vLLM can be handed.
    ExportError : what was written does not do what the model does; nothing is left in ``out`` then.
    """
    out = user_path(out)
    check_folder(out)
    ready_folder(out.parent)
    with quiet_loading(bars=False):
        loaded = merged(load(name, dtype=dtype, device="cpu"))
    model, parts = loaded.model, anatomy(loaded.model)
    handover = handover_of(parts)
    if getattr(model, "is_quantized", False):
        raise InputError(f"the weights of {name!r} are quantised. Export the unquantised model, and let vLLM quantise it.")
    if method is not None and method.made_for is not None and not method.trained():
        prepare(parts, method)  # a plan without weights: that it is for this model is all there is to check
        method = None
    if method is not None:
        _check_method(parts, method, is_adapter(name))
    with writing(out):
        return _written(loaded, handover, name, out, method)


def parts_of(method: Method | None) -> tuple[Trained, ...]:
    """Those with weights."""
    return () if method is None else method.trained()


def _check_method(parts: Anatomy, method: Method, merged: bool) -> None:
    """Raise ``InputError`` unless a method has weights, and those of this model, whose adapter may be merged."""
    prepare(parts, method)
    if len(parts_of(method)) != 1:
        raise InputError(f"{method.name} has no weights, or several, and one folder is exported. Name it when you serve.")
    strange = [warning for part in parts_of(method) for warning in part.warnings if not (merged and "adapter" in warning)]
    if strange:
        raise InputError(strange[0])


def _written(loaded: Loaded, handover: Handover, name: str, out: Path, method: Method | None) -> Exported:
    """The folder, which is there in whole or not at all."""
    from .. import __version__

    made = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        with quiet_loading(bars=False):
            model, difference, no_chat, number = WRITERS[handover.name](loaded, handover.parts, made)
        for part in parts_of(method):
            part.save_pretrained(made / METHOD)
        told = Exported(
            source=name,
            files=fingerprint(name),
            architecture=type(model).__name__,
            width=handover.parts.model.config.get_text_config().hidden_size,
            dtype=str(model.dtype).removeprefix("torch."),
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            logit_difference=difference,
            conversations=number,
            no_chat=no_chat,
            foveate=__version__,
            method=" ".join(f"{part.name} {part.settings()['weights']}" for part in parts_of(method)),
            handover=handover.name,
        )
        (made / MARK).write_text(json.dumps(asdict(told), indent=1) + "\n")
        for path in (made, *made.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)  # the engine may run as somebody else
        if out.exists():
            shutil.rmtree(out)
        made.rename(out)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return told


def _write_text(loaded: Loaded, parts: Anatomy, folder: Path) -> tuple[Any, float, str, int]:
    """Write the language model; it, the largest difference of logits, why there is no chat template, compared conversations."""
    from transformers import AutoTokenizer

    text = language_model(parts)
    running: AbstractContextManager[Any] = nullcontext() if parts.family.late is None else mended(parts.model)
    with running:
        difference = compared(parts.model, text)
    text.save_pretrained(folder)
    no_chat, number = write_tokenizer(loaded.processor, folder), 0
    if not no_chat:
        if AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids(PLACEHOLDER) != parts.placeholders["image"]:
            raise ExportError(f"the written tokenizer does not read {PLACEHOLDER} as the placeholder of pictures")
        number = check_conversations(loaded.processor, folder, {"type": "text", "text": PLACEHOLDER})
    return text, difference, no_chat, number


def _write_whole(loaded: Loaded, parts: Anatomy, folder: Path) -> tuple[Any, float, str, int]:
    """The same for a whole model, which is written as it is."""
    parts.model.save_pretrained(folder)
    loaded.processor.save_pretrained(folder)
    return parts.model, 0.0, "", check_conversations(loaded.processor, folder, {"type": "image"})


WRITERS = {PromptEmbeds.name: _write_text, ImageEmbeds.name: _write_whole}


def check_folder(out: Path) -> None:
    """Refuse to write over anything but an earlier export.

    Raises
    ------
    InputError : there is something else.
    """
    if out.exists() and not (out.is_dir() and ((out / MARK).is_file() or not any(out.iterdir()))):
        raise InputError(f"{out} exists and is no export of foveate. Give the name of a new folder.")


def described(folder: Path) -> Exported:
    """What an export says of itself.

    Raises
    ------
    InputError : the folder is no export.
    """
    try:
        return Exported(**parsed((folder / MARK).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{folder} is no export. Write one with 'foveate export MODEL {folder}'.") from error


def ready_export(name: str, folder: Path | None = None, *, dtype: str | None = None) -> Path:
    """An export of a model: the one that is there, or a new one.

    Parameters
    ----------
    name : as for ``export``.
    folder : where it is, or is to be; None = a place of its own in the cache of the user.

    Raises
    ------
    InputError : the folder holds an export of another model, of other weights or in another dtype, or something else.
    """
    mark = fingerprint(name)
    if folder is None:
        folder = user_path("~/.cache/foveate/exports") / "-".join([Path(name).name, *([dtype] if dtype else []), mark[:12]])
    if not (folder / MARK).is_file():
        export(name, folder, dtype=dtype)
    told = described(folder)
    if told.files != mark:
        what = "whose weights or settings are others now" if told.source == name else f"and not of {name!r}"
        raise InputError(f"{folder} is an export of {told.source!r}, {what}. Give another folder, or remove it.")
    if dtype not in (None, told.dtype):
        raise InputError(f"{folder} is an export in {told.dtype} and not in {dtype}. Give another folder, or remove it.")
    return folder


def language_model(parts: Anatomy) -> Any:
    """The language model with its head, as a causal LM of its own that shares the weights.

    Raises
    ------
    ExportError : transformers has no causal LM of this kind, or its weights have other names.
    """
    from transformers import AutoModelForCausalLM

    model = parts.model
    config = model.config.get_text_config()
    head, words = model.get_output_embeddings(), model.get_input_embeddings()
    if not isinstance(head, nn.Linear):
        raise ExportError(f"the head of the language model is no linear layer but a {type(head).__name__}. Load the plain weights.")
    tied = head.weight is words.weight
    config = type(config).from_dict({**config.to_dict(), "tie_word_embeddings": tied})
    try:
        with torch.device("meta"):
            text = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    except ValueError as error:
        raise ExportError(f"transformers has no causal LM for the {config.model_type!r} language model of this model.") from error
    decoder, inner = decoder_of(model), decoder_of(text)
    place = next(name for name, module in text.named_modules() if module is inner)
    state = {f"{place}.{name}": value for name, value in decoder.state_dict().items()}
    state |= {f"lm_head.{name}": value for name, value in head.state_dict().items()}
    expected = {name for name, _ in text.named_parameters(remove_duplicate=False)}
    if expected - state.keys() or state.keys() - expected - {name for name, _ in text.named_buffers()}:
        odd = sorted((expected - state.keys()) | (state.keys() - expected))
        raise ExportError(f"{type(text).__name__} has other weights than the language model of this model: {odd[0]} for one.")
    text.load_state_dict(state, strict=False, assign=True)
    for buffered in (module for module in text.modules() if any(buffer.is_meta for buffer in module.buffers(recurse=False))):
        # computed from the config and not saved, such as rotary frequencies
        twin = next(own for own in decoder.modules() if type(own) is type(buffered))
        for key, value in twin.named_buffers(recurse=False):
            buffered.register_buffer(key, value, persistent=False)
    text.tie_weights()
    text.generation_config = model.generation_config
    return text.eval()


@torch.no_grad()
def compared(model: Any, text: Any) -> float:
    """The largest difference of logits between a language model in its place and alone, over word ids and over embeddings.

    Raises
    ------
    ExportError : it is more than rounding.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, text.config.vocab_size, (2, 17), generator=generator)
    embeds: Tensor = text.get_input_embeddings()(ids)
    mixed = embeds + embeds.std() * torch.randn(embeds.shape, generator=generator).to(embeds)
    # the placeholder among random words would ask for a picture
    ids = ids.masked_fill(ids == model.config.image_token_id, (model.config.image_token_id + 1) % text.config.vocab_size)
    pairs = (
        (model(input_ids=ids).logits, text(input_ids=ids).logits),
        (model(inputs_embeds=mixed).logits, text(inputs_embeds=mixed).logits),
    )
    difference = max(float((own - alone).abs().max()) for own, alone in pairs)
    scale = float(pairs[0][0].abs().max())
    if not difference <= 10 * torch.finfo(text.dtype).eps * max(scale, 1.0):
        raise ExportError(f"the language model alone gives other logits than in its place: they differ by {difference:.3g}.")
    return difference


def write_tokenizer(processor: Any, folder: Path) -> str:
    """Write tokenizer and chat template, in which the word for a picture is the word for embeddings.

    The placeholder keeps its id, so that it stays inside the vocabulary of the model.

    Returns
    -------
    Why there is no chat template, "" where there is one.

    Raises
    ------
    ExportError : the tokenizer has no file of the tokenizers library, or its placeholder is no token.
    """
    tokenizer, token = processor.tokenizer, placeholder(processor)
    tokenizer.save_pretrained(folder)
    for stale in ("chat_template.jinja", "processor_config.json"):
        (folder / stale).unlink(missing_ok=True)
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise ExportError(f"{type(tokenizer).__name__} has no tokenizer.json. Load the processor with use_fast=True and save it.")
    saved = json.loads(file.read_text(encoding="utf-8"))
    added = [entry for entry in saved["added_tokens"] if entry["content"] == token]
    if not added:
        raise ExportError(f"the tokenizer does not know {token!r}, which stands for a picture, as a special token.")
    for entry in added:
        entry["content"] = PLACEHOLDER
    vocabulary = saved["model"].get("vocab")
    if isinstance(vocabulary, dict) and token in vocabulary:
        saved["model"]["vocab"] = {PLACEHOLDER if word == token else word: number for word, number in vocabulary.items()}
    file.write_text(json.dumps(saved, ensure_ascii=False), encoding="utf-8")
    config = folder / "tokenizer_config.json"
    settings = _renamed(json.loads(config.read_text(encoding="utf-8")), token)
    for name in STALE:
        settings.pop(name, None)
    config.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    try:
        (folder / "chat_template.jinja").write_text(chat_template(processor), encoding="utf-8")
    except InputError as error:
        return str(error)
    return ""


def _renamed(value: Any, token: str) -> Any:
    """A setting in which the placeholder has its new name."""
    if isinstance(value, dict):
        return {name: _renamed(each, token) for name, each in value.items()}
    if isinstance(value, list):
        return [_renamed(each, token) for each in value]
    return PLACEHOLDER if value == token else value
