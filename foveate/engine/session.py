"""Attaching a method to a model: ``generate`` and ``forward`` get a shorter prompt, everything else stays transformers' own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from ..errors import InputError
from ..methods.base import Method
from ..report import Clock, Report
from ..tokens import resolve_budget
from .call import ShortCall, continued, read, shorten
from .decoder.hooks import DecoderCuts
from .generation import FullPrompt, GenerateSettings, on_full_prompt
from .install import Installation, installed_on
from .model.anatomy import Anatomy, anatomy, innermost
from .model.marks import cuts_of, forget_if_empty, layout_of, mark, restore
from .model.seams import (
    PRE_ENCODED,
    ROWS_ARE_SEQUENCES,
    brings_pictures,
    cache_in,
    check_pre_encoded_input,
    encodings_in,
    find_cache,
    is_ours,
    modalities,
    named_arguments,
)
from .prompt.layout import Layout, layout_past
from .prompt.positions import Shifts, guard_positions, missing_positions
from .prompt.shorten import acts_inside, expected_prompt
from .training import Registered, parameters, places
from .vision.front import prepare


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
        self._registered: Registered | None = None

    def attach(self, *, train: bool = False) -> Self:
        """Attach until ``detach()``.

        Parameters
        ----------
        train : whether the weights of the method are to be trained: they become the submodule ``foveate`` of the model, and
            gradients reach them.

        Raises
        ------
        InputError : a method is attached already, or there is nothing to train.
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
        if train:
            try:
                self._registered = Registered(anatomy(self.model), self.method)
            except BaseException:
                self.detach()
                raise
        return self

    def detach(self) -> None:
        """Restore the model. Detaching twice does nothing."""
        installed = installed_on(self.model)
        if installed is None or self not in installed.sessions:
            return
        installed.sessions.remove(self)
        self._adoptable = False
        if self._registered is not None:
            self._registered.remove()
            self._registered = None
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
        prepare(parts, self.method)
        check_pre_encoded_input(self.model)
        return parts

    def new_report(self) -> Report:
        """An empty report of this method."""
        warnings = [warning for part in self.method.trained() for warning in part.warnings]
        return Report(self.method.settings(), 0, Clock(self.model.device), warnings=warnings, notes=self.method.notes())

    # -- the weights of the method

    def parameters(self) -> Iterator[nn.Parameter]:
        """The weights of the method, for an optimizer; none where it has none."""
        return parameters(self.method)

    def save_weights(self, folder: str | Path, *, training: dict[str, Any] | None = None) -> None:
        """Write the weights of the method as ``save_pretrained`` does; of several methods each into a folder of its own.

        Parameters
        ----------
        folder : made if it is new.
        training : a summary of the training, JSON-able.

        Raises
        ------
        InputError : the method has no weights.
        FoveateError : the folder cannot be written.
        """
        for part, place in places(self.method, folder):
            part.save_pretrained(place, training=training)

    def load_weights(self, folder: str | Path) -> None:
        """Read what ``save_weights`` wrote, also while the method is trained.

        Raises
        ------
        InputError : there are no such weights, or they do not fit.
        """
        for part, place in places(self.method, folder):
            part.load(place)

    # -- generate

    @torch.no_grad()
    def generate(self, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The model's ``generate`` on a shorter prompt; sequences come back with the full prompt in front."""
        arguments = named_arguments(original, args, kwargs)
        inputs, named = arguments.pop("inputs", None), arguments.pop("input_ids", None)
        ids = named if inputs is None else inputs
        cache = cache_in(arguments)
        forget_if_empty(cache)
        self._cuts.accept(cache)
        self.report = report = self.new_report()
        if is_ours(arguments.get(PRE_ENCODED)):  # the assistant of a model that has shortened the prompt already
            return original(inputs=ids, **arguments)
        self._refuse_encoded(arguments)
        if ids is None or not (brings_pictures(arguments) or layout_of(cache) is not None):
            self._refuse_missing_pictures(ids, cache)
            return self._run(original, ids, arguments, report)
        settings = GenerateSettings(self.model, arguments)
        self._cuts.refuse_pieces(settings["prefill_chunk_size"])
        mask = arguments.get("attention_mask")
        call = read(self.parts(), arguments, ids, settings.infer_mask(ids) if mask is None else mask)
        short = shorten(call, self.method, report, pad_left=True)
        if short.layout is None:
            with self._expecting(short, report):
                return self._run(original, ids, short.arguments(), report)
        return self._generate_short(original, short, short.layout, settings, report)

    def _generate_short(self, original: Any, short: ShortCall, layout: Layout, settings: GenerateSettings, report: Report) -> Any:
        """``generate`` on a prompt that lost tokens: lengths, callbacks, positions and cache speak of the full one."""
        call, ids = short.call, short.ids
        if bool((call.mask[:, -1] == 0).any()):
            report.warnings.append("prompts were padded on the right; they were generated from as if padded on the left")
        arguments = short.arguments()
        layout = replace(layout, ahead=short.positions.ahead)
        missing = None
        if not short.positions.compact:
            missing = missing_positions(call.mask, short.positions.full, arguments["position_ids"])
        full, beams = FullPrompt(call.ids, ids.shape[1]), (settings["num_beams"] or 1) > 1
        copies = settings["num_return_sequences"] or 1
        arguments |= settings.lengths(call.ids.shape[1] - ids.shape[1])
        arguments |= on_full_prompt(arguments, full, 1 if beams or not ROWS_ARE_SEQUENCES else copies)
        cache, earlier = call.cache, layout_of(call.cache)
        if cache is not None:
            # at once: a generate that is interrupted leaves a cache that can still be continued
            mark(cache, replace(layout, reusable=not beams and copies == 1))
        try:
            with self._shifts.during(missing, ids.shape[1]), self._expecting(short, report):
                result = self._run(original, ids, arguments, report)
        except BaseException:
            if cache is not None and int(cache.get_seq_length()) < layout.gather.shape[1]:  # the prompt did not get into it
                restore(cache, earlier)
            raise
        sequences = result if isinstance(result, Tensor) else result.sequences
        reusable = replace(layout, reusable=len(sequences) == len(call.ids) and not beams)
        for held in (cache, find_cache(result)):
            if held is not None:
                mark(held, reusable)
        if isinstance(result, Tensor):
            return full.sequences(sequences)
        result.sequences = full.sequences(sequences)
        return result

    def _run(self, original: Any, ids: Tensor | None, arguments: dict[str, Any], report: Report) -> Any:
        """Transformers' own generate, with the time of prefill and decode taken."""
        self._prefill, cache = report, cache_in(arguments)
        self._busy.add(id(cache))
        before = 0 if cache is None else int(cache.get_seq_length())
        try:
            result = original(inputs=ids, **arguments)
            if self._cuts.active:
                self._cuts.finish(find_cache(result) or cache, ids, result, GenerateSettings(self.model, arguments)["num_beams"])
            return result
        except BaseException:
            self._cuts.fail(cache, before)
            raise
        finally:
            self._prefill = None
            self._busy.discard(id(cache))
            report.clock.stop("decode")

    def _expecting(self, short: ShortCall, report: Report) -> Any:
        """Within this, the decoder reads the new tokens of the short prompt."""
        if not self._cuts.active or not report.after or not acts_inside(self.method, max(report.before)):
            return nullcontext()
        prompt = expected_prompt(short.call.parts, short.new_ids, short.mask, report, short.labels)
        return self._cuts.expecting(prompt, report)

    def _refuse_missing_pictures(self, ids: Tensor | None, cache: Any) -> None:
        placeholders = 0 if ids is None else int(self.parts().visual(ids).sum())
        if placeholders and (cache is None or cache.get_seq_length() == 0):
            raise InputError(
                f"the prompts have {placeholders} image placeholders and no picture is given. Pass the pixel_values that the "
                "processor returned."
            )

    def _refuse_encoded(self, arguments: dict[str, Any]) -> None:
        if arguments.get("inputs_embeds") is not None:
            raise InputError(
                "inputs_embeds holds pictures that are encoded already, so no visual token can be removed. "
                "Pass input_ids and pixel_values, or make shorter embeddings with foveate.encode."
            )
        if arguments.get(PRE_ENCODED) and encodings_in(arguments) is None:
            raise InputError(
                f"{PRE_ENCODED} holds pictures that are encoded already. Pass pixel_values, or encode them with foveate.Pictures."
            )

    # -- forward

    def forward(self, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Shorten the prompt of a direct call; calls from ``generate`` come with reduced pictures and pass."""
        cache = cache_in(kwargs)
        if self._cuts.active:
            embedded, mask = kwargs.get("inputs_embeds") is not None, kwargs.get("attention_mask")
            self._cuts.begins(brings_pictures(kwargs) or kwargs.get(PRE_ENCODED) is not None, embedded, mask)
        if cuts_of(cache) is not None:
            self._cuts.accept(cache)
        if args or brings_pictures(kwargs) or (layout_of(cache) is not None and id(cache) not in self._busy):
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
        """A call of the user's own that brings pictures, or goes on after some."""
        arguments, layout, report, reading = self._shortened(named_arguments(original, args, kwargs))
        with reading:
            output = original(**arguments)
        self._finish(layout, report, output)
        return output

    @torch.compiler.disable
    def _shortened(self, arguments: dict[str, Any]) -> tuple[dict[str, Any], Layout | None, Report, Any]:
        """What to call the model with.

        Returns
        -------
        The arguments, the layout that the cache of the call is marked with afterwards, the report, and the context to call in.
        """
        cache = cache_in(arguments)
        forget_if_empty(cache)
        if brings_pictures(arguments):
            self.report = report = self.new_report()
            return self._with_pictures(arguments, report)
        if layout_of(cache) is not None:
            arguments = continued(self.parts(), self.method, arguments)
        return arguments, None, self.report, nullcontext()

    @torch.compiler.disable
    def _finish(self, layout: Layout | None, report: Report, output: Any) -> None:
        report.clock.stop("prefill")
        cache = find_cache(output)
        if layout is not None and cache is not None:
            mark(cache, layout)

    def _with_pictures(self, arguments: dict[str, Any], report: Report) -> tuple[dict[str, Any], Layout | None, Report, Any]:
        """As ``_shortened``, of a call that brings pictures."""
        self._refuse_encoded(arguments)
        ids, mask, labels = (arguments.get(name) for name in ("input_ids", "attention_mask", "labels"))
        if ids is None:
            raise InputError("pixel_values without input_ids: there is no prompt that the pictures belong to.")
        if labels is not None and labels.shape != ids.shape:
            raise InputError(f"labels have shape {tuple(labels.shape)} and input_ids {tuple(ids.shape)}; both must be the same")
        parts, cache = self.parts(), cache_in(arguments)
        if mask is not None and mask.ndim != 2:
            if self._keeps_all(parts, arguments) and not self._cuts.active and layout_of(cache) is None:
                return arguments, None, report, nullcontext()
            raise InputError(f"attention_mask has {mask.ndim} dimensions; shortening a prompt needs one of [batch, tokens]")
        past = layout_past(cache)
        given = arguments.get("position_ids")
        full_mask = torch.ones(len(ids), past + ids.shape[1], dtype=torch.long, device=ids.device) if mask is None else mask
        call = read(parts, arguments, ids, full_mask)
        # the last column is what a decoding loop reads, unless the rows end in padding already, or a loss is all that is wanted
        left = call.padded_left or past > 0 or (labels is None and bool(full_mask[:, -1].all()))
        short = shorten(call, self.method, report, pad_left=left)
        report.clock.start("prefill")
        reading = self._expecting(short, report)
        if short.layout is None:
            return {**short.arguments(), "input_ids": ids}, None, report, reading
        if isinstance(arguments.get("logits_to_keep"), Tensor):
            raise InputError("logits_to_keep as a tensor counts columns of the full prompt. Give an int, or leave it out.")
        if given is not None and mask is None and bool((given.diff(dim=-1) <= 0).any()):
            raise InputError("position_ids begin anew: packed prompts cannot be shortened. Give each prompt a row of its own.")
        earlier, positions, changed = layout_of(cache), short.positions, short.arguments()
        ahead = positions.ahead if positions.mrope else None if earlier is None else earlier.ahead
        if past > 0 and earlier is None and not positions.mrope:
            # transformers numbers a cache that was filled by hand by its columns, padding too
            ahead = (full_mask[:, :past] == 0).sum(1, keepdim=True)
        new = short.ids.shape[1]
        changed["position_ids"] = positions.of_new(changed.get("position_ids"), changed["attention_mask"], ahead, new)
        return {**changed, "input_ids": short.ids}, replace(short.layout, ahead=ahead), report, reading

    def _keeps_all(self, parts: Anatomy, arguments: dict[str, Any]) -> bool:
        """Whether the budget covers every token."""
        if self.front.keeps_all or parts.arrangement != "grid" or modalities(arguments) != ["image"]:
            return self.front.keeps_all
        cells = parts.grid(*arguments["pixel_values"].shape[-2:])
        return resolve_budget(self.front.budget, cells[0] * cells[1]) == cells[0] * cells[1]
