"""Asking a method what stays before a decoder layer, checking its answer, and laying out what runs from there on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ...cuts import Cut, DecoderTap, PromptTokens
from ...errors import FoveateError, InputError
from ...methods.base import DecoderReducer
from ...methods.fields import raise_undeclared
from ...report import CutRecord
from ..model.marks import mark_cuts
from ..model.seams import CACHE, cached_keys
from .attention import OnlyRecording
from .forward import Prefill
from .masks import seen_by
from .stages import Stage, take


def cut_before(
    run: Prefill, layer: int, reducer: DecoderReducer, module: nn.Module, hidden: Tensor, kwargs: dict[str, Any]
) -> Tensor:
    """Hidden states [B, M, D] -> [B, M', D] of what stays before a layer."""
    before = run.stage(layer)
    gone = before is not None and before.visual == 0 and not reducer.removes_text
    if layer not in run.decided and not gone:  # gradient checkpointing comes here twice
        run.decided.add(layer)
        with torch.set_grad_enabled(reducer.trains and torch.is_grad_enabled()), run.report.clock.measure("selection"):
            _decide(run, layer, reducer, module, hidden if reducer.trains else hidden.detach(), kwargs)
    stage, cut = run.stages.get(layer), run.mixes.get(layer)
    if stage is None:
        return hidden
    if cut is not None:
        hidden = _mixed(hidden, cut)
    return take(hidden, stage.order)


def _mixed(hidden: Tensor, cut: Cut) -> Tensor:
    """Hidden states with the tokens at ``cut.target`` replaced by their mixes."""
    target, mix = cut.target, cut.mix
    if target is None or mix is None:
        return hidden
    mixed = (mix.to(hidden) @ hidden).to(hidden.dtype)
    spare = target.masked_fill((mix == 0).all(-1), hidden.shape[1])  # rows of zeros go to a column that is cut off again
    longer = nn.functional.pad(hidden, (0, 0, 0, 1))
    return longer.scatter(1, spare[..., None].expand_as(mixed), mixed)[:, :-1]


def _decide(run: Prefill, layer: int, reducer: DecoderReducer, module: nn.Module, hidden: Tensor, kwargs: dict[str, Any]) -> None:
    before = run.stage(layer)
    tokens = _tokens(run, layer, reducer, module, hidden, kwargs)
    with torch.autocast(hidden.device.type, enabled=False):  # scores are float32 in mixed precision too
        cut = _cut(reducer, tokens)
    keep, counts, visual, changed = _checked(reducer, tokens, cut)
    if not changed and before is None and (run.earlier is None or not run.earlier.held):
        return
    run.stages[layer] = stage = _laid_out(run, layer, reducer, tokens, keep, counts, visual)
    if cut.mix is not None:
        run.mixes[layer] = cut
    left = take(tokens.image, stage.order).masked_fill(~stage.valid, -1)
    run.report.cuts.append(CutRecord(layer, left, stage.index, tokens.image, tokens.columns, cut.scores))
    run.note_columns(layer)
    run.hold(layer, stage)
    if run.cuts is not None:
        mark_cuts(run.cache, run.cuts)


def _checked(reducer: DecoderReducer, tokens: PromptTokens, cut: Cut) -> tuple[Tensor, list[int], int, bool]:
    """What really stays [B, S], how many in each row, how many visual tokens in all, and whether anything changes.

    With one transfer from the device.
    """
    shape, name = tokens.valid.shape, reducer.name
    if not isinstance(cut, Cut) or cut.keep.shape != shape or cut.keep.dtype != torch.bool:
        raise FoveateError(f"{name} returned no Cut with a mask of its {tuple(shape)} tokens. This is a fault of the method.")
    if cut.scores is not None and cut.scores.shape != shape:
        raise FoveateError(f"{name}: Cut.scores have to be of shape {tuple(shape)}. This is a fault of the method.")
    text = tokens.valid & ~tokens.visual
    stays = tokens.protected if reducer.removes_text else text
    keep = (cut.keep & (text | tokens.visual) & tokens.valid) | stays
    # what follows the prompt is predicted from its last token, which may be a visual one
    keep = keep.scatter(1, tokens.last[:, None], True)
    values = tokens.hidden if cut.scores is None else cut.scores.masked_fill(~tokens.visual, 0)
    flags = torch.stack([(keep & tokens.visual).sum(), torch.isfinite(values).all(), (keep == tokens.valid).all()])
    *counts, visual, finite, same = torch.cat([keep.sum(1), flags]).tolist()
    if not finite:
        raise InputError(
            f"{reducer.name}: NaN or infinite values before decoder layer {tokens.layer}. Check the inputs, and the dtype of the "
            "model (float16 overflows in some decoders: use bfloat16 or float32)."
        )
    return keep, counts, visual, not same or cut.mix is not None


def _cut(reducer: DecoderReducer, tokens: PromptTokens) -> Cut:
    try:
        return reducer.cut(tokens)
    except (AttributeError, TypeError) as error:
        raise_undeclared(reducer, error, {} if tokens.tap is not None else {"tokens.tap": "reads = 'previous' or 'own'"})
        raise


def _laid_out(
    run: Prefill, layer: int, reducer: DecoderReducer, tokens: PromptTokens, keep: Tensor, counts: list[int], visual: int
) -> Stage:
    """What runs from ``layer`` on, aligned to the right."""
    width, before, held = max(*counts, 1), run.stage(layer), run.held(layer)
    order = keep.long().argsort(dim=1, stable=True)[:, -width:]
    index, valid = take(tokens.columns, order), take(keep, order)
    original = run.positions.to(index.device).expand(run.rows, -1)
    earlier = None if held is None else held.shift
    positions, shift = None, earlier
    if reducer.positions == "compact" and not run.several:
        real = run.prompt.valid.long()
        first, last = real.argmax(1, keepdim=True), run.width - 1 - real.flip(1).argmax(1, keepdim=True)
        start = original.gather(1, first) - (0 if earlier is None else earlier)
        positions = (start + valid.long().cumsum(1) - 1).clamp(min=0)
        shift = original.gather(1, last) - positions[:, -1:]
    elif before is not None and before.positions is not None:
        positions, shift = take(before.positions, order), before.shift
    elif earlier is not None:
        positions = (take(original, index) - earlier).clamp(min=0)
    return Stage(layer, order, index, valid, min(counts) == width, visual, positions, shift)


def _tokens(
    run: Prefill, layer: int, reducer: DecoderReducer, module: nn.Module, hidden: Tensor, kwargs: dict[str, Any]
) -> PromptTokens:
    """What the method sees."""
    start, before = run.tokens, run.stage(layer)
    here = start
    if before is not None:
        index, valid = before.index, before.valid
        here = replace(
            start,
            image=take(start.image, index).masked_fill(~valid, -1),
            valid=valid,
            question=take(start.question, index) & valid,
            prompt_text=take(start.prompt_text, index) & valid,
            protected=take(start.protected, index) & valid,
            last=((index <= start.last[:, None]) & valid).long().cumsum(1).argmax(1),
            columns=index,
        )
    if reducer.reads == "nothing":
        return replace(here, hidden=hidden, layer=layer, start=start)
    source = layer - (reducer.reads == "previous")
    if reducer.reads == "own":
        _run_dry(run, layer, module, hidden, kwargs)
    query, keys, scale, softcap = run.recorded.pop(source)
    columns = run.columns[source][:, -keys.shape[2] :].to(hidden.device)
    mask = seen_by(run.given.pop(source, None)) if run.kind.two_way else None
    tap = DecoderTap(query.to(hidden.device), keys.to(hidden.device), scale, softcap, columns, run.window(source), mask)
    return replace(here, hidden=hidden, layer=layer, tap=tap, start=start)


def _run_dry(run: Prefill, layer: int, module: nn.Module, hidden: Tensor, kwargs: dict[str, Any]) -> None:
    """The layer's own queries and keys for the tokens that are about to be cut: it runs up to its attention."""
    stage = run.stage(layer)
    run.note_columns(layer)
    inputs = {**kwargs, **({} if stage is None else run.inputs(layer, stage, hidden, kwargs))}
    run.given[layer] = run.mask_before(layer, stage, hidden, kwargs["attention_mask"])
    inputs |= {CACHE: None, "attention_mask": None}
    numbered = run.numbered_as_held(layer, stage)
    if numbered is not None:
        inputs["position_embeddings"] = run.rotary(layer, hidden, numbered, -1 - layer)
        if run.kind.reads_positions:
            inputs["position_ids"] = numbered
    inputs.pop("hidden_states", None)
    learning = [part for part in module.modules() if part.training]  # no dropout: neither its noise nor its random numbers
    module.eval()
    run.dry = True
    try:
        module.forward(hidden, **inputs)
    except OnlyRecording:
        pass
    finally:
        run.dry = False
        for part in learning:
            part.training = True
    earlier = cached_keys(run.cache, layer)
    if earlier is not None:
        recorded = run.recorded[layer]
        run.recorded[layer] = recorded._replace(keys=torch.cat([earlier.to(recorded.keys), recorded.keys], 2))
