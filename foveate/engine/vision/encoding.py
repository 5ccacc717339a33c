"""From pixels to fewer visual tokens: the model's own encoder, the method, the model's own projector."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ...errors import FoveateError, InputError, UnsupportedModelError
from ...methods.base import FrontReducer, KeepAll, ProjectorReducer
from ...report import Clock
from ...tokens import EncoderLayer, EncoderTap, Reduction, VisualTokens
from ..model.anatomy import Anatomy
from ..model.seams import deepstack, encode_visuals, marked, recorded_packing, with_features
from .arrangement import ARRANGEMENTS, Arrangement, Seen
from .grouping import Group, Reduced, changed_cells, grouped, joined, keep_every, laid_out
from .question import Asking


@dataclass(frozen=True)
class Visuals:
    """The pictures or videos of one call, encoded and reduced.

    Attributes
    ----------
    output : the encoder output of transformers, with the reduced features.
    embeds : per item [m_i, D] in the space of the decoder.
    reduction : of all units, over their grids.
    kept : per item, which of its placeholders stay, in the order of the features.
    arrangement : of all placeholders.
    changed : False where every token stayed in place: the prompt and the features are then the unmodified model's.
    encoder_counts : per encoder layer [units] tokens that leave it, where they became fewer inside.
    notes : for the report.
    """

    output: Any
    embeds: list[Tensor]
    reduction: Reduction
    kept: list[Tensor]
    arrangement: Arrangement
    changed: bool
    encoder_counts: list[Tensor] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@contextmanager
def _taps(parts: Anatomy, layers: tuple[EncoderLayer, ...]) -> Iterator[dict[EncoderLayer, EncoderTap]]:
    """Record queries and keys of encoder layers while the encoder runs; of [CLS] only its own query.

    Only what the projections return is read, so quantised and LoRA layers work, and any attention implementation.
    """
    taps: dict[EncoderLayer, EncoderTap] = {}
    seen: dict[tuple[EncoderLayer, str], Tensor] = {}
    handles, owner, cls = [], threading.get_ident(), parts.tower_kind.has_cls  # another thread may use the same model
    blocks = {name: parts.encoder_block(name) for name in layers}
    for name, block in blocks.items():
        sources = ((block.query, "qkv"),) if block.fused else ((block.query, "query"), (block.key, "key"))
        for module, what in (*sources, (block.module, "states")):

            def record(_: Any, __: Any, out: Any, name: EncoderLayer = name, what: str = what) -> None:
                if threading.get_ident() == owner:
                    found = (out[0] if isinstance(out, tuple) else out).detach()
                    seen[name, what] = found if found.ndim == 3 else found[None]  # some encoders know no batch

            handles.append(module.register_forward_hook(record))
    try:
        yield taps
        for name, block in blocks.items():
            if block.fused and (name, "qkv") in seen:
                seen[name, "query"], seen[name, "key"], _ = seen.pop((name, "qkv")).chunk(3, -1)
        if len(seen) < 3 * len(layers):
            raise UnsupportedModelError(
                "the vision encoder shows no queries and keys: is it compiled by itself? Compile the whole model instead."
            )
        for name, block in blocks.items():
            query, first = seen[name, "query"], seen[name, "query"][:, 0] if cls else None
            taps[name] = EncoderTap(first, seen[name, "key"], block.heads, seen[name, "states"], queries=None if cls else query)
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def projector_input(parts: Anatomy, skip: bool) -> Iterator[list[Tensor]]:
    """Record what enters the projector; with ``skip`` the projector sees one token per image, as its output is not used.

    Nothing is recorded where the projector does not work on each token by itself.
    """
    seen: list[Tensor] = []
    owner = threading.get_ident()

    def record(_: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if threading.get_ident() != owner:
            return None
        seen.append(args[0])
        return (args[0][:, :1], *args[1:]) if skip else None

    if parts.projector is None:
        yield seen
        return
    handle = parts.projector.register_forward_pre_hook(record)
    try:
        yield seen
    finally:
        handle.remove()


@dataclass(frozen=True)
class EncodedPictures:
    """Pictures or videos after the vision encoder.

    Attributes
    ----------
    output : what the model's own encoding returned.
    arrangement : S placeholders of all items.
    features : [S, C] what methods read: about to enter the projector, or behind it.
    projected : [S, D] behind the projector; None where it did not run on all tokens.
    taps : queries and keys of the patches, of the layers that were asked for.
    batch : [R, T, C] what entered the projector, as it did.
    cells : what ``Arrangement.cells`` made of taps so far.
    """

    output: Any
    arrangement: Arrangement
    features: Tensor
    projected: Tensor | None
    taps: dict[EncoderLayer, EncoderTap]
    batch: Tensor | None = None
    cells: dict[tuple[EncoderLayer, str], Tensor] = field(default_factory=dict)

    @property
    def grid(self) -> tuple[int, int]:
        """Of the first unit."""
        return self.arrangement.units[0].grid

    def tap(self, name: EncoderLayer, group: Group) -> EncoderTap:
        """Queries and keys of the tokens of a group."""
        tap, units = self.taps[name], group.units
        batch = len(units) == len(tap.keys) == len(self.arrangement.sizes)
        if batch and tap.patch_keys.shape[1] == len(units[0].tap):
            return tap  # pictures of one grid each
        rows = torch.tensor([unit.row for unit in units], device=tap.keys.device)
        at = torch.stack([unit.tap for unit in units]).to(tap.keys.device)

        def tokens(what: str) -> Any:
            values = getattr(tap, what)
            if values is None:
                return None
            if (name, what) not in self.cells:
                self.cells[name, what] = self.arrangement.cells(values[:, tap.lead :])
            chosen = self.cells[name, what][at]
            return torch.cat([values[rows, : tap.lead], chosen], 1) if tap.lead else chosen

        query = None if tap.query is None else tap.query[rows]
        return EncoderTap(query, tokens("keys"), tap.heads, tokens("states"), queries=tokens("queries"))


def encode(
    parts: Anatomy, layers: tuple[EncoderLayer, ...], kwargs: dict[str, Any], *, project: bool, runs: list[int] | None = None
) -> EncodedPictures:
    """Run the model's own encoder on pictures, or videos.

    Parameters
    ----------
    parts : where the parts of the model are, for the modality.
    layers : encoder layers to record.
    kwargs : arguments of the model's own encoding.
    project : whether the projection of all tokens is needed.
    runs : lengths of the runs of placeholders in the prompts.

    Raises
    ------
    InputError : the pictures do not give a grid of tokens.
    UnsupportedModelError : the engine does not take this modality.
    """
    base: Any = parts.model.base_model
    skip = not project and parts.projector is not None and parts.arrangement != "packed"
    with _taps(parts, layers) as taps, projector_input(parts, skip) as seen, recorded_packing(base) as packings:
        output = encode_visuals(base, parts.modality, kwargs)
    tokens, packing = seen[0] if seen else None, packings[0] if packings else None
    arrangement = ARRANGEMENTS[parts.arrangement or ""](Seen(parts, kwargs, tokens, output.pooler_output, runs or [], packing))
    projected = None
    if not skip:
        items = output.pooler_output
        projected = items.flatten(0, -2) if isinstance(items, Tensor) else torch.cat(list(items))
    if tokens is None:
        features = projected
    elif packing is not None:
        features = torch.cat(packing(tokens, tokens.new_zeros(tokens.shape[-1])))
    else:
        features = tokens.flatten(0, 1)
    if features is None:
        raise FoveateError("the projector of this model was not seen at work. This is a fault of foveate.")
    return EncodedPictures(output, arrangement, features, projected, taps, tokens)


def reduce(
    parts: Anatomy,
    method: ProjectorReducer,
    encoded: EncodedPictures,
    clock: Clock,
    asked: Asking | None = None,
    rows: list[int] | None = None,
) -> Visuals:
    """Let the method reduce encoded pictures, and project what stays.

    Parameters
    ----------
    parts : where the parts of the model are.
    method : what reduces.
    encoded : with its projection, where the method reads that.
    clock : what takes the time.
    asked : gives the question, where the method reads that.
    rows : the prompt of each item; with ``asked``.

    Raises
    ------
    InputError : the attention or features hold NaN or infinite values.
    FoveateError : the method returned something that breaks its contract.
    """
    arrangement, features, projected = encoded.arrangement, encoded.features, encoded.projected
    if method.reads_projected and projected is None:
        raise FoveateError("a method that reads the question, or projected features, has to say reads_projected. A fault of it.")
    found: list[Reduced] = []
    with clock.measure("selection"), torch.autocast(features.device.type, enabled=False):  # scores are float32 in any case
        units, notes = arrangement.units, notes_of(parts, method)
        if parts.modality == "video" and method.temporal is not None:
            units = changed_cells(arrangement, features, method.temporal)
        same = sum(len(unit.places) for unit in units) == sum(len(unit.places) for unit in arrangement.units)
        for group in grouped(method, arrangement, units):
            places = group.places(arrangement)
            cells = features[places]
            if group.method is None:
                found.append(keep_every(group, cells))
                continue
            behind = projected[places] if projected is not None and method.reads_projected else None
            question = None
            if asked is not None and method.reads_question and behind is not None:
                question = asked(cells, behind, [rows[unit.item] if rows else 0 for unit in group.units])
            taps = {name: encoded.tap(name, group) for name in method.encoder_layers(len(parts.layers))}
            reduction = group.method.reduce(VisualTokens(cells, group.units[0].shape, taps, behind, question))
            if reduction.added is not None and parts.projector is None:
                raise UnsupportedModelError(
                    f"{method.name} hands on [CLS] in front of the projector, where {parts.family.name} has no visual tokens yet. "
                    "Use another method."
                )
            outputs = reduction.apply(cells)
            counts, in_place = check(method, cells.shape[1], outputs, reduction, reduction.mask())
            same = same and in_place
            found.append(Reduced(group, reduction, counts, outputs))
        same = same and sum(sum(reduced.counts) for reduced in found) == sum(len(unit.places) for unit in units)
    with clock.measure("vision"):
        if same:
            return replace(unchanged(parts, encoded), notes=notes)
        return assembled(parts, encoded, found, notes)


def assembled(parts: Anatomy, encoded: EncodedPictures, found: list[Reduced], notes: list[str]) -> Visuals:
    """What groups left, projected, in the order of the prompt."""
    arrangement, projected = encoded.arrangement, encoded.projected
    layout = laid_out(arrangement, found)
    pure = all(reduced.reduction.weights is None and reduced.reduction.added is None for reduced in found)
    source = projected if projected is not None and (pure or parts.projector is None) else encoded.features
    outputs = _outputs(arrangement, found, source, made=source is encoded.features)
    if source is projected:
        pool = torch.cat([outputs, projected[layout.fixed]])
    elif projected is None:
        pool = _projected(parts, torch.cat([outputs, encoded.features[layout.fixed]]))
    else:
        pool = torch.cat([_projected(parts, outputs), projected[layout.fixed]])
    embeds = [pool[order] for order in layout.order]
    levels = deepstack(encoded.output)
    if levels is not None:
        whole = [torch.cat(list(level)) for level in levels]
        pools = [torch.cat([_outputs(arrangement, found, level), level[layout.fixed]]) for level in whole]
        levels = [[pool[order] for order in layout.order] for pool in pools]
    output = with_features(encoded.output, embeds, levels)
    return Visuals(output, embeds, joined(arrangement, found), layout.kept, arrangement, changed=True, notes=notes)


def _outputs(arrangement: Arrangement, found: list[Reduced], source: Tensor, *, made: bool = False) -> Tensor:
    """[sum of counts, C] what all groups keep of ``source`` [S, C], one group behind the other; ``made``: it is at hand already."""
    kept = []
    for reduced in found:
        outputs = reduced.outputs if made else reduced.reduction.apply(source[reduced.group.places(arrangement)])
        kept.append(outputs[reduced.reduction.mask()])
    return torch.cat(kept)


def _projected(parts: Anatomy, tokens: Tensor) -> Tensor:
    """[S, C] -> [S, D], by the model's projector."""
    if parts.projector is None:
        raise FoveateError("tokens of this model are merged behind its projector. This is a fault of foveate.")
    behind: Tensor = parts.projector(tokens[None])[0]
    return behind


def notes_of(parts: Anatomy, method: FrontReducer) -> list[str]:
    """What has to be said of how a method got on with this model."""
    notes, kind, reads = [], parts.tower_kind, bool(method.encoder_layers(len(parts.layers)))
    if method.reads_cls and not kind.has_cls:
        notes.append(f"{kind.model_type} has no [CLS] token: {method.without_cls}")
    if reads and kind.rotary:
        notes.append(f"{kind.model_type}: queries and keys are read in front of their rotary embeddings")
    if reads and parts.projector is None and parts.arrangement != "packed":
        notes.append(f"{parts.family.name}: where a visual token stands for several patches, their queries and keys are averaged")
    if method.positions == "compact" and parts.family.mrope:
        notes.append(f"{parts.family.name}: tokens keep their (t, h, w) positions, whatever positions= says")
    if method.reads_question:
        encoder = method.text_encoder()
        reader = "the decoder's input embeddings" if encoder is None else f"the text encoder of {encoder}"
        notes.append(f"{method.name}: the question was read with {reader}")
    return notes


def unchanged(parts: Anatomy, encoded: EncodedPictures) -> Visuals:
    """Every token of every item."""
    arrangement, projected, output = encoded.arrangement, encoded.projected, encoded.output
    if projected is not None:
        embeds = list(projected.split(arrangement.sizes))
    elif encoded.batch is not None and parts.projector is not None:  # in the shape that the model itself projects
        projected = parts.projector(encoded.batch).flatten(0, 1)
        embeds = list(projected.split(arrangement.sizes))
        output = with_features(output, embeds)
    else:
        raise FoveateError("an encoder that was not asked to project showed no features. This is a fault of foveate.")
    kept = [torch.arange(size, device=projected.device) for size in arrangement.sizes]
    groups = [
        keep_every(group, encoded.features[group.places(arrangement)])
        for group in grouped(KeepAll(), arrangement, arrangement.units)
    ]
    return Visuals(marked(output), embeds, joined(arrangement, groups), kept, arrangement, changed=False)


def check(method: FrontReducer, number: int, reduced: Tensor, reduction: Reduction, valid: Tensor) -> tuple[list[int], bool]:
    """Counts per image and whether nothing changed, with one transfer from the device; the contract is checked on the way."""
    batch, index = len(reduced), reduction.index
    flags = torch.stack(
        [
            torch.isfinite(reduced).all() & (True if reduction.scores is None else torch.isfinite(reduction.scores).all()),
            ((index >= 0) & (index < number) | ~valid).all(),
            (index == torch.arange(index.shape[1], device=index.device)).all() & valid.all(),
        ]
    )
    *counts, finite, inside, ordered = torch.cat([valid.sum(1), flags]).tolist()
    if not finite:
        raise InputError(
            f"{method.name}: the vision encoder gave NaN or infinite values. Check the picture, and the dtype of the model "
            "(float16 overflows on some encoders: use bfloat16 or float32)."
        )
    if not inside or index.shape[0] != batch or not 1 <= min(counts) <= max(counts) <= number:
        raise FoveateError(
            f"{method.name} kept no token of an image, more tokens than there are, or one that does not exist. "
            "This is a fault of the method."
        )
    return counts, bool(ordered) and index.shape[1] == number and reduction.weights is None
