"""Attaching a method to a model: ``generate`` and ``forward`` get a shorter prompt, everything else stays transformers' own."""

from __future__ import annotations

import html
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
from .call import ShortCall, read, shorten
from .decoder.hooks import DecoderCuts, check_cuttable
from .direct import Direct
from .generation import FullPrompt, GenerateSettings, on_full_prompt
from .install import Installation, installed_on
from .model.anatomy import Anatomy, anatomy, innermost
from .model.inputs import check_tensors, without_empty
from .model.late import mended, taking_visual_tokens
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
    named_arguments,
)
from .prompt.layout import Layout
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
        self.cuts = DecoderCuts(None, None)
        self._guards: list[Any] = []
        self._late = False  # the model's forward takes no visual tokens
        self._adoptable = False  # attached by attach(), so that a with block may take it over once
        self._prefill: Report | None = None  # of the generate whose prefill comes next
        self._busy: set[int] = set()  # caches that generate works on: its calls of forward are right as they are
        self._shifts = Shifts()
        self._direct = Direct(self)
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
        self.cuts.remove()
        self._direct.remove()
        if not installed.sessions:
            installed.remove()
        else:
            installed.sessions[-1].cuts.install()
            installed.sessions[-1]._direct.install()

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
        if self.method.inside_decoder() or self.method.first_tokens() is not None:
            check_cuttable(parts, self.method)
            cuts = DecoderCuts(parts.decoder, self.method, two_way=parts.family.two_way, levels=parts.deepstack_levels)
        installed = installed or Installation(self.model)
        for outer in installed.sessions[-1:]:
            outer.cuts.remove()  # the innermost method acts
            outer._direct.remove()
        installed.sessions.append(self)
        if self.front.positions == "original" and not parts.family.mrope:
            self._guards = guard_positions(self.model)
        self._late = parts.family.late is not None
        if self._late:
            self._guards.append(mended(self.model))
        self.cuts = cuts
        try:
            cuts.install()
            self._direct.install()
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

    def __repr__(self) -> str:
        """Short: the method, the class of the model, whether it is attached, and the last call."""
        installed = installed_on(self.model)
        attached = "attached" if installed is not None and self in installed.sessions else "detached"
        return f"<Session of {self.method.name} on {type(self.model).__name__}, {attached}; {self.report!r}>"

    def _repr_html_(self) -> str:
        """For notebooks: what the last call did."""
        told, _, _ = repr(self)[1:-1].partition("; ")
        return f"<p><b>{html.escape(told)}</b></p>{self.report._repr_html_()}"

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
            part.load_weights(place)

    # -- generate

    @torch.no_grad()
    def generate(self, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The model's ``generate`` on a shorter prompt; sequences come back with the full prompt in front."""
        arguments = named_arguments(original, args, kwargs)
        inputs, named = arguments.pop("inputs", None), arguments.pop("input_ids", None)
        ids = named if inputs is None else inputs
        cache = cache_in(arguments)
        forget_if_empty(cache)
        self.cuts.accept(cache)
        self.report = report = self.new_report()
        if is_ours(arguments.get(PRE_ENCODED)):  # the assistant of a model that has shortened the prompt already
            return original(inputs=ids, **arguments)
        self.refuse_encoded(arguments)
        if ids is None or not (brings_pictures(arguments) or layout_of(cache) is not None):
            self._refuse_missing_pictures(ids, cache)
            return self._run(original, ids, arguments, report)
        check_tensors(ids, arguments)
        settings = GenerateSettings(self.model, arguments)
        self.cuts.refuse_pieces(settings["prefill_chunk_size"])
        mask = arguments.get("attention_mask")
        call = read(self.parts(), arguments, ids, settings.infer_mask(ids) if mask is None else mask)
        short = shorten(call, self.method, report, pad_left=True)
        if short.layout is None:
            with self.expecting(short, report):
                return self._run(original, ids, short.arguments(), report)
        return self._generate_short(original, short, short.layout, settings, report)

    def _generate_short(self, original: Any, short: ShortCall, layout: Layout, settings: GenerateSettings, report: Report) -> Any:
        """``generate`` on a prompt that lost tokens: lengths, callbacks, positions and cache speak of the full one."""
        call, ids = short.call, short.ids
        if bool((call.mask[:, -1] == 0).any()):
            report.warn("prompts were padded on the right; they were generated from as if padded on the left")
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
            with self._shifts.during(missing, ids.shape[1]), self.expecting(short, report):
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
            if self.cuts.active:
                self.cuts.finish(find_cache(result) or cache, ids, result, GenerateSettings(self.model, arguments)["num_beams"])
            return result
        except BaseException:
            self.cuts.fail(cache, before)
            raise
        finally:
            self._prefill = None
            self._busy.discard(id(cache))
            report.clock.stop("decode")

    def expecting(self, short: ShortCall, report: Report) -> Any:
        """Within this, the decoder reads the new tokens of the short prompt."""
        if not self.cuts.active or not report.after or not acts_inside(self.method, max(report.before)):
            return nullcontext()
        prompt = expected_prompt(short.call.parts, short.new_ids, short.mask, report, short.labels)
        return self.cuts.expecting(prompt, report)

    def _refuse_missing_pictures(self, ids: Tensor | None, cache: Any) -> None:
        placeholders = 0 if not isinstance(ids, Tensor) else int(self.parts().visual(ids).sum())
        if placeholders and (cache is None or cache.get_seq_length() == 0):
            raise InputError(
                f"the prompts have {placeholders} image placeholders and no picture is given. Pass the pixel_values that the "
                "processor returned."
            )

    def refuse_encoded(self, arguments: dict[str, Any]) -> None:
        """Raise ``InputError`` for pictures that are encoded already, and not by us."""
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

    def begins(self, kwargs: dict[str, Any]) -> None:
        """Tell the decoder that a forward begins."""
        if self.cuts.active:
            embedded, mask = kwargs.get("inputs_embeds") is not None, kwargs.get("attention_mask")
            self.cuts.begins(brings_pictures(kwargs) or kwargs.get(PRE_ENCODED) is not None, embedded, mask)

    def forward(self, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Shorten the prompt of a direct call; calls from ``generate`` come with reduced pictures and pass."""
        kwargs = without_empty(kwargs)
        cache = cache_in(kwargs)
        if self._late:
            original = taking_visual_tokens(self.model, original)
        self.begins(kwargs)
        if cuts_of(cache) is not None:
            self.cuts.accept(cache)
        if args or brings_pictures(kwargs) or (layout_of(cache) is not None and id(cache) not in self._busy):
            return self._direct.call(original, args, kwargs)
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
