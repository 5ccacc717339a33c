"""Attaching a method to a model: ``generate`` and ``forward`` get a shorter prompt, everything else stays transformers' own."""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from ..errors import InputError
from ..methods.base import Method
from ..report import Clock, Report
from ..tokens import resolve_budget
from .decoder.hooks import DecoderCuts
from .generation import FullPrompt, GenerateSettings, on_full_prompt
from .install import Installation, installed_on
from .model.anatomy import Anatomy, anatomy, innermost
from .model.seams import (
    PRE_ENCODED,
    ROWS_ARE_SEQUENCES,
    cache_in,
    check_pre_encoded_input,
    cuts_of,
    find_cache,
    forget_if_empty,
    has_pixels,
    is_ours,
    layout_of,
    mark,
    modalities,
    renamed,
    restore,
)
from .prompt.layout import Layout, cached_layout, filler, layout_past
from .prompt.positions import Positions, Shifts, guard_positions, missing_positions
from .prompt.shorten import acts_inside, expected_prompt, shorten_prompt
from .vision.front import check_front


class Session:
    """A method on a model. Use it as a context manager, or ``attach()`` and ``detach()``.

    Attributes
    ----------
    report : what the last ``generate``, or ``forward`` with pictures, did; where several threads use a model, of any of them.
    """

    def __init__(self, model: Any, method: Method) -> None:
        if not isinstance(method, Method):
            raise InputError(
                f"a method was expected and not {type(method).__name__}. Give the model first, then a name or an instance such as "
                "foveate.PruMergePlus()."
            )
        self.method, self.front = method, method.before_decoder()
        self.model = innermost(model)
        self.report = self.new_report()
        self._cuts = DecoderCuts(None, None)
        self._guards: list[Any] = []
        self._adoptable = False  # attached by attach(), so that a with block may take it over once
        self._prefill: Report | None = None  # of the generate whose prefill comes next
        self._busy: set[int] = set()  # caches that generate works on: its calls of forward are right as they are
        self._shifts = Shifts()

    def attach(self) -> Self:
        """Attach until ``detach()``.

        Raises
        ------
        InputError : a method is attached already.
        UnsupportedModelError : the model is not supported, or lacks what the method needs; nothing is changed then.
        """
        installed = installed_on(self.model)
        if installed is not None:
            active = installed.sessions[-1].method.name
            raise InputError(
                f"{active!r} is attached to this model already. Call detach() on its handle, or foveate.detach(model), first."
            )
        self.__enter__()
        self._adoptable = True
        return self

    def detach(self) -> None:
        """Restore the model. Detaching twice does nothing."""
        installed = installed_on(self.model)
        if installed is None or self not in installed.sessions:
            return
        installed.sessions.remove(self)
        self._adoptable = False
        for guard in self._guards:
            guard.remove()
        self._guards = []
        self._cuts.remove()
        if not installed.sessions:
            installed.remove()
        else:
            installed.sessions[-1]._cuts.install()

    def __enter__(self) -> Self:
        parts = self.parts()
        installed = installed_on(self.model)
        if installed is not None and self in installed.sessions:
            if not self._adoptable:
                raise InputError("this session is attached already; make a new one for a nested block")
            if installed.sessions[-1] is not self:
                raise InputError("another method is attached inside this one; leave its block first")
            self._adoptable = False
            return self
        cuts = DecoderCuts(None, None)
        if self.method.inside_decoder():
            cuts = DecoderCuts(parts.decoder, self.method, two_way=parts.family.two_way, levels=parts.deepstack_levels)
        installed = installed or Installation(self.model)
        for outer in installed.sessions[-1:]:
            outer._cuts.remove()  # the innermost method acts
        installed.sessions.append(self)
        if self.front.positions == "original" and not parts.family.mrope:
            self._guards = guard_positions(self.model)
        self._cuts = cuts
        try:
            cuts.install()
        except BaseException:
            self.detach()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def parts(self) -> Anatomy:
        """Where the parts of the model are, checked against what the method needs."""
        parts = anatomy(self.model)
        check_front(parts, self.front)
        check_pre_encoded_input(self.model)
        return parts

    def new_report(self) -> Report:
        """An empty report of this method."""
        return Report(self.method.settings(), 0, Clock(self.model.device), notes=self.method.notes())

    # -- generate

    @torch.no_grad()
    def generate(self, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The model's ``generate`` on a shorter prompt; sequences come back with the full prompt in front."""
        kwargs = {**dict(zip(list(inspect.signature(original).parameters), args, strict=False)), **kwargs}
        renamed(kwargs)
        inputs, named = kwargs.pop("inputs", None), kwargs.pop("input_ids", None)
        ids = named if inputs is None else inputs
        cache = cache_in(kwargs)
        forget_if_empty(cache)
        self._cuts.accept(cache)
        self.report = report = self.new_report()
        if is_ours(kwargs.get(PRE_ENCODED)):  # the assistant of a model that has shortened the prompt already
            return original(inputs=ids, **kwargs)
        self._refuse_encoded(kwargs)
        if ids is None or not (has_pixels(kwargs) or layout_of(cache) is not None):
            self._refuse_missing_pictures(ids, cache)
            return self._run(original, ids, kwargs, report)
        settings = GenerateSettings(self.model, kwargs)
        self._cuts.refuse_pieces(settings["prefill_chunk_size"])
        mask = kwargs.get("attention_mask")
        mask = settings.infer_mask(ids) if mask is None else mask
        parts = self.parts()
        numbered = Positions(parts, self.front.positions == "compact")
        numbered.refuse(kwargs.get("position_ids"))
        numbered.of_prompt(ids, mask, layout_past(cache), kwargs)
        short = shorten_prompt(parts, self.method, ids, mask, kwargs, report, pad_left=True)
        layout = short.layout
        if layout is None:
            with self._expecting(parts, ids[:, short.held if mask.shape == ids.shape else 0 :], mask, report):
                return self._run(original, ids, kwargs, report)
        if bool((mask[:, -1] == 0).any()):
            report.warnings.append("prompts were padded on the right; they were generated from as if padded on the left")
        outside = mask.shape[1] - ids.shape[1]
        fill = filler(ids, mask[:, outside:], parts.visual(ids))
        whole = torch.cat([fill.expand(-1, outside), ids], 1)
        short_ids = layout.take(whole, fill)[:, short.held if outside else 0 :]
        given = kwargs.get("position_ids")
        numbered.follow(layout, mask, kwargs)
        layout = replace(layout, ahead=numbered.ahead)
        missing = None if numbered.compact else missing_positions(mask, given, kwargs["position_ids"])
        kwargs.update(settings.lengths(ids.shape[1] - short_ids.shape[1]))
        full, beams = FullPrompt(ids, short_ids.shape[1]), (settings["num_beams"] or 1) > 1
        copies = settings["num_return_sequences"] or 1
        kwargs.update(on_full_prompt(kwargs, full, 1 if beams or not ROWS_ARE_SEQUENCES else copies))
        earlier = layout_of(cache)
        if cache is not None:
            once = not beams and copies == 1
            # at once: a generate that is interrupted leaves a cache that can still be continued
            mark(cache, replace(layout, reusable=once))
        new = short_ids[:, 0 if outside else short.held :]
        try:
            with self._shifts.during(missing, short_ids.shape[1]), self._expecting(parts, new, kwargs["attention_mask"], report):
                result = self._run(original, short_ids, kwargs, report)
        except BaseException:
            if cache is not None and int(cache.get_seq_length()) < layout.gather.shape[1]:  # the prompt did not get into it
                restore(cache, earlier)
            raise
        sequences = result if isinstance(result, Tensor) else result.sequences
        reusable = replace(layout, reusable=len(sequences) == len(ids) and not beams)
        for held in (cache, find_cache(result)):
            if held is not None:
                mark(held, reusable)
        if isinstance(result, Tensor):
            return full.sequences(sequences)
        result.sequences = full.sequences(sequences)
        return result

    def _run(self, original: Any, ids: Tensor | None, kwargs: dict[str, Any], report: Report) -> Any:
        """Transformers' own generate, with the time of prefill and decode taken."""
        self._prefill, cache = report, cache_in(kwargs)
        self._busy.add(id(cache))
        before = 0 if cache is None else int(cache.get_seq_length())
        try:
            result = original(inputs=ids, **kwargs)
            if self._cuts.active:
                self._cuts.finish(find_cache(result) or cache, ids, result, GenerateSettings(self.model, kwargs)["num_beams"])
            return result
        except BaseException:
            self._cuts.fail(cache, before)
            raise
        finally:
            self._prefill = None
            self._busy.discard(id(cache))
            report.clock.stop("decode")

    def _expecting(self, parts: Anatomy, ids: Tensor, mask: Tensor, report: Report, labels: Tensor | None = None) -> Any:
        """Within this, the decoder reads these new tokens of the short prompt; ``mask`` is of the whole of it."""
        if not self._cuts.active or not report.after or not acts_inside(self.method, max(report.before)):
            return nullcontext()
        return self._cuts.expecting(expected_prompt(parts, ids, mask, report, labels), report)

    def _refuse_missing_pictures(self, ids: Tensor | None, cache: Any) -> None:
        placeholders = 0 if ids is None else int(self.parts().visual(ids).sum())
        if placeholders and (cache is None or cache.get_seq_length() == 0):
            raise InputError(
                f"the prompts have {placeholders} image placeholders and no picture is given. Pass the pixel_values that the "
                "processor returned."
            )

    def _refuse_encoded(self, kwargs: dict[str, Any]) -> None:
        if kwargs.get("inputs_embeds") is not None:
            raise InputError(
                "inputs_embeds holds pictures that are encoded already, so no visual token can be removed. "
                "Pass input_ids and pixel_values, or make shorter embeddings with foveate.encode."
            )
        if kwargs.get(PRE_ENCODED):
            raise InputError(f"{PRE_ENCODED} holds pictures that are encoded already. Pass pixel_values instead.")

    # -- forward

    def forward(self, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Shorten the prompt of a direct call; calls from ``generate`` come with encoded pictures and pass."""
        cache = cache_in(kwargs)
        if self._cuts.active:
            embedded, mask = kwargs.get("inputs_embeds") is not None, kwargs.get("attention_mask")
            self._cuts.begins(has_pixels(kwargs) or kwargs.get(PRE_ENCODED) is not None, embedded, mask)
        if cuts_of(cache) is not None:
            self._cuts.accept(cache)
        if args or has_pixels(kwargs) or (layout_of(cache) is not None and id(cache) not in self._busy):
            return self._direct(original, args, kwargs)
        if self._shifts:
            kwargs = self._shifts.applied(kwargs)
        prefill = self._prefill
        if prefill is not None and not torch.compiler.is_compiling():
            self._prefill = None
            prefill.clock.start("prefill")
            output = original(**kwargs)
            prefill.clock.stop("prefill")
            prefill.clock.start("decode")
            return output
        return original(**kwargs)

    def _direct(self, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call of the user's own that brings pictures, or goes on behind some."""
        kwargs = {**dict(zip(list(inspect.signature(original).parameters), args, strict=False)), **kwargs}
        layout, report, reading = self._shorten(kwargs)
        with reading:
            output = original(**kwargs)
        self._finish(layout, report, output)
        return output

    @torch.compiler.disable
    def _shorten(self, kwargs: dict[str, Any]) -> tuple[Layout | None, Report, Any]:
        """Change ``kwargs`` to a shorter prompt.

        Returns the layout that a cache which this call fills must be marked with, the report, and the context to call in.
        """
        renamed(kwargs)
        cache = cache_in(kwargs)
        forget_if_empty(cache)
        if has_pixels(kwargs):
            self.report = report = self.new_report()
            past = 0 if cache is None else int(cache.get_seq_length())
            layout = self._shorten_forward(kwargs, report)
            ids, mask = kwargs["input_ids"], kwargs.get("attention_mask")
            mask = torch.ones(len(ids), past + ids.shape[1], device=ids.device) if mask is None else mask
            ids = ids[:, max(0, ids.shape[1] + past - mask.shape[1]) :] if past else ids
            return layout, report, self._expecting(self.parts(), ids, mask, report, kwargs.get("labels"))
        if layout_of(cache) is not None:
            self._continue_forward(kwargs)
        return None, self.report, nullcontext()

    @torch.compiler.disable
    def _finish(self, layout: Layout | None, report: Report, output: Any) -> None:
        report.clock.stop("prefill")
        cache = find_cache(output)
        if layout is not None and cache is not None:
            mark(cache, layout)

    def _shorten_forward(self, kwargs: dict[str, Any], report: Report) -> Layout | None:
        self._refuse_encoded(kwargs)
        ids, mask, labels = (kwargs.get(name) for name in ("input_ids", "attention_mask", "labels"))
        if ids is None:
            raise InputError("pixel_values without input_ids: there is no prompt that the pictures belong to.")
        if labels is not None and labels.shape != ids.shape:
            raise InputError(f"labels have shape {tuple(labels.shape)} and input_ids {tuple(ids.shape)}; both must be the same")
        parts, cache = self.parts(), cache_in(kwargs)
        if mask is not None and mask.ndim != 2:
            if self._keeps_all(parts, kwargs) and not self._cuts.active and layout_of(cache) is None:
                return None
            raise InputError(f"attention_mask has {mask.ndim} dimensions; shortening a prompt needs one of [batch, tokens]")
        past = layout_past(cache)
        full_mask = torch.ones(len(ids), past + ids.shape[1], dtype=torch.long, device=ids.device) if mask is None else mask
        # the last column is what a decoding loop reads, unless the rows end in padding already, or a loss is all that is wanted
        left = bool((full_mask[:, 0] == 0).any()) or past > 0 or (labels is None and bool(full_mask[:, -1].all()))
        numbered, given = Positions(parts, self.front.positions == "compact"), kwargs.get("position_ids")
        numbered.refuse(given)
        numbered.of_prompt(ids, full_mask, past, kwargs)
        short = shorten_prompt(parts, self.method, ids, full_mask, kwargs, report, pad_left=left)
        report.clock.start("prefill")
        layout = short.layout
        if layout is None:
            return None
        if isinstance(kwargs.get("logits_to_keep"), Tensor):
            raise InputError("logits_to_keep as a tensor counts columns of the full prompt. Give an int, or leave it out.")
        outside = full_mask.shape[1] - ids.shape[1]
        new = replace(layout, gather=torch.where(layout.gather < 0, -1, layout.gather - outside)[:, short.held if outside else 0 :])
        kwargs["input_ids"] = new.take(ids, filler(ids, full_mask[:, outside:], parts.visual(ids)))
        if labels is not None:
            kwargs["labels"] = new.take(labels, -100)
        earlier = layout_of(cache)
        if given is not None and mask is None and bool((given.diff(dim=-1) <= 0).any()):
            raise InputError("position_ids begin anew: packed prompts cannot be shortened. Give each prompt a row of its own.")
        whole = kwargs.get("position_ids")
        numbered.follow(layout, full_mask, kwargs)
        ahead = numbered.ahead if numbered.mrope else None if earlier is None else earlier.ahead
        if past > 0 and earlier is None and not numbered.mrope:
            # transformers numbers a cache that was filled by hand by its columns, padding too
            ahead = (full_mask[:, :past] == 0).sum(1, keepdim=True)
        numbered.number(kwargs, kwargs["attention_mask"], whole, ahead, kwargs["input_ids"].shape[1])
        return replace(layout, ahead=ahead)

    def _continue_forward(self, kwargs: dict[str, Any]) -> None:
        """New text tokens on a shortened cache, called by hand: the mask may still count the full prompt."""
        ids, mask, cache = kwargs.get("input_ids"), kwargs.get("attention_mask"), cache_in(kwargs)
        if ids is None:
            raise InputError("a conversation on a shortened cache goes on with input_ids; inputs_embeds cannot be followed there.")
        cached = cached_layout(cache, len(ids), self.method.settings(), ids.device)
        if cached is None:
            return
        new, given = ids.shape[1], kwargs.get("position_ids")
        numbered = Positions(self.parts(), self.front.positions == "compact")
        numbered.refuse(given)
        layout = cached.extended(new)
        if mask is None:
            mask = torch.ones(len(ids), layout.length, dtype=torch.long, device=ids.device)
        if mask.shape[1] == layout.length:
            numbered.follow(layout, mask, kwargs)
        elif mask.shape[1] != layout.gather.shape[1]:
            raise InputError(
                f"attention_mask has {mask.shape[1]} columns; expected {layout.length} for the full prompt and the new tokens "
                f"(or {layout.gather.shape[1]} for the shortened one)"
            )
        elif not numbered.compact and given is None:
            kwargs["position_ids"] = cached.real[:, None] + torch.arange(new, device=ids.device)
        numbered.number(kwargs, kwargs.get("attention_mask", mask), given, cached.ahead, new)

    def _keeps_all(self, parts: Anatomy, kwargs: dict[str, Any]) -> bool:
        """Whether the budget covers every token."""
        if self.front.keeps_all or parts.arrangement != "grid" or modalities(kwargs) != ["image"]:
            return self.front.keeps_all
        cells = parts.grid(*kwargs["pixel_values"].shape[-2:])
        return resolve_budget(self.front.budget, cells[0] * cells[1]) == cells[0] * cells[1]


def detach(model: Any) -> None:
    """Detach whatever is attached to a model; nothing is attached to most models, and nothing happens then."""
    installed = installed_on(innermost(model))
    while installed is not None and installed.sessions:
        installed.sessions[-1].detach()
