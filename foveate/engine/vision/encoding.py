"""The model's own vision encoder at work: what it gives, and what methods asked to see of its layers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ...errors import FoveateError, UnsupportedModelError
from ...tokens import EncoderLayer, EncoderTap
from ..model.anatomy import Anatomy
from ..model.late import with_projection
from ..model.seams import encode_visuals, recorded_packing
from .arrangement import ARRANGEMENTS, Arrangement, Seen, Unit
from .beside import Beside, beside, layers_beside


@contextmanager
def _taps(parts: Anatomy, layers: tuple[EncoderLayer, ...], values: bool = False) -> Iterator[dict[EncoderLayer, EncoderTap]]:
    """Record queries and keys of encoder layers while the encoder runs; of [CLS] only its own query. Also their ``values``.

    Only what the projections return is read, so quantised and LoRA layers work, and any attention implementation.
    """
    taps: dict[EncoderLayer, EncoderTap] = {}
    seen: dict[tuple[EncoderLayer, str], Tensor] = {}
    handles, owner, cls = [], threading.get_ident(), parts.tower_kind.has_cls  # another thread may use the same model
    blocks = {name: parts.encoder_block(name) for name in layers}
    for name, block in blocks.items():
        sources = [(block.query, "qkv")] if block.fused else [(block.query, "query"), (block.key, "key")]
        sources += [(block.value, "value")] if values and not block.fused else []
        for module, what in (*sources, (block.module, "states")):

            def record(_: Any, __: Any, out: Any, name: EncoderLayer = name, what: str = what) -> None:
                if threading.get_ident() == owner:
                    given = (out[0] if isinstance(out, tuple) else out).detach()
                    given = given.flatten(2) if given.ndim == 4 else given  # head by head
                    given = given if given.ndim == 3 else given[None]  # some encoders know no batch
                    seen[name, what] = given.roll(1, 1) if parts.tower_kind.cls_last else given

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
            # the query of [CLS] alone is a copy, so that those of all patches can go
            query, first = seen[name, "query"], seen[name, "query"][:, 0].clone() if cls else None
            taps[name] = EncoderTap(
                first,
                seen[name, "key"],
                block.heads,
                seen[name, "states"],
                queries=None if cls else query,
                values=seen.get((name, "value")),
            )
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _embedded(parts: Anatomy, wanted: bool) -> Iterator[list[Tensor]]:
    """Record patches [R, N, C] as they are embedded, where they are wanted."""
    seen: list[Tensor] = []
    owner = threading.get_ident()

    def record(_: Any, __: Any, out: Tensor) -> None:
        if threading.get_ident() == owner:
            seen.append(out.detach().flatten(2).transpose(1, 2))

    handle = parts.embedding.register_forward_hook(record) if wanted else None
    try:
        yield seen
    finally:
        if handle is not None:
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
    features : [S, C] what methods read: about to enter the projector, or after it.
    projected : [S, D] after the projector; None where it did not run on all tokens.
    taps : queries and keys of the patches, of the layers that were asked for.
    batch : [R, T, C] what entered the projector, as it did.
    embedded : [R, P, C] patches before their positions are added, for methods that join the encoder.
    cells : what ``Arrangement.cells`` made of taps so far.
    """

    output: Any
    arrangement: Arrangement
    features: Tensor
    projected: Tensor | None
    taps: dict[EncoderLayer, EncoderTap]
    batch: Tensor | None = None
    embedded: Tensor | None = None
    cells: dict[tuple[EncoderLayer, str], Tensor] = field(default_factory=dict)

    def tap(self, name: EncoderLayer, units: list[Unit]) -> EncoderTap:
        """Queries and keys of the tokens of some units, which have the same shape."""
        tap = self.taps[name]
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
        return EncoderTap(query, tokens("keys"), tap.heads, tokens("states"), queries=tokens("queries"), values=tokens("values"))

    def beside(self, parts: Anatomy, units: list[Unit]) -> Beside:
        """The encoder for tokens beside those of some units, which have the same shape."""
        if self.embedded is None:
            raise FoveateError("the encoder ran without what tokens beside its patches need. This is a fault of foveate.")
        at = torch.stack([unit.tap for unit in units]).to(self.embedded.device)
        taps = {layer: self.tap(layer, units) for layer in layers_beside(parts)}
        return beside(parts, taps, self.arrangement.cells(self.embedded)[at])


def encode(
    parts: Anatomy,
    layers: tuple[EncoderLayer, ...],
    kwargs: dict[str, Any],
    *,
    project: bool,
    runs: list[int] | None = None,
    joined: bool = False,
) -> EncodedPictures:
    """Run the model's own encoder on pictures, or videos.

    Parameters
    ----------
    parts : where the parts of the model are, for the modality.
    layers : encoder layers to record.
    kwargs : arguments of the model's own encoding.
    project : whether the projection of all tokens is needed.
    runs : lengths of the runs of placeholders in the prompts.
    joined : whether tokens are to run beside the patches later.

    Raises
    ------
    InputError : the pictures do not give a grid of tokens.
    UnsupportedModelError : the engine does not take this modality.
    """
    base: Any = parts.model.base_model
    skip = not project and parts.projector is not None and parts.arrangement != "packed"
    with (
        _taps(parts, layers, joined) as taps,
        _embedded(parts, joined) as patches,
        projector_input(parts, skip) as seen,
        recorded_packing(base) as packings,
    ):
        output = with_projection(parts, encode_visuals(base, parts.modality, kwargs))
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
    return EncodedPictures(output, arrangement, features, projected, taps, tokens, torch.cat(patches) if patches else None)


class Encodings:
    """The pictures of one call, encoded once for any number of methods.

    What a method reads of encoder layers is recorded when one first asks for it: the pictures are encoded again then, and all that
    was recorded before, too.

    Parameters
    ----------
    inputs : by modality, arguments of the model's own encoding.
    tap : changes what was recorded of a layer; None = it stays.
    """

    def __init__(self, inputs: dict[str, dict[str, Any]], tap: Callable[[EncoderTap], EncoderTap] | None = None) -> None:
        self.inputs, self._tap = inputs, tap
        self._encoded: dict[str, EncodedPictures] = {}
        # layers that were recorded, the runs of placeholders, and whether tokens can run beside the patches
        self._known: dict[str, tuple[set[int], list[int] | None, bool]] = {}

    def get(
        self, parts: Anatomy, layers: tuple[EncoderLayer, ...], runs: list[int] | None, joined: bool = False
    ) -> EncodedPictures:
        """Encoded pictures of a modality, with their projection and the layers that were asked for, by the names used for them."""
        index, kind = {layer: parts.layer_index(layer) for layer in layers}, parts.modality
        known, before, beside = self._known.get(kind, (set(), None, False))
        if kind not in self._encoded or not known >= set(index.values()) or runs not in (None, before) or joined > beside:
            known, joined = known | set(index.values()), joined or beside
            self._known[kind] = (known, runs, joined)
            encoded = encode(parts, tuple(sorted(known)), self.inputs[kind], project=True, runs=runs, joined=joined)
            if self._tap is not None:
                encoded = replace(encoded, taps={layer: self._tap(tap) for layer, tap in encoded.taps.items()})
            self._encoded[kind] = encoded
        found = self._encoded[kind]
        return replace(found, taps={name: found.taps[number] for name, number in index.items()})

    def output(self, parts: Anatomy) -> Any:
        """What the model's own encoding returned."""
        return self.get(parts, (), None).output

    @property
    def nbytes(self) -> int:
        """Of all that is kept: pixels, visual tokens, and what was recorded of encoder layers so far."""
        storages: dict[int, int] = {}

        def look(value: Any) -> None:
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
            elif isinstance(value, dict | list | tuple):
                for each in value.values() if isinstance(value, dict) else value:
                    look(each)
            elif isinstance(value, EncoderTap):
                look(vars(value))

        look(self.inputs)
        for each in self._encoded.values():
            look([each.output, each.features, each.projected, each.taps, each.batch, each.embedded, each.cells])
        return sum(storages.values())
