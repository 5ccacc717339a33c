"""From pixels to fewer visual tokens, in whichever way a method goes: a smaller picture, fewer patches before the encoder or inside
it, or fewer tokens after it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import InputError, UnsupportedModelError
from ...families import ANY_SIZE
from ...fingerprint import same_signature, signature
from ...methods.base import EncoderReducer, FrontReducer, KeepAll, Method, ProjectorReducer
from ...methods.pixels import PixelReducer
from ...methods.tools.selection import grid_middles
from ...report import Clock
from ...tokens import Reduction, resolve_budget
from ..model.anatomy import Anatomy
from ..model.seams import encode_visuals
from .arrangement import Arrangement, of_full_encoder
from .assembly import Visuals, after_encoder, assembled, unchanged
from .beside import check_joinable, layers_beside
from .blocks import Shrinking
from .encoding import EncodedPictures, Encodings, encode, projector_input
from .packed import check_packs, packed
from .question import Asking
from .reduction import check, reduce, shares

PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}


@dataclass(frozen=True)
class Around:
    """What is around the pictures of one call and modality.

    Attributes
    ----------
    clock : what takes the time.
    asked : gives the question, where the method reads that.
    runs : lengths of the runs of placeholders in the prompts.
    locate : from placeholders of each item to the prompt it belongs to; raises ``InputError`` where they do not fit.
    encodings : where the pictures may be encoded already.
    """

    clock: Clock
    asked: Asking | None = None
    runs: list[int] | None = None
    locate: Callable[[list[int]], list[int]] | None = None
    encodings: Encodings | None = None

    def rows(self, arrangement: Arrangement) -> list[int] | None:
        """The prompt of each item; None where there are no prompts."""
        return None if self.locate is None else self.locate(arrangement.sizes)


def prepare(parts: Anatomy, method: Method) -> FrontReducer:
    """Get a method ready for a model: its weights are loaded, and what acts before the decoder is checked and returned.

    Raises
    ------
    InputError : the method has no weights, or those of a model of other sizes; or it was tuned for another model.
    UnsupportedModelError : the model lacks what the method needs.
    """
    _check_model(parts, method)
    trained = method.trained()
    if trained:
        host = parts.host
        for part in trained:
            part.bind(host)
    front = method.before_decoder()
    _check_front(parts, front)
    return front


def _check_model(parts: Anatomy, method: Method) -> None:
    """Refuse a method that was tuned for another model."""
    made_for = method.made_for
    if made_for is not None and not same_signature(signature(parts.model), made_for["signature"]):
        raise InputError(
            f"{method.name} was tuned for {made_for.get('name')!r}, and this is a model with other weights. Tune it for this one: "
            "foveate tune --model ..."
        )


def _check_front(parts: Anatomy, method: FrontReducer) -> None:
    for layer in method.encoder_layers(len(parts.layers)):
        parts.encoder_block(layer)
    if method.joins_encoder and not method.keeps_all:
        check_joinable(parts, method.name)
    if method.reads_question_state and not method.keeps_all:
        _check_decoder(parts, method)
    if isinstance(method, PixelReducer) and not method.keeps_all:
        check_packs(parts, method)
    if isinstance(method, EncoderReducer) and not method.keeps_all:
        _check_shrinkable(parts, method)
        size = parts.model.config.vision_config.image_size
        grid = parts.grid(*((size, size) if isinstance(size, int) else size))
        if not method.covers(grid[0] * grid[1]):
            Shrinking(parts, method, grid)


def _check_decoder(parts: Anatomy, method: FrontReducer) -> None:
    if parts.decoder_layers == 0:
        raise UnsupportedModelError(
            f"{method.name} has the decoder read the question, and this model was loaded without the layers of its decoder. Use a "
            "method, or a setting of it, that reads input embeddings or no question."
        )


def _check_shrinkable(parts: Anatomy, method: FrontReducer) -> None:
    if not parts.family.shrinkable:
        raise UnsupportedModelError(
            f"{method.name} acts inside the vision encoder, and {parts.family.name} lays out or merges what leaves it by its place "
            "in the picture. Use a method that acts after the encoder, such as 'prumerge+'."
        )


def encode_and_reduce(parts: Anatomy, method: FrontReducer, kwargs: dict[str, Any], around: Around) -> Visuals:
    """Encode pictures, or videos, and reduce their tokens.

    Parameters
    ----------
    parts : where the parts of the model are, for the modality.
    method : what reduces.
    kwargs : arguments of the model's own encoding.
    around : the prompts, the clock, and what is encoded already.

    Raises
    ------
    InputError : the pictures give no grid of tokens, do not fit the prompts, or hold NaN or infinite values.
    UnsupportedModelError : the model is not built so that the method could act.
    """
    parts.check_modality()
    name = PIXELS[parts.modality]
    shape = kwargs[name].shape
    flat = parts.arrangement in ANY_SIZE  # pixels are no pictures there, or only with their padding
    if not flat and len(shape) < 4:
        raise InputError(f"{name} has shape {tuple(shape)}; expected a batch. A single picture is {name}[None].")
    size = shape[-2:]
    patches, whole = (0, 0) if flat else parts.grid(*size), method.keeps_all
    if not flat and not all(patches):
        raise InputError(f"pictures of {size[0]} x {size[1]} pixels are smaller than one patch of the vision encoder.")
    if parts.arrangement in ("grid", "frames"):
        every = patches[0] * patches[1] * (shape[1] if parts.modality == "video" else 1)
        whole = whole or resolve_budget(method.budget, every) == every
    layers = method.encoder_layers(len(parts.layers))
    notes = notes_of(parts, method, bool(layers))
    if method.joins_encoder and not whole:
        check_joinable(parts, method.name)
        layers = (*layers, *layers_beside(parts))
    if isinstance(method, EncoderReducer) and not whole:
        return _shrunk(parts, method, patches, kwargs, around, notes)
    if isinstance(method, PixelReducer) and not whole:
        fewer = packed(parts, method, kwargs, around.clock, around.runs or [])
        if fewer is not None:
            around.rows(fewer.arrangement)
            return replace(fewer, notes=notes)
        whole = True
    if not isinstance(method, ProjectorReducer | EncoderReducer | PixelReducer):
        raise UnsupportedModelError(f"{type(method).__name__} is no ProjectorReducer, EncoderReducer or PixelReducer.")
    reducer = method if isinstance(method, ProjectorReducer) else KeepAll()
    smaller = reducer.picture(patches) if not flat and not whole else None
    if smaller is not None and parts.arrangement == "grid" and parts.projector is not None and parts.takes_any_size:
        return _resized(parts, reducer, patches, smaller, kwargs, around)
    encoded = _encoded(parts, () if whole else layers, kwargs, around, whole, method)
    rows = around.rows(encoded.arrangement)
    if whole and (method.temporal is None or parts.modality == "image"):
        return unchanged(parts, encoded)
    if around.asked is not None and method.reads_question_state:
        with around.clock.measure("question"):
            _ = around.asked.states
    with around.clock.measure("selection"), torch.autocast(encoded.features.device.type, enabled=False):
        found, same = reduce(parts, reducer, encoded, around.asked, rows)  # scores are float32 in mixed precision, too
    if smaller is not None:
        notes.append(f"{method.name}: {parts.tower_kind.model_type} takes no smaller pictures; its features were shrunk instead")
    with around.clock.measure("vision"):
        return unchanged(parts, encoded, notes) if same else assembled(parts, encoded, found, notes)


def _encoded(
    parts: Anatomy, layers: tuple[Any, ...], kwargs: dict[str, Any], around: Around, whole: bool, method: FrontReducer
) -> EncodedPictures:
    """The pictures after the encoder, encoded now or before."""
    joined = method.joins_encoder and not whole
    with around.clock.measure("vision"):
        if around.encodings is not None:
            return around.encodings.get(parts, layers, around.runs, joined)
        return encode(parts, layers, kwargs, project=whole or method.reads_projected, runs=around.runs, joined=joined)


def _shrunk(
    parts: Anatomy, method: EncoderReducer, grid: tuple[int, int], kwargs: dict[str, Any], around: Around, notes: list[str]
) -> Visuals:
    """Fewer patches inside the encoder."""
    _check_shrinkable(parts, method)
    pixels, more = kwargs[PIXELS[parts.modality]], []
    cells = grid[0] * grid[1]
    if parts.modality == "video" and method.budget is not None:  # all frames go through the encoder together
        each = min(shares(method.budget, [cells] * pixels.shape[1]) or [cells])
        method = method.with_budget(max(1, each))
        more = [f"{method.name}: {each} tokens of each frame"]
    if method.temporal is not None and parts.modality == "video":
        more.append(f"{method.name} acts inside the encoder, where temporal= has no effect")
    shrinking = Shrinking(parts, method, grid)
    with around.clock.measure("vision"):
        with shrinking.hooks(), projector_input(parts, skip=True) as seen:
            output = encode_visuals(parts.model.base_model, parts.modality, kwargs)
        features = seen[0]
        lead = features.shape[1] - shrinking.cell.shape[1] - shrinking.tail
        arrangement = of_full_encoder(parts, pixels, lead, grid)
        around.rows(arrangement)
        patches, reduction = shrinking.result(features[:, lead:])
        counts, _ = check(method, cells, patches, reduction, reduction.mask())
        notes = [*notes, *shrinking.notes, *more]
        visuals = after_encoder(parts, output, arrangement, features[:, :lead], reduction, counts, patches, notes)
    return replace(visuals, encoder_counts=shrinking.counts)


def _resized(
    parts: Anatomy,
    method: ProjectorReducer,
    grid: tuple[int, int],
    smaller: tuple[int, int],
    kwargs: dict[str, Any],
    around: Around,
) -> Visuals:
    """A smaller picture: the encoder interpolates its position embeddings. Each token stands in the middle of what it shows."""
    pixels: Tensor = kwargs["pixel_values"]
    size = [side * count // full for side, count, full in zip(pixels.shape[-2:], smaller, grid, strict=True)]
    with around.clock.measure("vision"):
        low, high = pixels.amin((-2, -1), keepdim=True), pixels.amax((-2, -1), keepdim=True)
        small = F.interpolate(pixels.float(), size, mode="bicubic", antialias=True, align_corners=False)
        small = small.to(pixels).clamp(low, high)
        encoded = encode(parts, (), {**kwargs, "pixel_values": small, "interpolate_pos_encoding": True}, project=False)
        features = encoded.features.unflatten(0, (len(pixels), -1))
        lead = features.shape[1] - smaller[0] * smaller[1]
        arrangement = of_full_encoder(parts, pixels, lead, grid)
        around.rows(arrangement)
        reduction = _shown(grid, smaller, pixels)
        patches = features[:, lead:]
        counts, _ = check(method, grid[0] * grid[1], patches, reduction, reduction.mask())
        notes = [f"{method.name}: pictures were shrunk to {size[0]} x {size[1]} pixels before the encoder"]
        return after_encoder(parts, encoded.output, arrangement, features[:, :lead], reduction, counts, patches, notes)


def notes_of(parts: Anatomy, method: FrontReducer, reads: bool) -> list[str]:
    """What has to be said of how a method gets on with this model; ``reads``: it reads encoder layers."""
    notes, kind = [], parts.tower_kind
    if method.reads_cls and not kind.has_cls:
        notes.append(f"{kind.model_type} has no [CLS] token: {method.without_cls}")
    if reads and kind.rotary:
        notes.append(f"{kind.model_type}: queries and keys are read before their rotary embeddings")
    if reads and parts.projector is None and parts.arrangement != "packed":
        notes.append(f"{parts.family.name}: where a visual token stands for several patches, their queries and keys are averaged")
    if method.positions == "compact" and parts.family.mrope:
        notes.append(f"{parts.family.name}: tokens keep their (t, h, w) positions, whatever positions= says")
    if method.reads_question:
        encoder = method.text_encoder()
        own = "a pass of the decoder over it" if method.reads_question_state else "the decoder's input embeddings"
        reader = own if encoder is None else f"the text encoder of {encoder}"
        notes.append(f"{method.name}: the question was read with {reader}")
    return notes


def _shown(grid: tuple[int, int], smaller: tuple[int, int], like: Tensor) -> Reduction:
    """Which cells of a grid the cells of a smaller one show, and their middles."""
    (rows, columns), (r, c) = grid, smaller
    middle = grid_middles(rows, columns, r, c)
    row, column = ((2 * torch.arange(full) + 1) * part // (2 * full) for full, part in zip(grid, smaller, strict=True))
    owner = row[:, None] * c + column
    index, owner = (cells.flatten().to(like.device).expand(len(like), -1) for cells in (middle, owner))
    return Reduction(index, owner=owner)
