"""One timed ``generate``, with a method or without, and what it leaves in memory."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..engine.cache_size import cache_bytes
from ..engine.install import installed_on
from ..engine.model.anatomy import Anatomy, anatomy
from ..engine.model.seams import find_cache, modalities
from ..errors import InputError
from ..methods.base import Method
from ..report import Clock, Report

PARTS = ("vision", "selection", "prefill", "decode", "first token", "end to end")
"""What is timed, in seconds.

- ``vision``: vision encoder and projector. Methods inside the encoder choose within it.
- ``selection``: choosing and merging, wherever it happens outside of the encoder.
- ``prefill``: the decoder reads the prompt, up to the first logits; choosing tokens inside the decoder is in it.
- ``decode``: one further token, on average over all of them.
- ``first token``: from the call of ``generate`` to the first logits.
- ``end to end``: all of ``generate``. The processor, which is the same for all methods, is not in it.
"""


def repeated(inputs: Mapping[str, Any], batch: int) -> dict[str, Any]:
    """The inputs of one prompt, ``batch`` times: rows, pictures, patches and grids all lie along the first dimension."""
    return {name: torch.cat([value] * batch) if isinstance(value, Tensor) else value for name, value in inputs.items()}


def check_one_device(model: Any) -> torch.device:
    """The device that all of a model is on.

    Raises
    ------
    InputError : there are several, or it is of a kind whose time cannot be taken here.
    """
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) != 1:
        names = ", ".join(sorted(map(str, devices)))
        raise InputError(
            f"the model lies on several devices ({names}). Put all of it on one: --device cuda, or CUDA_VISIBLE_DEVICES=0."
        )
    device = devices.pop()
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"time is taken on cpu and cuda; the model is on {device}")
    return device


@dataclass(frozen=True)
class Sample:
    """One run.

    Attributes
    ----------
    seconds : by the names of ``PARTS``, as far as they ran.
    peak : bytes allocated on the GPU at the peak, weights included; None on a CPU.
    """

    seconds: dict[str, float]
    peak: int | None


@dataclass(frozen=True)
class Inspected:
    """What a run leaves behind.

    Attributes
    ----------
    cache : bytes that each decoder layer's cache holds.
    pictures : pictures, tiles and frames that went through the vision encoder; 0 where it takes the patches of all at once.
    report : of the method, if there is one.
    """

    cache: list[int]
    pictures: int
    report: Report | None


class TimedRunner:
    """One model and one batch of prompts, generated from greedily: always as many new tokens, whatever the model says.

    Raises
    ------
    InputError : a method is attached, the model lies on several devices, or there is no picture.
    UnsupportedModelError : the family is not supported.
    """

    def __init__(self, model: Any, inputs: Mapping[str, Any], new_tokens: int) -> None:
        if new_tokens < 2:
            raise InputError(f"new_tokens={new_tokens}; expected 2 or more, so that there is a decode step to time")
        self.parts: Anatomy = anatomy(model)
        self.model: Any = self.parts.model
        self.inputs = dict(inputs)
        self.device = check_one_device(self.model)
        if installed_on(self.model) is not None:
            raise InputError("a method is attached to the model, so there is no unreduced model to compare with. Detach it first.")
        self.encodings = [f"get_{modality}_features" for modality in modalities(self.inputs)]
        if not self.encodings:
            raise InputError("the inputs hold no picture. Pass what the processor returned, pixel_values included.")
        self.options: dict[str, Any] = {
            "max_new_tokens": new_tokens,
            "min_new_tokens": new_tokens,
            "do_sample": False,
            "num_beams": 1,
            "use_cache": True,
        }

    def inspect(self, method: Method | None) -> Inspected:
        """A run that is not timed, for its cache and report."""
        with self._attached(method) as session, counted(self.parts) as pictures:
            output = self.model.generate(**self.inputs, **self.options, return_dict_in_generate=True)
        return Inspected(cache_bytes(find_cache(output)), sum(pictures), None if session is None else session.report)

    def __call__(self, method: Method | None) -> Sample:
        """A timed run. Attaching is not in it."""
        clock, cuda = Clock(self.device), self.device.type == "cuda"
        with ExitStack() as stack:
            if cuda:
                stack.enter_context(torch.cuda.device(self.device))
            session = stack.enter_context(self._attached(method))
            forwards = stack.enter_context(watched(self.parts, clock, () if method else self.encodings))
            if cuda:
                torch.cuda.reset_peak_memory_stats(self.device)
                torch.cuda.synchronize(self.device)
            begin = time.perf_counter()
            clock.start("first token")
            self.model.generate(**self.inputs, **self.options)
            if cuda:
                torch.cuda.synchronize(self.device)
            whole = time.perf_counter() - begin
        found = clock.seconds()
        wanted = self.options["max_new_tokens"]
        if len(forwards) != wanted:
            raise InputError(
                f"the model ran {len(forwards)} times for {wanted} new tokens. Take what stops it earlier, or splits its prompt "
                "(max_time, prefill_chunk_size), out of its generation_config."
            )
        found |= {"decode": found["decode"] / (len(forwards) - 1), "end to end": whole}
        if session is not None:
            own = session.report.seconds
            found |= {part: own[part] for part in ("vision", "selection") if part in own}
        peak = int(torch.cuda.max_memory_allocated(self.device)) if cuda else None
        return Sample({part: found[part] for part in PARTS if part in found}, peak)

    @contextmanager
    def _attached(self, method: Method | None) -> Iterator[Any]:
        if method is None:
            yield None
            return
        with method(self.model) as session:
            yield session


@contextmanager
def counted(parts: Anatomy) -> Iterator[list[int]]:
    """Pictures that the vision encoders take, call by call."""
    numbers: list[int] = []

    def note(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        pixels = args[0] if args else kwargs["pixel_values"]
        if pixels.ndim == 4:
            numbers.append(len(pixels))

    towers = {parts.of(modality).tower for modality in ("image", "video")}
    handles = [tower.register_forward_pre_hook(note, with_kwargs=True) for tower in towers]
    try:
        yield numbers
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def watched(parts: Anatomy, clock: Clock, encodings: Sequence[str]) -> Iterator[list[None]]:
    """Take the time of the parts of a ``generate``, from outside and in the same way with a method and without.

    Parameters
    ----------
    parts : where the parts of the model are.
    clock : gets "prefill", "decode" (all steps), the end of "first token", and "vision".
    encodings : methods of the base model that encode pictures; none where a session takes their time itself.

    Yields
    ------
    A list with one entry for each forward of the model.
    """
    forwards: list[None] = []

    def begins(*_: Any) -> None:
        if not forwards:
            clock.start("prefill")

    def ends(*_: Any) -> None:
        for name in ("decode",) if forwards else ("prefill", "first token"):
            clock.stop(name)
        forwards.append(None)
        clock.start("decode")

    base: Any = parts.model.base_model
    before = {name: base.__dict__.get(name) for name in encodings}
    for name in encodings:
        base.__dict__[name] = _timed(getattr(base, name), clock)
    # before a method's own hooks, whose work counts
    handles = [parts.decoder.register_forward_pre_hook(begins, prepend=True), parts.model.register_forward_hook(ends)]
    try:
        yield forwards
    finally:
        for handle in handles:
            handle.remove()
        for name, own in before.items():
            if own is None:
                del base.__dict__[name]
            else:
                base.__dict__[name] = own


def _timed(encode: Callable[..., Any], clock: Clock) -> Callable[..., Any]:
    """The same encoding, with its time taken."""

    @functools.wraps(encode)
    def call(*args: Any, **kwargs: Any) -> Any:
        with clock.measure("vision"):
            return encode(*args, **kwargs)

    return call
