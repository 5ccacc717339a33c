"""Direct calls of a model, of its ``forward`` or of its backbone alone: training steps, loops by hand, losses of trainers."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import InputError
from ..report import Report
from ..tokens import resolve_budget
from .call import TAUGHT, continued, read, shorten, taught
from .install import installed_on
from .model.anatomy import Anatomy
from .model.inputs import check_tensors
from .model.marks import forget_if_empty, layout_of, mark
from .model.seams import brings_pictures, cache_in, find_cache, modalities, named_arguments, with_hidden_states
from .prompt.layout import Layout, layout_past
from .prompt.shorten import IGNORED

if TYPE_CHECKING:
    from .session import Session

BACKBONE = (
    "the backbone was called past the model's own forward: its hidden states stand in the columns of the full prompt, and removed "
    "tokens show the state of the last one before them"
)

PLACEHOLDERS = (
    "labels teach the placeholders of pictures; none of them is taught. A trainer that divides losses by a count of its own (TRL) "
    "counts them all the same, so that its losses and steps are smaller: give them the label -100, or let it teach answers only"
)


@dataclass
class Shortened:
    """What to call with.

    Attributes
    ----------
    arguments : of the call.
    layout : what the cache of the call is marked with afterwards; None = nothing.
    report : of the call.
    reading : the context to call in.
    """

    arguments: dict[str, Any]
    layout: Layout | None
    report: Report
    reading: AbstractContextManager[Any]


class Direct:
    """The direct calls of one session.

    Some losses (TRL's fused heads, Liger) replace the model's ``forward`` by one that calls the backbone and the head itself. Where
    that was done after the method was attached, pictures reach the backbone past us. Hooks on the backbone shorten the prompt
    there, and lay its hidden states out again in the columns of the full prompt.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self._handles: list[RemovableHandle] = []
        self._inside: set[int] = set()  # threads that are in a call of ours
        self._running: dict[int, tuple[Shortened, ExitStack, int]] = {}  # by thread: calls of the backbone alone
        self._taught: dict[int, dict[str, Any]] = {}  # by thread: labels of a call whose forward is another one

    def install(self) -> None:
        """Put the hooks on the model."""
        model: Any = self.session.model
        if self._handles or model.base_model is model:
            return
        self._handles = [
            model.register_forward_pre_hook(self._before_model, with_kwargs=True),
            model.base_model.register_forward_pre_hook(self._before_backbone, with_kwargs=True),
            model.base_model.register_forward_hook(self._after_backbone, always_call=True),
        ]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def call(self, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call of the user's own that brings pictures, or goes on after some."""
        short = self.shortened(named_arguments(original, args, kwargs))
        thread = threading.get_ident()
        self._inside.add(thread)
        try:
            with short.reading:
                output = original(**short.arguments)
        finally:
            self._inside.discard(thread)
        self._finish(short, output)
        return output

    @torch.compiler.disable
    def shortened(self, arguments: dict[str, Any]) -> Shortened:
        """What to call the model with."""
        session, cache = self.session, cache_in(arguments)
        forget_if_empty(cache)
        if brings_pictures(arguments):
            session.report = report = session.new_report()
            return self._with_pictures(arguments, report)
        if layout_of(cache) is not None:
            arguments = continued(session.parts(), session.method, arguments)
        return Shortened(arguments, None, session.report, nullcontext())

    @torch.compiler.disable
    def _finish(self, short: Shortened, output: Any) -> None:
        short.report.clock.stop("prefill")
        cache = find_cache(output)
        if short.layout is not None and cache is not None:
            mark(cache, short.layout)

    def _with_pictures(self, arguments: dict[str, Any], report: Report) -> Shortened:
        session = self.session
        session.refuse_encoded(arguments)
        ids, mask, labels = (arguments.get(name) for name in ("input_ids", "attention_mask", "labels"))
        check_tensors(ids, arguments)
        if ids is None:
            raise InputError("pixel_values without input_ids: there is no prompt that the pictures belong to.")
        if labels is not None and labels.shape != ids.shape:
            raise InputError(f"labels have shape {tuple(labels.shape)} and input_ids {tuple(ids.shape)}; both must be the same")
        parts, cache = session.parts(), cache_in(arguments)
        if mask is not None and mask.ndim != 2:
            if self._keeps_all(parts, arguments) and not session.cuts.active and layout_of(cache) is None:
                return Shortened(arguments, None, report, nullcontext())
            raise InputError(f"attention_mask has {mask.ndim} dimensions; shortening a prompt needs one of [batch, tokens]")
        past = layout_past(cache)
        given = arguments.get("position_ids")
        full_mask = torch.ones(len(ids), past + ids.shape[1], dtype=torch.long, device=ids.device) if mask is None else mask
        call = read(parts, arguments, ids, full_mask)
        short = shorten(call, session.method, report, pad_left=False)
        report.clock.start("prefill")
        reading = session.expecting(short, report)
        if short.layout is None:
            return Shortened({**short.arguments(), "input_ids": ids}, None, report, reading)
        if labels is not None and bool((parts.visual(ids) & (labels != IGNORED).to(ids.device)).any()):
            report.warn(PLACEHOLDERS)
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
        return Shortened({**changed, "input_ids": short.ids}, replace(short.layout, ahead=ahead), report, reading)

    def _keeps_all(self, parts: Anatomy, arguments: dict[str, Any]) -> bool:
        """Whether the budget covers every token."""
        front = self.session.front
        if front.keeps_all or parts.arrangement != "grid" or modalities(arguments) != ["image"]:
            return front.keeps_all
        cells = parts.grid(*arguments["pixel_values"].shape[-2:])
        return resolve_budget(front.budget, cells[0] * cells[1]) == cells[0] * cells[1]

    # -- calls of the backbone past us

    def _before_model(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Where another forward stands in the place of ours, its loss must not count placeholders, which may be removed."""
        if torch.compiler.is_compiling():
            return None
        thread, installed = threading.get_ident(), installed_on(model)
        self._taught.pop(thread, None)
        ids = kwargs.get("input_ids")
        if installed is None or not installed.replaced() or args or ids is None or not brings_pictures(kwargs):
            return None
        changed = kwargs if self.session.front.keeps_all else taught(self.session.parts(), ids, kwargs)
        # the backbone is not told what the answer is, and methods that read the question must not read that
        self._taught[thread] = {name: kwargs[name] for name in TAUGHT[:2] if kwargs.get(name) is not None}
        return args, changed

    def _before_backbone(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if torch.compiler.is_compiling():
            return None
        thread = threading.get_ident()
        self._running.pop(thread, None)
        if thread in self._inside:
            self._taught.pop(thread, None)
            return None
        arguments = named_arguments(base.forward, args, kwargs)
        if not brings_pictures(arguments):
            return None
        self.session.begins(arguments)
        short, stack = self.shortened({**arguments, **self._taught.pop(thread, {})}), ExitStack()
        for name in TAUGHT:
            short.arguments.pop(name, None)
        if BACKBONE not in short.report.notes:
            short.report.notes.append(BACKBONE)
        stack.enter_context(short.reading)
        self._running[thread] = (short, stack, arguments["input_ids"].shape[1])
        return (), short.arguments

    def _after_backbone(self, _: nn.Module, __: Any, output: Any) -> Any:
        if torch.compiler.is_compiling():
            return None
        running = self._running.pop(threading.get_ident(), None)
        if running is None:
            return None
        short, stack, width = running
        stack.close()
        if output is None:  # the backbone has raised
            return None
        self._finish(short, output)
        layout = short.layout
        if layout is None:
            return None
        return with_hidden_states(output, lambda states: laid_out(states, layout, width))


def laid_out(states: Tensor, layout: Layout, width: int) -> Tensor:
    """[B, S', D] of the short prompt's last tokens -> [B, width, D] in the last columns of the full one.

    A column whose token was removed shows the state of the last token before it: the next word of the prompt is predicted from it.
    """
    columns = layout.gather[:, -states.shape[1] :].to(states.device) - (layout.length - width)
    real = columns >= 0
    spare = columns.masked_fill(~real, width)  # padding goes to a column that is cut off again
    stays = torch.zeros(len(states), width + 1, dtype=torch.long, device=states.device).scatter(1, spare, 1)[:, :width]
    before = stays.cumsum(1) - 1  # number of the last token that stays, in the order of the short prompt
    index = (before + real.long().argmax(1, keepdim=True)).clamp(min=0, max=states.shape[1] - 1)
    found = states.gather(1, index[..., None].expand(-1, -1, states.shape[-1]))
    return found * (before >= 0)[..., None]
