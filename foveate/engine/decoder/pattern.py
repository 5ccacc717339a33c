"""Leaving out parts of the computation of visual tokens: attention to far ones, heads, neurons (``Pattern``).

Values of visual tokens are zeroed in pruned heads before they enter the cache. That equals zero attention weights, so no
implementation of attention has to know of it and decoding steps need nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...cuts import Pattern
from ...errors import InputError, UnsupportedModelError
from ..model.seams import WRAPPED_FORWARD, MlpParts, attention_of, mlp_of, output_of, values_of
from .forward import Prefill
from .stages import Stage, take

Heads: TypeAlias = "tuple[int, int, int, Tensor]"  # where values begin, in how many heads of which width, and which are pruned


class Patterned:
    """One pattern on the layers of a decoder; ``run`` says what the thread's forward is."""

    def __init__(self, pattern: Pattern, layers: nn.ModuleList, run: Callable[[], Any]) -> None:
        self.pattern, self.layers, self.run = pattern, layers, run
        if pattern.window is not None and (pattern.window < 1 or pattern.window % 2 == 0):
            raise InputError(f"window={pattern.window}; it has to be odd, such as 5")
        if pattern.heads is not None and len(pattern.heads) != len(layers):
            raise InputError(f"heads of {len(pattern.heads)} layers for a decoder of {len(layers)}; calibrate on this model")

        self._on: dict[int, tuple[Any, list[Callable[[], None]]]] = {}  # by layer: the parts that were found, and how to leave them
        for number in range(len(layers)):  # what may be missing is looked for before anything is put on the model
            self._parts(number)

    def install(self) -> None:
        """Put the hooks on the model, or on the parts that have taken the place of others since (adapters, offloading)."""
        for number in range(len(self.layers)):
            parts = self._parts(number)
            if number not in self._on or self._on[number][0] != parts:
                self._leave(number)
                self._on[number] = (parts, self._enter(number, *parts))

    def remove(self) -> None:
        for number in list(self._on):
            self._leave(number)

    def _parts(self, layer: int) -> tuple[tuple[nn.Module, nn.Module] | None, MlpParts | None]:
        """The projections of values and outputs of a layer, and its MLP, where the pattern prunes them."""
        heads = None if self.pattern.heads is None else self._projections(layer, self.pattern.heads[layer])
        return heads, mlp_of(self.layers[layer]) if self.pattern.neurons < 1 else None

    def _enter(self, layer: int, projections: tuple[nn.Module, nn.Module] | None, mlp: MlpParts | None) -> list[Callable[[], None]]:
        undo: list[Callable[[], None]] = []
        if projections is not None and self.pattern.heads is not None:
            _, begin, groups, width = values_of(attention_of(self.layers[layer]))
            shape = (begin, groups, width, torch.tensor([not kept for kept in self.pattern.heads[layer]]))
            undo.append(projections[0].register_forward_hook(functools.partial(self._silence, layer, shape)).remove)
            undo.append(projections[1].register_forward_pre_hook(functools.partial(self._deafen, layer, shape)).remove)
        if mlp is not None and mlp.sliceable:
            undo.append(_replace_forward(mlp.module, functools.partial(self._sliced, layer, mlp, mlp.module.forward)))
        elif mlp is not None:
            undo.append(mlp.down.register_forward_pre_hook(functools.partial(self._narrow, layer)).remove)
        return undo

    def _leave(self, layer: int) -> None:
        for undo in self._on.pop(layer, (None, []))[1]:
            undo()

    def _visual(self, layer: int) -> Tensor | None:
        """[B, M] bool, the visual tokens that the layer runs; None where it runs none."""
        run = self.run()
        if not isinstance(run, Prefill) or not run.patterned:
            return None
        visual = run.image(layer) >= 0
        return visual if visual.shape[1] else None

    def _projections(self, layer: int, heads: tuple[bool, ...]) -> tuple[nn.Module, nn.Module]:
        attention = attention_of(self.layers[layer])
        values, _, groups, _ = values_of(attention)
        if len(heads) != groups:
            raise InputError(f"a mask of {len(heads)} heads for decoder layer {layer}, which has {groups} key heads")
        return values, output_of(attention)

    @torch.compiler.disable
    def _silence(self, layer: int, shape: Heads, _: nn.Module, __: Any, out: Tensor) -> Tensor | None:
        """Zero the values of visual tokens in pruned heads."""
        visual, (begin, groups, width, pruned) = self._visual(layer), shape
        if visual is None:
            return None
        part = out[..., begin : begin + groups * width].unflatten(-1, (groups, width))
        gone = visual.to(out.device)[..., None] & pruned.to(out.device)
        part = part.masked_fill(gone[..., None], 0).flatten(-2)
        return torch.cat([out[..., :begin], part, out[..., begin + groups * width :]], -1)

    @torch.compiler.disable
    def _deafen(self, layer: int, shape: Heads, _: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """Zero what pruned heads give visual tokens."""
        visual, (_begin, groups, _width, pruned) = self._visual(layer), shape
        if visual is None:
            return None
        heard = args[0].unflatten(-1, (groups, -1))
        gone = visual.to(heard.device)[..., None] & pruned.to(heard.device)
        return (heard.masked_fill(gone[..., None], 0).flatten(-2), *args[1:])

    @torch.compiler.disable
    def _narrow(self, layer: int, _: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """Quantised, adapted or fused weights: zero the other neurons, the same result without the saving."""
        visual = self._visual(layer)
        if visual is None:
            return None
        neuron = torch.arange(args[0].shape[-1], device=args[0].device)
        gone = visual.to(neuron.device)[..., None] & (neuron >= round(self.pattern.neurons * len(neuron)))
        return (args[0].masked_fill(gone, 0), *args[1:])

    @torch.compiler.disable
    def _sliced(self, layer: int, parts: MlpParts, original: Any, hidden: Tensor) -> Tensor:
        """The MLP with the first neurons only for visual tokens."""
        visual = self._visual(layer)
        if visual is None:
            whole: Tensor = original(hidden)
            return whole
        visual = visual.to(hidden.device)
        count = round(self.pattern.neurons * parts.down.in_features)
        some = hidden[visual]
        inner = parts.activation(F.linear(some, parts.gate.weight[:count], _some(parts.gate.bias, count)))
        inner = inner * F.linear(some, parts.up.weight[:count], _some(parts.up.bias, count))
        text = original(hidden[~visual])
        out = text.new_empty(hidden.shape)
        out[~visual] = text
        out[visual] = F.linear(inner, parts.down.weight[:, :count], parts.down.bias).to(out.dtype)
        return out


def _replace_forward(module: nn.Module, forward: functools.partial[Any]) -> Callable[[], None]:
    """Put ``forward`` on the instance; what is returned undoes it, also where accelerate has wrapped it since."""
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = forward

    def undo() -> None:
        if module.__dict__.get("forward") is not forward:
            if module.__dict__.get(WRAPPED_FORWARD) is forward:
                module.__dict__[WRAPPED_FORWARD] = forward.args[2]
        elif before is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = before

    return undo


def _some(bias: Tensor | None, count: int) -> Tensor | None:
    return None if bias is None else bias[:count]


def neighbour_mask(run: Prefill, layer: int, hidden: Tensor, window: int, whole: Any) -> Tensor | None:
    """The mask of a layer in which visual tokens see only their neighbours on the grid; None where the layer runs none of them."""
    if "flash" in run.kind.implementation:
        raise UnsupportedModelError("neighbour-aware attention needs a mask, which flash attention does not take. Use 'sdpa'.")
    stage, device = run.stage(layer), hidden.device
    key = ("neighbours", -1 if stage is None else stage.start, run.window(layer), run.length(layer), device)
    if key not in run.memo:
        run.memo[key] = _neighbours(run, layer, stage, hidden, window, whole)
    mask: Tensor | None = run.memo[key]
    return mask


def _neighbours(run: Prefill, layer: int, stage: Stage | None, hidden: Tensor, window: int, whole: Any) -> Tensor | None:
    image, device = run.image(layer).to(hidden.device), hidden.device
    number = image.shape[1]
    columns = run.present(layer, run.columns[layer].to(device), number)
    if run.kind.two_way and isinstance(whole, Tensor):
        base = run.mask_before(layer, stage, hidden, whole)
    else:
        base = run.mask_of(columns, number, plain=False, window=run.window(layer), hidden=hidden)
    if base is None:
        return None
    grid, row, column = (part.to(device) if stage is None else take(part, stage.index).to(device) for part in run.prompt.cell)
    reach = (window - 1) // 2
    near = ((row[:, :, None] - row[:, None]).abs() <= reach) & ((column[:, :, None] - column[:, None]).abs() <= reach)
    near = near & (image[:, :, None] == image[:, None]) & (grid[:, :, None] == grid[:, None])
    pairs = (image >= 0)[:, :, None] & (image >= 0)[:, None]
    past = columns.shape[1] - number
    near, pairs = (F.pad(part, (past, 0))[:, None] for part in (near, pairs))
    if base.dtype == torch.bool:
        return torch.where(pairs, near, base)
    shown = torch.zeros((), dtype=base.dtype, device=device)
    return torch.where(pairs, torch.where(near, shown, torch.finfo(base.dtype).min), base)
