"""Dropping visual tokens between decoder layers: from a cut on, layers run and cache fewer tokens.

Hooks on the stock decoder and its layers compact hidden states, masks and rotary embeddings; the last layer's output is laid out
again as the prompt was. A layer's cache holds what the layer ran. Decoding steps get masks of their own for every cut.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ...errors import CacheError, FoveateError, InputError, UnsupportedModelError, shown
from ...methods.base import DecoderReducer, Method
from ...report import Report
from ..model.anatomy import Anatomy
from ..model.marks import cuts_of, forget_if_empty, mark_cuts
from ..model.seams import attention_of, cache_in
from .attention import OnlyRecording, Recorded, Tap
from .cut import cut_before
from .forward import DecoderKind, Forward, Prefill
from .pattern import Patterned, neighbour_mask
from .stages import DecoderPrompt, HeldCuts, place

_RUN = "_foveate_run"
OTHER = (
    "visual tokens were removed from this cache inside the decoder, by another method than the attached one or in other settings. "
    "Continue it with the same method, or start a new cache."
)


def check_cuttable(parts: Anatomy, method: Method) -> None:
    """Raise ``UnsupportedModelError`` where a method acts inside the decoder of a family that no tokens can leave there."""
    if parts.family.uncut:
        raise UnsupportedModelError(
            f"{method.name} acts inside the decoder of {parts.family.name}, and {parts.family.uncut}, so that none can leave "
            "between layers. Use a method that acts before the decoder, such as 'prumerge+'."
        )


class DecoderCuts:
    """The decoder reducers of one session on one decoder; without any, nothing is installed.

    Parameters
    ----------
    decoder, method : the layers are at ``decoder.layers``.
    two_way : tokens of a prompt see later ones, too; which ones is read from the model's own masks.
    levels : after so many of the first layers, features of the vision encoder are added to all visual tokens (deepstack).
    """

    def __init__(self, decoder: Any, method: Method | None, *, two_way: bool = False, levels: int = 0) -> None:
        self.levels = levels
        reducers = () if method is None else method.inside_decoder()
        self.changes = method is not None and method.first_tokens() is not None  # something of the first tokens of prompts
        self.decoder, self.method, self.active = decoder, method, bool(reducers) or self.changes
        self.layers: Any = decoder.layers if self.active else ()
        self.places: dict[int, int] = {}  # which reducer acts before a layer
        self.plan = self._planned(reducers)
        self.first = min(self.plan, default=len(self.layers))
        reading = {layer - (reducer.reads == "previous") for layer, reducer in self.plan.items() if reducer.reads != "nothing"}
        self.kind: Any = DecoderKind(decoder, two_way) if self.active else None
        self.tapped = {layer: attention_of(self.layers[layer]) for layer in sorted(reading)}
        self.pattern = self._patterned(reducers)
        self._handles: list[RemovableHandle] = []
        self._taps: list[Tap] = []
        self._runs: dict[int, Forward] = {}
        self._restoring: dict[int, Prefill] = {}
        self._expected: dict[int, tuple[DecoderPrompt, Report]] = {}
        self._pictures: dict[int, bool] = {}
        self._masks: dict[int, Tensor | None] = {}  # of the model's forward, which some models make into others

    @property
    def settings(self) -> dict[str, Any]:
        """Of the method, which change with every step while it is trained."""
        return {} if self.method is None else self.method.settings()

    def _planned(self, reducers: Sequence[DecoderReducer]) -> dict[int, DecoderReducer]:
        """The reducer that acts before each layer."""
        plan: dict[int, DecoderReducer] = {}
        for number, reducer in enumerate(reducers):
            layers: Any = reducer.cuts(len(self.layers))
            if not isinstance(layers, tuple | list | range) or any(type(layer) is not int for layer in layers):
                raise FoveateError(
                    f"{reducer.name}: cuts(layers) returned {shown(layers)}; expected the numbers of "
                    "decoder layers, such as (2,). This is a fault of the method."
                )
            for layer in layers:
                if layer in plan:
                    raise InputError(f"{plan[layer].name!r} and {reducer.name!r} both cut before decoder layer {layer}")
                if not 1 <= layer < len(self.layers):
                    raise InputError(
                        f"{reducer.name}: a cut before decoder layer {layer}; this decoder can be cut before layers 1 to "
                        f"{len(self.layers) - 1} (layer 0 always reads the whole prompt)"
                    )
                if layer < self.levels:
                    raise InputError(
                        f"{reducer.name}: a cut before decoder layer {layer}; this model adds features of its vision encoder to "
                        f"all visual tokens after its first {self.levels} layers. Cut before layer {self.levels}, or later."
                    )
                plan[layer], self.places[layer] = reducer, number
        return dict(sorted(plan.items()))

    def _patterned(self, reducers: Sequence[DecoderReducer]) -> Patterned | None:
        """What the layers leave out of the computation of visual tokens."""
        patterns = [reducer.pattern(len(self.layers)) for reducer in reducers]
        found = [number for number, pattern in enumerate(patterns) if pattern is not None]
        if len(found) > 1:
            raise InputError("Compose takes one method that changes how visual tokens are computed")
        self.patterning = found[0] if found else -1
        pattern = patterns[found[0]] if found else None
        return None if pattern is None else Patterned(pattern, self.layers, self._reading)

    def _reading(self) -> Forward | None:
        return self._runs.get(threading.get_ident())

    def install(self) -> None:
        """Put the hooks on the model."""
        if self._handles or not (self.plan or self.pattern or self.changes):
            return
        hook = self.decoder.register_forward_pre_hook(self._begin, with_kwargs=True)
        self._handles = [hook, self.decoder.register_forward_hook(self._end, always_call=True)]
        for number, layer in enumerate(self.layers):
            if number >= self.first or number in self.tapped or self.pattern is not None or self.changes:
                before = functools.partial(self._before_layer, number)
                self._handles.append(layer.register_forward_pre_hook(before, with_kwargs=True))
        self._handles.append(self.layers[-1].register_forward_hook(self._restore))
        self._taps = [Tap(module, functools.partial(self._record, number)) for number, module in self.tapped.items()]
        if self.pattern is not None:
            self.pattern.install()

    def remove(self) -> None:
        if self.pattern is not None:
            self.pattern.remove()
        for handle in self._handles:
            handle.remove()
        for tap in self._taps:
            tap.remove()
        self._handles, self._taps = [], []

    @contextmanager
    def expecting(self, prompt: DecoderPrompt, report: Report) -> Iterator[None]:
        """Inside the block, a forward that begins where ``prompt`` begins reads it."""
        thread = threading.get_ident()
        outer = self._expected.get(thread)
        self._expected[thread] = (prompt, report)
        try:
            yield
        finally:
            del self._expected[thread]
            if outer is not None:
                self._expected[thread] = outer

    def begins(self, pictures: bool, embedded: bool, mask: Any) -> None:
        """The model's forward begins in this thread, with pictures or without (a decoding step, guidance by another prompt).

        ``mask`` is its attention mask.

        Raises
        ------
        UnsupportedModelError : the prompt is ``embedded`` already.
        """
        self._pictures[threading.get_ident()] = pictures
        self._masks[threading.get_ident()] = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
        if pictures and embedded:
            raise UnsupportedModelError(
                f"{self.settings['name']!r} cannot tell where pictures are: the prompt came as embeddings (from prompt tuning?)."
            )

    def refuse_pieces(self, size: int | None) -> None:
        """Raise ``InputError`` where ``generate`` would read the prompt in chunks."""
        if self.active and size is not None:
            raise InputError(
                f"{self.settings['name']!r} has to see the whole prompt at once, and not in pieces. Leave prefill_chunk_size out."
            )

    def accept(self, cache: Any) -> None:
        """Raise ``CacheError`` for a cache that was cut by another method or in other settings, or cannot be continued."""
        forget_if_empty(cache)
        cuts = cuts_of(cache)
        if cuts is not None and not cuts.reusable:
            raise CacheError(
                "a cache of beam search, of several sequences per prompt, or of a call that failed cannot be continued. "
                "Start a new cache."
            )
        if cuts is not None and cuts.method != self.settings:
            raise CacheError(OTHER)

    def fail(self, cache: Any, held: int) -> None:
        """A call failed; where its keys got into a cache that held ``held`` before, that cache is spoilt."""
        if self.active and cache is not None and int(cache.get_seq_length()) != held:
            mark_cuts(cache, HeldCuts(self.settings, reusable=False))

    def finish(self, cache: Any, ids: Tensor | None, result: Any, beams: int | None) -> None:
        """After a ``generate``: a cache of beams, or of several sequences per prompt, cannot be continued."""
        cuts = cuts_of(cache)
        sequences = result if isinstance(result, Tensor) else result.sequences
        if cuts is not None and ((beams or 1) > 1 or ids is None or len(sequences) != len(ids)):
            mark_cuts(cache, replace(cuts, reusable=False))

    # -- hooks

    @torch.compiler.disable
    def _begin(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """What kind of forward this is."""
        thread = threading.get_ident()
        self._runs.pop(thread, None)
        self._restoring.pop(thread, None)
        if self.pattern is not None:
            self.pattern.install()
        hidden, cache = kwargs.get("inputs_embeds"), cache_in(kwargs)
        expected = self._expected.get(thread) if self._pictures.get(thread) else None
        self.accept(cache)
        earlier = cuts_of(cache)
        if hidden is None or (expected is None and earlier is None):
            return
        past = 0 if cache is None else int(cache.get_seq_length())
        rows, width = hidden.shape[:2]
        positions, mask = kwargs.get("position_ids"), kwargs.get("attention_mask")
        if positions is None:
            positions = torch.arange(past, past + width, device=hidden.device)[None]
        flat = mask if isinstance(mask, Tensor) and mask.ndim == 2 else self._masks.get(thread) if self.kind.two_way else None
        flat = None if flat is None or flat.shape != (rows, past + width) else flat.bool()
        common = (self.kind, cache, earlier, past, rows, width, positions if positions.ndim == 2 else positions[0], flat)
        if expected is not None and expected[0].past <= past < expected[0].past + expected[0].width:
            prompt, report = expected
            self._check(cache, mask, prompt, past, width)
            report.begin(prompt.image, copies=rows // len(prompt.image))
            whole = prompt.resized(rows, width, hidden.device)
            cuts = None if cache is None else HeldCuts(self.settings) if earlier is None else earlier.copy()
            self._warn_of_windows(report, past + width)
            tokens = whole.tokens(hidden.detach(), len(self.layers))
            acting = [] if self.method is None else self.method.acting(max(report.before))
            self._runs[thread] = Prefill(
                *common,
                prompt=whole,
                asked=prompt.width,
                tokens=tokens,
                report=report,
                cuts=cuts,
                plan={layer: reducer for layer, reducer in self.plan.items() if acting[self.places[layer]]},
                several=positions.ndim == 3,
                patterned=self.pattern is not None and acting[self.patterning],
                first_tokens=None if self.method is None else self.method.first_tokens(max(report.before)),
            )
        elif earlier is not None:
            self._runs[thread] = Forward(*common)

    def _check(self, cache: Any, mask: Any, prompt: DecoderPrompt, past: int, width: int) -> None:
        """Raise where a prompt comes in a form that cannot be cut."""
        name = self.settings["name"]
        cuts = bool(self.plan or self.pattern)
        if cuts and getattr(cache, "is_compileable", False):
            raise InputError(
                f"{name!r} removes tokens between decoder layers, and a static cache has one length for all layers. "
                "Leave cache_implementation out (a dynamic cache)."
            )
        if past != prompt.past or width < prompt.width:
            raise InputError(f"{name!r} has to see the whole prompt at once, and it came in pieces.")
        if not cuts:
            return
        if mask is not None and not self.kind.two_way and not (isinstance(mask, Tensor) and mask.ndim == 2):
            raise InputError(f"{name!r} makes the masks of decoder layers itself and needs attention_mask as [batch, tokens].")
        checkpointed = any(getattr(layer, "gradient_checkpointing", False) for layer in self.layers) and self.decoder.training
        if checkpointed and any(reducer.trains for reducer in self.plan.values()):
            raise UnsupportedModelError(
                f"{name!r} learns from what it mixes inside the decoder, which gradient checkpointing computes twice. Turn it off."
            )
        if self.pattern is not None and any(getattr(layer, "gradient_checkpointing", False) for layer in self.layers):
            raise UnsupportedModelError(f"{name!r} cannot be trained with gradient checkpointing. Turn it off.")
        if "flash" in self.kind.implementation and self.kind.reads_positions:
            raise UnsupportedModelError(
                f"{name!r}: the attention of {type(self.decoder).__name__} computes with position ids, whose gaps flash attention "
                "takes for packed sequences. Use attn_implementation='sdpa'."
            )
        if "flex" in self.kind.implementation:
            raise UnsupportedModelError(f"{name!r} does not support flex attention. Use attn_implementation='sdpa'.")

    def _warn_of_windows(self, report: Report, length: int) -> None:
        """Flash attention counts a sliding window in tokens that are left, SDPA and eager attention in tokens of the prompt."""
        windows = [window for window in self.kind.windows[self.first :] if window is not None]
        if "flash" in self.kind.implementation and any(length > window for window in windows):
            report.warn("flash attention counts sliding windows in kept tokens: layers after a cut see farther than under SDPA")

    @torch.compiler.disable
    def _end(self, *_: Any) -> None:
        self._runs.pop(threading.get_ident(), None)
        self._restoring.pop(threading.get_ident(), None)

    @torch.compiler.disable
    def _before_layer(self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        run = self._current(kwargs)
        if run is None:
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        if hidden.ndim != 3:
            raise UnsupportedModelError(
                f"{type(module).__name__} takes no hidden states of [batch, tokens, width]; it cannot be cut."
            )
        if run.cache is None:
            run.adopt(cache_in(kwargs), self.settings)  # the decoder has made one itself
        if not isinstance(run, Prefill):
            changed = run.continued(layer, hidden)
            return None if changed is None else (args, {**kwargs, **changed})
        given = hidden
        if run.first_tokens is not None:
            hidden = run.with_first_tokens(layer, hidden)
        if layer in run.plan:
            hidden = cut_before(run, layer, run.plan[layer], module, hidden, kwargs)
        if self.plan or self.pattern is not None:
            run.note_columns(layer)
        if layer in self.tapped:
            run.given[layer] = run.mask_before(layer, run.stage(layer), hidden, kwargs["attention_mask"])
        if layer == len(self.layers) - 1:
            self._restoring[threading.get_ident()] = run
        stage, window = run.stage(layer), self.pattern.pattern.window if self.pattern and run.patterned else None
        if stage is None and window is None and hidden is given:
            return None
        whole = kwargs["attention_mask"]
        if stage is not None:
            kwargs = {**kwargs, **run.inputs(layer, stage, hidden, kwargs)}
        if window is not None and run.sees_pictures(layer):
            kwargs = {**kwargs, "attention_mask": neighbour_mask(run, layer, hidden, window, whole)}
        more = args[1:] if stage is None else tuple(run.followed(stage, value) for value in args[1:])
        return ((hidden, *more), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    def _current(self, kwargs: dict[str, Any]) -> Forward | None:
        """The run of this thread, or the one a layer belongs to that gradient checkpointing calls again in the backward pass."""
        run, embeddings = self._runs.get(threading.get_ident()), kwargs.get("position_embeddings")
        if embeddings is None:
            return run
        if run is None:
            return getattr(embeddings[0], _RUN, None)
        if self.decoder.training:
            setattr(embeddings[0], _RUN, run)
        return run

    @torch.compiler.disable
    def _restore(self, _: nn.Module, __: Any, output: Any) -> Any:
        """The last layer's output in the columns of the prompt; those of removed tokens hold zeros."""
        run = self._restoring.pop(threading.get_ident(), None)
        stage = None if run is None else run.stage(len(self.layers) - 1)
        if run is None or stage is None:
            return None
        return (place(output[0], stage, run.width), *output[1:]) if isinstance(output, tuple) else place(output, stage, run.width)

    @torch.compiler.disable
    def _record(self, layer: int, recorded: Recorded) -> None:
        run = self._runs.get(threading.get_ident())
        if not isinstance(run, Prefill):
            return
        reader = run.plan.get(layer) or run.plan.get(layer + 1)
        if reader is None or not reader.trains:
            recorded = recorded._replace(query=recorded.query.detach(), keys=recorded.keys.detach())
        run.recorded[layer] = recorded
        if run.dry:
            raise OnlyRecording
