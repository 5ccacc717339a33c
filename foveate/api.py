"""The front door: attach, encode, get, methods."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .engine.prompt import original_positions
from .engine.seams import has_pixels
from .engine.session import Session, shorten_prompt
from .errors import InputError
from .methods.base import TokenReducer, get, presets, registered
from .report import Clock, Report
from .tokens import Reduction


def attach(model: Any, method: str | TokenReducer, **fields: Any) -> Session:
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
    if isinstance(method, str):
        method = get(method, **fields)
    elif fields:
        raise InputError(f"fields ({', '.join(fields)}) can only be given with the name of a method, not with an instance")
    return Session(model, method).attach()


@dataclass(frozen=True)
class Encoded:
    """Pictures encoded and reduced, for an engine of your own.

    Attributes
    ----------
    embeds : per image, visual tokens [m_i, D] in the space of the decoder.
    reduction : which tokens stayed, for all images.
    inputs : the short prompt: ``input_ids``, ``attention_mask`` and ``position_ids`` [B, T'].
    report : as ``session.report``.
    """

    embeds: list[Tensor]
    reduction: Reduction | None
    inputs: dict[str, Tensor]
    report: Report


@torch.no_grad()
def encode(model: Any, method: str | TokenReducer, **inputs: Any) -> Encoded:
    """Encode pictures, reduce their visual tokens and shorten the prompt, without running the decoder.

    Parameters
    ----------
    model, method : as for ``attach``; nothing is attached.
    **inputs : what the processor returned: ``input_ids``, ``attention_mask``, ``pixel_values`` ...

    Raises
    ------
    InputError : there are no pictures, or placeholders and pictures do not fit.
    """
    session = Session(model, get(method) if isinstance(method, str) else method)
    parts, ids, mask = session.parts(), inputs.pop("input_ids", None), inputs.pop("attention_mask", None)
    if ids is None or not has_pixels(inputs):
        raise InputError("encode needs input_ids and pixel_values: pass what the processor returned for text and images")
    mask = torch.ones_like(ids) if mask is None else mask
    report = Report(session.method.settings(), 0, Clock(ids.device))
    short = shorten_prompt(parts, session.method, ids, mask, inputs, report, pad_left=bool((mask[:, 0] == 0).any()))
    positions = original_positions(mask.bool())
    if short.layout is not None:
        ids, mask = short.layout.take(ids, ids[:, :1]), short.layout.take(mask, 0)
        original = session.method.positions == "original"
        positions = short.layout.take(positions, 0) if original else original_positions(mask.bool())
    prompt = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    return Encoded(short.embeds, short.reduction, prompt, report)


@dataclass(frozen=True)
class MethodInfo:
    """One row of the table of methods."""

    name: str
    summary: str
    stage: str
    needs_cls: bool
    adaptive: bool
    presets: tuple[str, ...]
    paper: str


def methods() -> list[MethodInfo]:
    """All methods, by name: what each does, where it acts, what it needs, its paper."""
    found = []
    for name, cls in registered().items():
        example = cls() if cls.adaptive else cls(budget=1)
        summary = (cls.__doc__ or "").strip().splitlines()[0]
        found.append(
            MethodInfo(name, summary, cls.stage, bool(example.encoder_layers()), cls.adaptive, presets(cls), cls.reference)
        )
    return found
