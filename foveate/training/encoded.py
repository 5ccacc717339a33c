"""What a frozen vision encoder made of pictures that a training run meets again, kept in memory."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..engine.model.anatomy import Anatomy
from ..engine.model.seams import PRE_ENCODED, has_pixels, of_modality, with_encodings, with_features
from ..engine.vision.arrangement import ARRANGEMENTS, Seen
from ..engine.vision.beside import layers_beside
from ..engine.vision.encoding import EncodedPictures, Encodings, encode
from ..errors import FoveateError, InputError, UnsupportedModelError
from ..methods.base import EncoderReducer, FrontReducer
from ..tokens import EncoderLayer, EncoderTap

IMAGE = "image"
FIELDS = ("query", "keys", "states", "queries", "values")  # of an encoder layer


@dataclass(frozen=True)
class Picture:
    """One picture: what enters the projector [T, C], patches as embedded [P, C], and by layer what was recorded of it."""

    tokens: Tensor
    embedded: Tensor | None
    taps: dict[EncoderLayer, dict[str, Tensor]]

    @property
    def size(self) -> int:
        """Bytes."""
        more = [] if self.embedded is None else [self.embedded]
        return sum(each.nbytes for each in (self.tokens, *more, *(part for tap in self.taps.values() for part in tap.values())))


class Memory:
    """Encoded pictures of a training run, by their pixels. The projector may be trained, and always works anew.

    Parameters
    ----------
    parts, front : of the model, and the method that acts before its decoder.
    most : bytes that are kept; pictures beyond are encoded each time. In one batch, each picture is encoded once in any case.

    Raises
    ------
    InputError : the method acts inside the encoder.
    UnsupportedModelError : pictures of this model have more than one grid, or several sizes.
    """

    def __init__(self, parts: Anatomy, front: FrontReducer, most: float) -> None:
        if isinstance(front, EncoderReducer) and not front.keeps_all:
            raise InputError(f"{front.name} acts inside the vision encoder, which has to run each time. Leave --remember out.")
        if parts.arrangement != "grid" or parts.projector is None:
            raise UnsupportedModelError(
                f"--remember keeps encoded pictures of models with one grid for each, all of one size, and {parts.family.name} is "
                "none of them. Leave it out."
            )
        self.parts, self.most, self.size = parts, most, 0
        self.joined = front.joins_encoder and not front.keeps_all
        beside = layers_beside(parts) if self.joined else ()
        self.layers = tuple(sorted({parts.layer_index(layer) for layer in (*front.encoder_layers(len(parts.layers)), *beside)}))
        self.pictures: dict[bytes, Picture] = {}
        self.heads: dict[EncoderLayer, int] = {}
        self.output: Any = None  # of the model's own encoding, for its class

    def inputs(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Arguments of a model with its pictures encoded, now or earlier."""
        if not has_pixels(batch):
            return batch
        base: Any = self.parts.model.base_model
        visual = of_modality(base, IMAGE, batch)
        pictures = self._of(visual)
        rest = {name: value for name, value in batch.items() if name not in visual}
        return {**rest, PRE_ENCODED: {IMAGE: with_encodings(self.output, Remembered(visual, pictures, self))}}

    @torch.no_grad()
    def _of(self, visual: dict[str, Any]) -> list[Picture]:
        """The pictures of a batch; those that are not known are encoded."""
        pixels: Tensor = visual["pixel_values"]
        keys = [hashlib.sha256(row.contiguous().cpu().view(torch.uint8).numpy()).digest() for row in pixels]
        found = {key: self.pictures[key] for key in keys if key in self.pictures}
        new = {key: number for number, key in enumerate(keys) if key not in found}
        if new:
            rows = torch.tensor(list(new.values()), device=pixels.device)
            inputs = {**visual, "pixel_values": pixels[rows]}
            encoded = self._encoded(inputs)
            self.output = encoded.output
            for number, key in enumerate(new):
                found[key] = picture = self._picture(encoded, number)
                if self.size + picture.size <= self.most:
                    self.pictures[key], self.size = picture, self.size + picture.size
        return [found[key] for key in keys]

    def _encoded(self, inputs: dict[str, Any]) -> EncodedPictures:
        """Pictures as the frozen encoder sees them: without dropout, also where the model around it is trained."""
        tower: Any = self.parts.tower
        training = tower.training
        tower.eval()
        try:
            return encode(self.parts, self.layers, inputs, project=False, joined=self.joined)
        finally:
            tower.train(training)

    def _picture(self, encoded: EncodedPictures, number: int) -> Picture:
        taps = {}
        for layer, tap in encoded.taps.items():
            self.heads[layer] = tap.heads
            found = {name: getattr(tap, name) for name in FIELDS}
            taps[layer] = {name: values[number].clone() for name, values in found.items() if values is not None}
        batch: Any = encoded.batch
        return Picture(batch[number].clone(), None if encoded.embedded is None else encoded.embedded[number].clone(), taps)


class Remembered(Encodings):
    """The pictures of one batch, out of a memory."""

    def __init__(self, visual: dict[str, Any], pictures: list[Picture], memory: Memory) -> None:
        super().__init__({IMAGE: visual})
        self.pictures, self.memory = pictures, memory

    def get(
        self, parts: Anatomy, layers: tuple[EncoderLayer, ...], runs: list[int] | None, joined: bool = False
    ) -> EncodedPictures:
        tokens, project = torch.stack([picture.tokens for picture in self.pictures]), parts.projector
        if project is None:
            raise FoveateError("pictures without a projector are in the memory of a training run. This is a fault of foveate.")
        projected = project(tokens)
        arrangement = ARRANGEMENTS["grid"](Seen(parts, self.inputs[IMAGE], tokens, projected, runs or []))
        taps = {}
        for name in layers:
            number = parts.layer_index(name)
            rows = [picture.taps[number] for picture in self.pictures]
            one: dict[str, Any] = {what: torch.stack([row[what] for row in rows]) for what in rows[0]}
            taps[name] = EncoderTap(heads=self.memory.heads[number], **{"query": None, **one})
        patches = torch.stack([picture.embedded for picture in self.pictures if picture.embedded is not None]) if joined else None
        flat = projected.flatten(0, 1)
        output = with_features(self.memory.output, list(flat.split(arrangement.sizes)))
        return EncodedPictures(output, arrangement, tokens.flatten(0, 1), flat, taps, tokens, patches)
