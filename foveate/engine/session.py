"""Attaching a method to a model: ``generate`` and ``forward`` get a shorter prompt, everything else stays transformers' own."""

from __future__ import annotations

import inspect
import types
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from typing_extensions import Self

from ..errors import InputError
from ..methods.base import TokenReducer
from ..report import Clock, Report
from ..tokens import Reduction
from .families import Anatomy, anatomy, innermost
from .generation import Settings, full_sequences, on_full_prompt
from .guards import guard_positions
from .prompt import Layout, cached_layout, image_rows, original_positions, shorten
from .seams import PER_TOKEN_INPUTS, PRE_ENCODED, check_pre_encoded_input, find_cache, has_pixels, layout_of, mark
from .vision import encode_and_reduce

_ATTRIBUTE = "_foveate"


class Installation:
    """The hooks on one model, shared by nested sessions; the innermost one acts."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model: Any = model
        self.sessions: list[Session] = []
        self.previous = model.__dict__.get("generate")
        model.__dict__["generate"] = types.MethodType(_generate, model)
        model.__dict__[_ATTRIBUTE] = self
        self.handles = [
            model.register_forward_pre_hook(self.before_forward, with_kwargs=True, prepend=True),
            model.register_forward_hook(self.after_forward),
        ]

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        del self.model.__dict__[_ATTRIBUTE]
        if self.previous is None:
            del self.model.__dict__["generate"]
        else:
            self.model.__dict__["generate"] = self.previous

    def original_generate(self, **kwargs: Any) -> Any:
        if self.previous is not None:
            return self.previous(**kwargs)
        return type(self.model).generate(self.model, **kwargs)

    def before_forward(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.sessions[-1].before_forward(args, kwargs)

    def after_forward(self, _: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        self.sessions[-1].after_forward(output)


def _generate(model: nn.Module, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
    return model.__dict__[_ATTRIBUTE].sessions[-1].generate(inputs, *args, **kwargs)


@dataclass(frozen=True)
class ShortPrompt:
    """A prompt after reduction.

    Attributes
    ----------
    layout : None where nothing was removed, now or earlier.
    held : columns of the short prompt that the cache holds.
    embeds : visual tokens per image, in the space of the decoder.
    reduction : of all images; None without pictures.
    """

    layout: Layout | None
    held: int
    embeds: list[Tensor]
    reduction: Reduction | None


def shorten_prompt(
    parts: Anatomy, method: TokenReducer, ids: Tensor, mask: Tensor, kwargs: dict[str, Any], report: Report, *, pad_left: bool
) -> ShortPrompt:
    """Encode and reduce the pictures in ``kwargs`` and lay out the short prompt.

    Parameters
    ----------
    parts : where the parts of the model are.
    method : what reduces.
    ids : [B, S] tokens: the whole prompt, or what the cache does not hold yet.
    mask : [B, T] attention mask of the whole prompt, T >= S.
    kwargs : further arguments; those that describe pictures are taken out, the encoded pictures put in.
    report : filled in.
    pad_left : on which side rows are padded.
    """
    cached = cached_layout(kwargs.get("past_key_values"), len(ids), method.settings(), ids.device)
    past = 0 if cached is None else cached.length
    held = 0 if cached is None else cached.gather.shape[1]
    outside = mask.shape[1] - ids.shape[1]
    if outside not in (0, past):
        raise InputError(
            f"attention_mask has {mask.shape[1]} columns, input_ids {ids.shape[1]} and the cache {past}: give either the whole "
            "prompt or only its new tokens, with a mask for the whole prompt."
        )
    visual = torch.cat([ids.new_zeros(len(ids), outside), ids], 1) == parts.image_token
    visual[:, :past] = False
    report.decoder_layers = parts.decoder_layers
    sizes: list[int] = []
    kept: list[Tensor] = []
    embeds: list[Tensor] = []
    changed = cached is not None and cached.removed > 0
    if has_pixels(kwargs):
        visuals = encode_and_reduce(parts, method, kwargs, report.clock)
        embeds, kept, changed = visuals.embeds, visuals.kept, changed or visuals.changed
        sizes = [visuals.size] * len(embeds)
        kwargs[PRE_ENCODED] = {"image": visuals.output}
        report.rows, report.grid, report.reduction = image_rows(visual, sizes)[1], visuals.grid, visuals.reduction
        report.before, report.after = sizes, [len(features) for features in embeds]
    layout = None
    if changed:
        layout = shorten(visual, mask.bool(), sizes, kept, cached, method.settings(), pad_left=pad_left)
    return ShortPrompt(layout, held, embeds, report.reduction)


class Session:
    """A method on a model. Use it as a context manager, or ``attach()`` and ``detach()``.

    Attributes
    ----------
    report : what the last ``generate`` or ``forward`` did.
    """

    def __init__(self, model: Any, method: TokenReducer) -> None:
        if not isinstance(method, TokenReducer):
            raise InputError(f"{method!r} is not a method. Use a name or an instance, for example foveate.PruMergePlus().")
        self.method = method
        self.model = innermost(model)
        self.report = self._new_report()
        self._guards: list[Any] = []
        self._adoptable = False  # attached by attach(), so that a with block may take it over once
        self._pending: Layout | None = None  # layout of the forward that runs now
        self._prefill = False  # whether the next forward is the prefill of a generate

    def attach(self) -> Self:
        """Attach until ``detach()``.

        Raises
        ------
        InputError : a method is attached already.
        UnsupportedModelError : the model is not supported, or lacks what the method needs; nothing is changed then.
        """
        installed = self.model.__dict__.get(_ATTRIBUTE)
        if installed is not None:
            active = installed.sessions[-1].method.name
            raise InputError(f"{active!r} is attached to this model already. Call detach() on its handle first.")
        self.__enter__()
        self._adoptable = True
        return self

    def detach(self) -> None:
        """Restore the model. Detaching twice does nothing."""
        installed = self.model.__dict__.get(_ATTRIBUTE)
        if installed is None or self not in installed.sessions:
            return
        installed.sessions.remove(self)
        self._adoptable = False
        for guard in self._guards:
            guard.remove()
        self._guards = []
        if not installed.sessions:
            installed.remove()

    def __enter__(self) -> Self:
        self.parts()
        installed = self.model.__dict__.get(_ATTRIBUTE)
        if installed is not None and self in installed.sessions:
            if not self._adoptable:
                raise InputError("this session is attached already; make a new one for a nested block")
            self._adoptable = False
            return self
        installed = installed or Installation(self.model)
        installed.sessions.append(self)
        if self.method.positions == "original":
            self._guards = guard_positions(self.model)
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def parts(self) -> Anatomy:
        """Where the parts of the model are, checked against what the method needs."""
        parts = anatomy(self.model, self.method.encoder_layers())
        check_pre_encoded_input(self.model)
        return parts

    def _new_report(self) -> Report:
        return Report(self.method.settings(), 0, Clock(self.model.device))

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """The model's ``generate`` on a shorter prompt; sequences come back with the full prompt in front."""
        names = ("generation_config", "logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn")
        kwargs.update(zip(names, args, strict=False))
        ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        self.report = self._new_report()
        cache = kwargs.get("past_key_values")
        self._refuse_encoded(kwargs)
        if ids is None or not (has_pixels(kwargs) or layout_of(cache) is not None):
            self._refuse_missing_pictures(ids, cache)
            return self._run(ids, kwargs)
        settings = Settings(self.model, kwargs)
        mask = kwargs.get("attention_mask")
        mask = settings.infer_mask(ids) if mask is None else mask
        short = shorten_prompt(self.parts(), self.method, ids, mask, kwargs, self.report, pad_left=True)
        layout = short.layout
        if layout is None:
            return self._run(ids, kwargs)
        if bool((mask[:, -1] == 0).any()):
            self.report.warnings.append("prompts were padded on the right; they were generated from as if padded on the left")
        outside = mask.shape[1] - ids.shape[1]
        whole = torch.cat([ids[:, :1].expand(-1, outside), ids], 1)
        short_ids = layout.take(whole, settings.filler(ids, mask[:, outside:]))[:, short.held if outside else 0 :]
        self._follow(layout, mask, kwargs)
        kwargs.update(settings.lengths(ids.shape[1] - short_ids.shape[1]))
        kwargs.update(on_full_prompt(kwargs, ids, short_ids.shape[1]))
        result = self._run(short_ids, kwargs)
        sequences = result if isinstance(result, Tensor) else result.sequences
        reusable = replace(layout, reusable=len(sequences) == len(ids) and not (settings["num_beams"] or 1) > 1)
        for held in (cache, find_cache(result)):
            if held is not None:
                mark(held, reusable)
        full = full_sequences(sequences, ids, short_ids.shape[1])
        if isinstance(result, Tensor):
            return full
        result.sequences = full
        return result

    def _run(self, ids: Tensor | None, kwargs: dict[str, Any]) -> Any:
        """Transformers' own generate, with the time of prefill and decode taken."""
        self._prefill = True
        try:
            return self.model.__dict__[_ATTRIBUTE].original_generate(inputs=ids, **kwargs)
        finally:
            self._prefill = False
            self.report.clock.stop("decode")

    def _refuse_missing_pictures(self, ids: Tensor | None, cache: Any) -> None:
        placeholders = 0 if ids is None else int((ids == self.parts().image_token).sum())
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

    def _follow(self, layout: Layout, mask: Tensor, kwargs: dict[str, Any]) -> None:
        """Everything in ``kwargs`` that has one entry per token follows the layout."""
        given = kwargs.get("position_ids")
        if given is not None and self.method.positions == "compact":
            raise InputError(
                "position_ids cannot be given where the prompt is renumbered. Leave them out, or use positions='original'."
            )
        if self.method.positions == "original":
            kwargs["position_ids"] = layout.take(original_positions(mask.bool()) if given is None else given, 0)
        kwargs["attention_mask"] = layout.take(mask, 0)
        for name in PER_TOKEN_INPUTS:
            if kwargs.get(name) is not None:
                kwargs[name] = layout.take(kwargs[name], 0)

    def before_forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Shorten the prompt of a direct call; calls from ``generate`` come with encoded pictures and pass."""
        if self._prefill and not torch.compiler.is_compiling():
            self.report.clock.start("prefill")
        layout = layout_of(kwargs.get("past_key_values"))
        if not (args or has_pixels(kwargs)) and (layout is None or kwargs.get("position_ids") is not None):
            return None
        named = {**dict(zip(inspect.signature(type(self.model).forward).parameters, ("", *args), strict=False)), **kwargs}
        named.pop("self")
        if has_pixels(named):
            return (), self._shorten_forward(named)
        if layout is not None and named.get("position_ids") is None:
            return (), self._continue_forward(named)
        return None

    @torch.compiler.disable
    def _shorten_forward(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        self._refuse_encoded(kwargs)
        ids, mask, labels = (kwargs.get(name) for name in ("input_ids", "attention_mask", "labels"))
        if ids is None:
            raise InputError("pixel_values without input_ids: there is no prompt that the pictures belong to.")
        if mask is not None and mask.ndim != 2:
            raise InputError(f"attention_mask has {mask.ndim} dimensions; shortening a prompt needs one of [batch, tokens]")
        if labels is not None and labels.shape != ids.shape:
            raise InputError(f"labels have shape {tuple(labels.shape)} and input_ids {tuple(ids.shape)}; both must be the same")
        self.report = self._new_report()
        past = layout_past(kwargs)
        full_mask = torch.ones(len(ids), past + ids.shape[1], dtype=torch.long, device=ids.device) if mask is None else mask
        left = bool((full_mask[:, 0] == 0).any())
        short = shorten_prompt(self.parts(), self.method, ids, full_mask, kwargs, self.report, pad_left=left or past > 0)
        self._pending = short.layout
        self.report.clock.start("prefill")
        if short.layout is None:
            return kwargs
        layout = short.layout
        outside = full_mask.shape[1] - ids.shape[1]
        new = replace(layout, gather=torch.where(layout.gather < 0, -1, layout.gather - outside)[:, short.held if outside else 0 :])
        kwargs["input_ids"] = new.take(ids, ids[:, :1])
        if labels is not None:
            kwargs["labels"] = new.take(labels, -100)
        self._follow(layout, full_mask, kwargs)
        if kwargs.get("position_ids") is not None:
            kwargs["position_ids"] = kwargs["position_ids"][:, -kwargs["input_ids"].shape[1] :]
        return kwargs

    @torch.compiler.disable
    def _continue_forward(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """New text tokens on a shortened cache, called by hand: the mask may still count the full prompt."""
        ids, mask = kwargs["input_ids"], kwargs.get("attention_mask")
        cached = cached_layout(kwargs["past_key_values"], len(ids), self.method.settings(), ids.device)
        if cached is None or ids is None:
            return kwargs
        layout = cached.extended(ids.shape[1])
        new = ids.shape[1]
        if mask is None:
            mask = torch.ones(len(ids), layout.length, dtype=torch.long, device=ids.device)
        if mask.shape[1] == layout.length:
            self._follow(layout, mask, kwargs)
        elif mask.shape[1] == layout.gather.shape[1]:
            if self.method.positions == "original":
                kwargs["position_ids"] = cached.real[:, None] + torch.arange(new, device=ids.device)
        else:
            raise InputError(
                f"attention_mask has {mask.shape[1]} columns; expected {layout.length} for the full prompt and the new tokens "
                f"(or {layout.gather.shape[1]} for the shortened one)"
            )
        if kwargs.get("position_ids") is not None:
            kwargs["position_ids"] = kwargs["position_ids"][:, -new:]
        return kwargs

    def after_forward(self, output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        clock = self.report.clock
        clock.stop("prefill")
        if self._prefill:
            self._prefill = False
            clock.start("decode")
        layout, self._pending = self._pending, None
        cache = find_cache(output)
        if layout is not None and cache is not None:
            mark(cache, layout)


def layout_past(kwargs: dict[str, Any]) -> int:
    """Columns of the full prompt that the cache of a call stands for."""
    cache = kwargs.get("past_key_values")
    held = 0 if cache is None else int(cache.get_seq_length())
    layout = layout_of(cache)
    return held if layout is None else held + layout.removed
