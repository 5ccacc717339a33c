"""The front door: attach, detach, encode, get, methods."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from .engine.model.anatomy import innermost
from .engine.model.families import FAMILIES, TOWERS
from .engine.model.seams import PER_TOKEN_INPUTS, has_pixels, renamed, unturned
from .engine.prompt.layout import filler, original_positions
from .engine.prompt.positions import Positions
from .engine.prompt.shorten import shorten_prompt
from .engine.session import Session
from .errors import InputError
from .methods.base import Method
from .methods.registry import get
from .report import Report
from .tokens import Reduction


def attach(model: Any, method: str | Method, **fields: Any) -> Session:
    """Attach a method to a model until ``detach()``.

    Parameters
    ----------
    model : a Hugging Face vision-language model, also inside PEFT, ``torch.compile`` or accelerate wrappers. It stays the same
        object; its ``generate`` and ``forward`` are called as before.
    method : a name as in ``foveate.methods()``, or an instance.
    **fields : hyper-parameters, where ``method`` is a name.

    Returns
    -------
    The handle: ``handle.report`` tells what the last call did, ``handle.detach()`` restores the model.

    Raises
    ------
    InputError : unknown method or field, or a method is attached already.
    UnsupportedModelError : the model, or what the method needs of it, is not supported. The model is unchanged then.
    """
    return Session(model, _built(method, fields)).attach()


def _built(method: str | Method, fields: dict[str, Any]) -> Method:
    if isinstance(method, str):
        return get(method, **fields)
    if fields:
        raise InputError(f"fields ({', '.join(fields)}) can only be given with the name of a method, not with an instance")
    return method


@dataclass(frozen=True)
class Encoded:
    """Pictures encoded and reduced, for an engine of your own.

    Attributes
    ----------
    embeds : per image, visual tokens [m_i, D] in the space of the decoder.
    reduction : which tokens stayed, for all images.
    inputs : the short prompt: ``input_ids``, ``attention_mask`` and ``position_ids`` [B, T'] (with M-RoPE [4, B, T']).
    report : as ``session.report``.
    """

    embeds: list[Tensor]
    reduction: Reduction | None
    inputs: dict[str, Tensor]
    report: Report


@torch.no_grad()
def encode(model: Any, method: str | Method, **inputs: Any) -> Encoded:
    """Encode pictures, reduce their visual tokens and shorten the prompt, without running the decoder.

    Parameters
    ----------
    model, method : as for ``attach``; nothing is attached.
    **inputs : what the processor returned: ``input_ids``, ``attention_mask``, ``pixel_values`` ...; and fields of the method, where
        that is a name.

    Raises
    ------
    InputError : there are no pictures, placeholders and pictures do not fit, or an argument is neither an input of the model nor a
        field of the method.
    """
    known = {*inspect.signature(type(innermost(model)).forward).parameters, *PER_TOKEN_INPUTS}
    fields = {name: inputs.pop(name) for name in list(inputs) if name not in known}
    session = Session(model, _built(method, fields))
    parts, ids, mask = session.parts(), inputs.pop("input_ids", None), inputs.pop("attention_mask", None)
    if ids is None or not has_pixels(inputs):
        raise InputError("encode needs input_ids and pixel_values: pass what the processor returned for text and images")
    mask = torch.ones_like(ids) if mask is None else mask
    renamed(inputs)
    given, numbered = inputs.get("position_ids"), Positions(parts, session.front.positions == "compact")
    report = session.new_report()
    with unturned(parts.model.base_model):
        numbered.of_prompt(ids, mask, 0, inputs)
        short = shorten_prompt(parts, session.method, ids, mask, inputs, report, pad_left=bool((mask[:, 0] == 0).any()))
    if short.layout is not None:
        fill = filler(ids, mask, parts.visual(ids))
        numbered.follow(short.layout, mask, inputs)
        ids, mask = short.layout.take(ids, fill), inputs["attention_mask"]
    positions = inputs.get("position_ids")
    positions = original_positions(mask.bool()) if positions is None else positions
    positions = positions if given is not None else positions + parts.family.first_position * mask
    if session.method.inside_decoder():
        report.warnings.append(f"{session.method.name} also acts inside the decoder; encode does not run it")
    prompt = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    return Encoded(short.embeds, short.reduction, prompt, report)


@dataclass(frozen=True)
class ModelInfo:
    """One row of the table of models: a family, and what works on it.

    Attributes
    ----------
    name, model_type, example : the family, ``config.model_type``, and the Hub id of one of its models.
    images, videos : whether its pictures, and its videos, can be reduced.
    merging : where methods merge tokens, in front of the projector or behind it.
    in_encoder : whether methods can act inside the vision encoder.
    reads_cls : whether the encoder has a [CLS] token; elsewhere methods take the substitute that the report names.
    positions : "1-D", or "(t, h, w)".
    notes : what is different from what one may expect.
    test : what proves it.
    """

    name: str
    model_type: str
    example: str
    images: bool
    videos: bool
    merging: str
    in_encoder: bool
    reads_cls: bool
    positions: str
    notes: str
    test: str


def models() -> list[ModelInfo]:
    """All families of models, and what works on each; every method before the projector and inside the decoder works on all."""
    found = []
    for kind, family in FAMILIES.items():
        config = AutoConfig.for_model(kind)
        one_layer = isinstance(getattr(config, "vision_feature_layer", -1), int)
        notes = [family.notes] if family.notes else []
        notes += ["cuts from the layer behind the deepstack layers on"] if kind == "qwen3_vl" else []
        found.append(
            ModelInfo(
                name=family.name,
                model_type=kind,
                example=family.example,
                images=True,
                videos=family.videos is not None,
                merging="behind the projector" if family.projector is None else "in front of the projector",
                in_encoder=family.shrinkable and one_layer,
                reads_cls=TOWERS[config.vision_config.model_type].has_cls,
                positions="(t, h, w)" if family.mrope else "1-D",
                notes="; ".join(notes),
                test=f"tests/test_families.py -k {kind}-",
            )
        )
    return found
