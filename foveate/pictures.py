"""Pictures that are encoded once and reduced by any number of methods."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from .engine.call import Call, read, shorten
from .engine.model.anatomy import Anatomy, anatomy, innermost
from .engine.model.inputs import check_tensors
from .engine.model.seams import (
    PER_TOKEN_INPUTS,
    PRE_ENCODED,
    brings_pictures,
    check_pre_encoded_input,
    named_arguments,
    unturned,
    with_encodings,
)
from .engine.prompt.layout import original_positions
from .engine.prompt.shorten import PromptPictures, read_alone
from .engine.vision.encoding import Encodings
from .engine.vision.front import prepare
from .errors import InputError
from .methods.base import KeepAll, Method
from .methods.registry import get
from .report import Clock, Report
from .tokens import EncoderTap, Reduction


@dataclass(frozen=True)
class Encoded:
    """Pictures after reduction, for an inference engine of your own.

    Attributes
    ----------
    embeds : per image, visual tokens [m_i, D] in the space of the decoder.
    deepstack : per image [levels, m_i, D], features that the decoder adds to its visual tokens after each of its first layers
        (Qwen3-VL); a decoder without them answers differently, and the report warns of it. Empty for models that add none.
    reduction : which tokens stayed, for all images.
    inputs : the short prompt: ``input_ids``, ``attention_mask`` and ``position_ids`` [B, T'] (with M-RoPE [4, B, T']); empty where
        pictures came without a prompt.
    report : as ``session.report``.
    """

    embeds: list[Tensor]
    deepstack: list[Tensor]
    reduction: Reduction | None
    inputs: dict[str, Tensor]
    report: Report


class Pictures:
    """Pictures or videos of a call, encoded once and reduced as often as you like.

    Parameters
    ----------
    model : a supported model, wrapped or not. Nothing is attached to it.
    **inputs : what the processor returned. Without ``input_ids`` there is no prompt, and methods that read the question cannot act.

    Attributes
    ----------
    embeds : per image, all of its visual tokens [n_i, D].
    report : of keeping all of them.

    Raises
    ------
    InputError : there are no pictures among the inputs.
    UnsupportedModelError : the model is not supported.

    Examples
    --------
    >>> pictures = foveate.Pictures(model, **processor(images=images, text=prompts, return_tensors="pt"))
    >>> for budget in (64, 144, 288):
    ...     reduced = pictures.reduce("prumerge+", budget=budget)
    ...     print(reduced.report, [each.shape for each in reduced.embeds])
    >>> with foveate.FastV()(model):  # the encoder does not run again
    ...     out = model.generate(**pictures.inputs, max_new_tokens=64)

    Notes
    -----
    Queries and keys of an encoder layer are recorded when a method first asks for them; the pictures are encoded again then.
    Methods inside the encoder, and smaller pictures, need the encoder each time.
    """

    def __init__(self, model: Any, **inputs: Any) -> None:
        parts = anatomy(model)
        check_pre_encoded_input(parts.model)
        strange = [name for name in inputs if name not in _inputs_of(parts.model)]
        if strange:
            raise InputError(f"{strange[0]!r} is no input of this model. Fields of a method are given to reduce(...).")
        self._start(parts, named_arguments(parts.model.forward, (), inputs))

    @classmethod
    def of_parts(cls, parts: Anatomy, inputs: dict[str, Any], tap: Callable[[EncoderTap], EncoderTap] | None = None) -> Self:
        """Pictures of a model whose parts are found already; ``tap`` changes what was recorded of encoder layers."""
        made = cls.__new__(cls)
        made._start(parts, dict(inputs), tap)
        return made

    def _start(self, parts: Anatomy, arguments: dict[str, Any], tap: Callable[[EncoderTap], EncoderTap] | None = None) -> None:
        if not brings_pictures(arguments):
            raise InputError("there are no pictures: pass what the processor returned for text and images, pixel_values among them")
        self._parts, self._ids = parts, arguments.get("input_ids")
        check_tensors(self._ids, arguments)
        ids = torch.empty((0, 0), dtype=torch.long) if self._ids is None else self._ids
        self._call = read(parts, arguments, ids, arguments.get("attention_mask"))
        self._encodings = self._call.encodings or Encodings(self._call.pixels, tap)
        self._whole: Encoded | None = None

    @torch.no_grad()
    def reduce(self, method: str | Method, **fields: Any) -> Encoded:
        """What a method leaves of the pictures, and the shortened prompt.

        Parameters
        ----------
        method : a name as in ``foveate.methods()``, or an instance.
        **fields : hyper-parameters, where ``method`` is a name.

        Raises
        ------
        InputError : unknown method or field, or placeholders and pictures do not fit.
        UnsupportedModelError : the model lacks what the method needs.
        """
        method = built(method, fields)
        prepare(self._parts, method)
        call = Call(self._parts, self._call.arguments, self._call.ids, self._call.mask, self._call.pixels, self._encodings)
        return encoded_alone(call, method) if self._ids is None else encoded_call(call, method)

    @property
    def nbytes(self) -> int:
        """Of all that is kept in memory: pixels, visual tokens, and what methods had recorded of encoder layers so far."""
        return self._encodings.nbytes

    @property
    def embeds(self) -> list[Tensor]:
        """Per image, all of its visual tokens [n_i, D]."""
        return self._all.embeds

    @property
    def report(self) -> Report:
        """Of keeping all of them: what the encoder took, and the grids."""
        return self._all.report

    @property
    def inputs(self) -> dict[str, Any]:
        """Arguments for ``generate`` and ``forward``, with the encoded pictures instead of pixels.

        They work with and without a method attached. Give other ``input_ids`` to ask another question about the same pictures.
        """
        # sizes of the grids stay: (t, h, w) positions are made of them
        found = {name: value for name, value in self._call.arguments.items() if not name.startswith("pixel")}
        _ = self._all  # as the prompt has them
        outputs = {modality: self._encodings.output(self._parts.of(modality)) for modality in self._call.pixels}
        return {**found, PRE_ENCODED: {modality: with_encodings(out, self._encodings) for modality, out in outputs.items()}}

    @property
    def _all(self) -> Encoded:
        if self._whole is None:
            self._whole = self.reduce(KeepAll())
        return self._whole


def built(method: str | Method, fields: dict[str, Any]) -> Method:
    """A method from its name and fields, or the instance that was given.

    Raises
    ------
    InputError : fields were given with an instance, or the method is unknown.
    """
    if isinstance(method, str):
        return get(method, **fields)
    if fields:
        raise InputError(f"fields ({', '.join(fields)}) can only be given with the name of a method, not with an instance")
    return method


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
    inner = innermost(model)
    known = _inputs_of(inner)
    method = built(method, {name: value for name, value in inputs.items() if name not in known})
    parts = anatomy(inner)
    prepare(parts, method)
    check_pre_encoded_input(parts.model)
    arguments = named_arguments(type(inner).forward, (), {name: value for name, value in inputs.items() if name in known})
    ids = arguments.get("input_ids")
    if ids is None or not brings_pictures(arguments):
        raise InputError("encode needs input_ids and pixel_values: pass what the processor returned for text and images")
    check_tensors(ids, arguments)
    return encoded_call(read(parts, arguments, ids, arguments.get("attention_mask")), method)


def _inputs_of(model: Any) -> set[str]:
    """Names of what a model can be given."""
    return {*inspect.signature(type(model).forward).parameters, *PER_TOKEN_INPUTS}


def encoded_call(call: Call, method: Method) -> Encoded:
    """Pictures and the shortened prompt of a call."""
    parts, report = call.parts, _report(call.parts, method)
    with unturned(parts.model.base_model):
        short = shorten(call, method, report, pad_left=False)
    mask = short.mask
    positions = short.arguments().get("position_ids")
    positions = original_positions(mask.bool()) if positions is None else positions
    if not short.positions.given:
        positions = positions + parts.family.first_position * mask
    prompt = {"input_ids": short.ids, "attention_mask": mask, "position_ids": positions}
    return _encoded(call.parts, short.pictures, prompt, report)


def encoded_alone(call: Call, method: Method) -> Encoded:
    """Pictures that belong to no prompt.

    Raises
    ------
    InputError : the method reads the question.
    """
    front, report = method.before_decoder(), _report(call.parts, method)
    if front.reads_question:
        raise InputError(f"{front.name} reads the question, and these pictures came without a prompt. Pass input_ids, too.")
    pictures = read_alone(call, front, report)
    return _encoded(call.parts, pictures, {}, report)


def _encoded(parts: Anatomy, pictures: PromptPictures, prompt: dict[str, Tensor], report: Report) -> Encoded:
    if pictures.deepstack:
        levels = len(pictures.deepstack[0])
        report.warn(
            f"this decoder adds features of the vision encoder after its first {levels} layers: use deepstack beside embeds"
        )
    if parts.family.marks is not None:
        report.warn(f"this model replaces the embeddings of words beside pictures: those of {parts.family.marks} in its config")
    if getattr(parts.model.config.get_text_config(), "hidden_size_per_layer_input", 0):
        report.warn("the layers of this decoder look up embeddings by token, those of padding for placeholders, beside embeds")
    return Encoded(pictures.embeds, pictures.deepstack, pictures.reduction, prompt, report)


def _report(parts: Anatomy, method: Method) -> Report:
    warnings = [warning for part in method.trained() for warning in part.warnings]
    report = Report(method.settings(), parts.decoder_layers, Clock(parts.device), warnings=warnings, notes=method.notes())
    if method.inside_decoder() or method.first_tokens() is not None:
        report.warn(f"{method.name} also acts inside the decoder; encode does not run it")
    return report
