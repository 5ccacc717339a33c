"""From pixels to fewer visual tokens: the model's own encoder, the method, the model's own projector."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import FoveateError, InputError, UnsupportedModelError
from ..methods.base import FrontReducer, TokenReducer
from ..report import Clock
from ..tokens import EncoderLayer, EncoderTap, Reduction, VisualTokens, keep_all
from .asking import Asking
from .families import Anatomy
from .seams import encode_images, with_features


@dataclass(frozen=True)
class Visuals:
    """The pictures of one call, encoded and reduced.

    Attributes
    ----------
    output : the encoder output of transformers, with the reduced features.
    embeds : per image [m_i, D] in the space of the decoder.
    reduction : of all images, over the grid.
    kept : per image, which of its placeholders stay, in the order of the features.
    size : placeholders per image; the first ``size - rows * columns`` of them stand for no grid cell and always stay.
    changed : False where every token stayed in place: the prompt and the features are then the unmodified model's.
    encoder_counts : per encoder layer [B] tokens that leave it, where they became fewer inside.
    notes : for the report.
    """

    output: Any
    embeds: list[Tensor]
    reduction: Reduction
    kept: list[Tensor]
    size: int
    grid: tuple[int, int]
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
        for module, what in ((block.query, "query"), (block.key, "key"), (block.module, "states")):

            def record(_: Any, __: Any, out: Any, name: EncoderLayer = name, what: str = what) -> None:
                if threading.get_ident() == owner:
                    seen[name, what] = (out[0] if isinstance(out, tuple) else out).detach()

            handles.append(module.register_forward_hook(record))
    try:
        yield taps
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
    """Record what enters the projector; with ``skip`` the projector sees one token per image, as its output is not used."""
    seen: list[Tensor] = []
    owner = threading.get_ident()

    def record(_: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if threading.get_ident() != owner:
            return None
        seen.append(args[0])
        return (args[0][:, :1], *args[1:]) if skip else None

    handle = parts.projector.register_forward_pre_hook(record)
    try:
        yield seen
    finally:
        handle.remove()


@dataclass(frozen=True)
class Encoded:
    """Pictures after the vision encoder.

    Attributes
    ----------
    output : what the model's ``get_image_features`` returned.
    features : [B, lead + N, C] about to enter the projector.
    grid : rows and columns, N = rows * columns.
    lead : 1 where [CLS] stands among the visual tokens, else 0.
    taps : queries and keys of the layers that were asked for.
    """

    output: Any
    features: Tensor
    grid: tuple[int, int]
    lead: int
    taps: dict[EncoderLayer, EncoderTap]

    @property
    def cells(self) -> Tensor:
        """[B, N, C] the features of the grid."""
        return self.features[:, self.lead :]


def encode(parts: Anatomy, layers: tuple[EncoderLayer, ...], kwargs: dict[str, Any], *, project: bool, **options: Any) -> Encoded:
    """Run the model's own encoder on the pictures in ``kwargs`` (taken out of it).

    Parameters
    ----------
    parts : where the parts of the model are.
    layers : encoder layers to record.
    kwargs : arguments of the call.
    project : whether the projection of all tokens is needed.
    **options : of the vision encoder.

    Raises
    ------
    InputError : the pictures do not give a grid of tokens.
    """
    pixels = kwargs["pixel_values"]
    grid = parts.grid(*pixels.shape[-2:])
    with _taps(parts, layers) as taps, projector_input(parts, skip=not project) as seen:
        output = encode_images(parts.model.base_model, kwargs, **options)
    features = seen[0]
    lead = features.shape[1] - grid[0] * grid[1]
    if lead not in (0, 1):
        raise InputError(
            f"pictures of {pixels.shape[-2]} x {pixels.shape[-1]} pixels gave features {tuple(features.shape)} and not a grid of "
            f"{grid[0]} x {grid[1]} tokens."
        )
    return Encoded(output, features, grid, lead, taps)


def reduce(parts: Anatomy, method: TokenReducer, encoded: Encoded, clock: Clock, asked: Asking | None = None) -> Visuals:
    """Let the method reduce encoded pictures, and project what stays.

    Parameters
    ----------
    parts : where the parts of the model are.
    method : what reduces.
    encoded : with its projection, where the method reads that.
    clock : what takes the time.
    asked : gives the question, where the method reads that.

    Raises
    ------
    InputError : the attention or features hold NaN or infinite values.
    FoveateError : the method returned something that breaks its contract.
    """
    lead = encoded.lead
    device = encoded.features.device.type
    cells = encoded.cells
    with clock.measure("selection"), torch.autocast(device, enabled=False):  # scores are float32 in mixed precision too
        projected = torch.stack(list(encoded.output.pooler_output)) if method.reads_projected else None
        places = None if projected is None else projected[:, lead:]
        question = asked(cells, _given(places)) if asked is not None and method.reads_question else None
        reduction = method.reduce(VisualTokens(cells, encoded.grid, encoded.taps, places, question))
        reduced, valid = reduction.apply(cells), reduction.mask()
        counts, in_place = check(method, cells.shape[1], reduced, reduction, valid)
    notes = notes_of(parts, method)
    with clock.measure("vision"):
        if in_place:
            every = list(parts.projector(encoded.features)) if projected is None else list(projected)
            return replace(unchanged(encoded, every), notes=notes)
        if projected is not None and reduction.weights is None and reduction.added is None:  # a choice of what is projected already
            whole = kept_tokens(torch.cat([projected[:, :lead], reduction.apply(_given(places))], 1), valid, lead)
        else:
            whole = parts.projector(kept_tokens(torch.cat([encoded.features[:, :lead], reduced], 1), valid, lead)[None])[0]
    return reduced_visuals(encoded.output, whole, reduction, counts, lead, encoded.grid, notes)


def _given(tensor: Tensor | None) -> Tensor:
    if tensor is None:
        raise FoveateError("a method that reads the question, or projected features, has to say reads_projected. A fault of it.")
    return tensor


def notes_of(parts: Anatomy, method: FrontReducer) -> list[str]:
    """What has to be said of how a method got on with this model."""
    notes = []
    if method.reads_cls and not parts.tower_kind.has_cls:
        notes.append(f"{parts.tower_kind.model_type} has no [CLS] token: {method.without_cls}")
    if method.reads_question:
        encoder = method.text_encoder()
        reader = "the decoder's input embeddings" if encoder is None else f"the text encoder of {encoder}"
        notes.append(f"{method.name}: the question was read with {reader}")
    return notes


def kept_tokens(features: Tensor, valid: Tensor, lead: int) -> Tensor:
    """The valid tokens of all images, one behind the other: [B, lead + M, C] -> [sum of m_i, C]."""
    return features[torch.cat([valid.new_ones(len(valid), lead), valid], 1)]


def reduced_visuals(
    output: Any, projected: Tensor, reduction: Reduction, counts: list[int], lead: int, grid: tuple[int, int], notes: list[str]
) -> Visuals:
    """Reduced pictures from the projected tokens of all of them [sum of m_i, D]; ``counts`` is how many grid tokens each keeps."""
    embeds = list(projected.split([count + lead for count in counts]))
    first = torch.arange(lead, device=reduction.index.device)
    chosen = reduction.index[reduction.mask()].split(counts)
    kept = [torch.cat([first, index + lead]) for index in chosen]
    size = lead + grid[0] * grid[1]
    return Visuals(with_features(output, embeds), embeds, reduction, kept, size, grid, changed=True, notes=notes)


def unchanged(encoded: Encoded, embeds: list[Tensor]) -> Visuals:
    """Every token of every picture, projected to ``embeds``."""
    size = encoded.features.shape[1]
    kept = [torch.arange(size, device=encoded.features.device)] * len(embeds)
    output = with_features(encoded.output, embeds)
    return Visuals(output, embeds, keep_all(encoded.cells), kept, size, encoded.grid, changed=False)


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
