"""Training batches of the second pocket model: pictures, pairs of pictures or clips of one size, many questions each, and the
targets of the auxiliary losses.

Batch number ``step`` of process ``rank`` is a function of (seed, step, rank): training can stop and resume anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from random import Random

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..batches import BINS, Phased
from ..batches import PATCH_TARGETS as STILL_TARGETS
from ..questions import PocketQuestion
from ..rows import IGNORE, Language
from ..scenes import PATCH, owners
from ..vocabulary import CHARACTERS, COLORS, SHAPES
from .clips import Actor, Clip, draw_clip, draw_clip_shape
from .encoding import order
from .grounding import GROUNDING, Shown, bins, grounding, written
from .pictures import CELL, Picture, draw_picture, draw_size
from .questions import EVENTS, FAMILIES, ask
from .vocabulary import DIRECTIONS, END, PAD, TOKEN_ID

# what each patch is asked about, and with how many classes
PATCH_TARGETS = {**STILL_TARGETS, "motion": 1 + len(DIRECTIONS)}
INTERVALS = (0.34, 1, 1.5, 2, 2, 2, 2, 3, 4, 8)  # positions from one temporal patch to the next; 2 is the clips' own rate
ORDINALS = ("first", "second")
EVENT_CLASSES = ("nothing", *EVENTS)
COLOR_NAMES, TARGET_NAMES = tuple(COLORS), tuple(PATCH_TARGETS)


@dataclass
class Batch:
    """B samples of V pictures, or of one clip of F frames, with T text tokens.

    Questions of a sample stand one after the other; ``block`` tells them apart, so that each sees the pictures and itself.
    """

    frames: Tensor  # uint8 [B * V, F, H, W, 3]; F = 1 for pictures
    patches: Tensor  # int8 [B * V, patches, len(PATCH_TARGETS)] classes in the order of the encoder, IGNORE = not asked
    tokens: Tensor  # int8 [B * V, tokens, len(PATCH_TARGETS)]
    events: Tensor  # int8 [B * V, tokens] what happens there and then, as in EVENT_CLASSES
    ids: Tensor  # [B, T]
    block: Tensor  # [B, T], -1 = padding
    offset: Tensor  # [B, T] position inside its question
    labels: Tensor  # [B, T] next token where it is part of the answer
    family: Tensor  # [B, T]
    grounding: Tensor  # [B, T, len(GROUNDING)], IGNORE = none
    interval: Tensor  # [] positions from one temporal patch to the next

    def to(self, device: torch.device | str) -> Batch:
        return Batch(*(getattr(self, field.name).to(device, non_blocking=True) for field in fields(self)))


@dataclass(frozen=True)
class _Thing:
    """What cells of a picture show: classes of PATCH_TARGETS, and where characters begin in pixels of the picture."""

    facts: dict[str, int]
    text: str = ""
    left: int = 0
    starts: tuple[float, ...] = ()


def _shape(name: str, color: str, motion: int, large: bool) -> dict[str, int]:
    return {"kind": 1 + SHAPES.index(name), "color": COLOR_NAMES.index(color), "motion": motion, "size": int(large)}


def _sign(text: str) -> dict[str, int]:
    return {"kind": 2 + len(SHAPES) if text.isdigit() else 1 + len(SHAPES)} | written(text)


def _things_of(picture: Picture) -> list[_Thing]:
    found = []
    for item in picture.items:
        facts = dict(zip(("column", "row"), bins(item.center, picture.size), strict=True))
        if item.kind == "shape":
            found.append(_Thing(facts | _shape(item.name, item.color or "", 0, item.large)))
        elif item.kind == "digit":
            found.append(_Thing(facts | {"kind": 3 + len(SHAPES), "digit": int(item.name)}))
        else:
            board = {"color": COLOR_NAMES.index(item.color)} if item.color else {}
            found.append(_Thing(facts | _sign(item.name) | board, item.name, item.box[0], item.character_starts))
    return found


def _motion(actor: Actor) -> int:
    return 1 + DIRECTIONS.index(actor.direction) if actor.direction else 0


def _things_at(clip: Clip, patch: int) -> list[_Thing]:
    found = []
    for actor in clip.actors:
        places = dict(zip(("column", "row"), bins(actor.centers[patch * 2], clip.size), strict=True))
        found.append(_Thing(places | _shape(actor.name, actor.color_at(patch), _motion(actor), actor.side >= 20)))
    if clip.sign is not None:
        found.append(_Thing(_sign(clip.sign.word), clip.sign.word, clip.sign.box[0], clip.sign.character_starts))
    return found


def _cells(item_map: NDArray[np.int64], things: Sequence[_Thing], cell: int) -> NDArray[np.int8]:
    """[cells, len(PATCH_TARGETS)] classes of squares of ``cell`` pixels, row by row."""
    owner = owners(item_map, len(things), cell)
    columns = item_map.shape[1] // cell
    targets = np.full((len(owner), len(TARGET_NAMES)), IGNORE, np.int8)
    targets[:, TARGET_NAMES.index("kind")] = 0
    # what shows nothing has its own place: the encoder knows positions only from what stands around
    every = np.arange(len(owner))
    targets[:, TARGET_NAMES.index("column")] = every % columns * BINS // columns
    targets[:, TARGET_NAMES.index("row")] = every // columns * BINS // (len(owner) // columns)
    for index, thing in enumerate(things):
        mine = np.flatnonzero(owner == index)
        for name, value in thing.facts.items():
            targets[mine, TARGET_NAMES.index(name)] = value
        if thing.text and len(mine):
            middle = (mine % columns) * cell + cell / 2 - thing.left
            codes = np.array([CHARACTERS.index(c) for c in thing.text.upper()])
            targets[mine, TARGET_NAMES.index("character")] = codes[np.searchsorted(thing.starts, middle)]
    return targets


def targets_of(shown: Shown) -> tuple[NDArray[np.int8], NDArray[np.int8]]:
    """Classes of patches and of tokens, both in the order in which the encoder has them."""
    if isinstance(shown, Clip):
        moments = [(shown.item_maps[patch], _things_at(shown, patch)) for patch in range(shown.patches)]
    else:
        moments = [(shown.item_map, _things_of(shown))]
    height, width = moments[0][0].shape
    turned = order(height // PATCH, width // PATCH).numpy()
    patches = np.concatenate([_cells(item_map, things, PATCH)[turned] for item_map, things in moments])
    return patches, np.concatenate([_cells(item_map, things, CELL) for item_map, things in moments])


def events_of(shown: Shown) -> NDArray[np.int8]:
    """[tokens] classes of ``EVENT_CLASSES``: what happens in a temporal patch, where the thing is, or was before it vanished."""
    if isinstance(shown, Picture):
        return np.full(shown.item_map.size // CELL**2, IGNORE, np.int8)
    owner = np.stack([owners(item_map, len(shown.actors) + 1, CELL) for item_map in shown.item_maps])
    events = np.zeros(owner.shape, np.int8)
    for index, actor in enumerate(shown.actors):
        if actor.role in EVENTS:
            seen = owner[actor.when - (actor.role == "vanishes")] == index
            events[actor.when][seen] = EVENT_CLASSES.index(actor.role)
    return events.ravel()


LANGUAGE = Language(TOKEN_ID, "<|im_end|> <|im_start|> assistant", PAD, END, FAMILIES, len(GROUNDING))


def text_rows(asked: Sequence[tuple[PocketQuestion, Shown | None]]) -> dict[str, list]:
    """Questions as one row of tokens; beside each what it is about, for ``grounding``, None = no targets."""
    return LANGUAGE.rows([(question, [] if shown is None else grounding(question, shown)) for question, shown in asked])


def _about(pictures: Sequence[Picture], random: Random, number: int) -> list[tuple[PocketQuestion, Shown | None]]:
    """Questions about two pictures, each of which says which one it means."""
    found: list[tuple[PocketQuestion, Shown | None]] = []
    for which, picture in zip(ORDINALS, pictures, strict=True):
        for question in ask(picture, random, number // 2):
            found.append((replace(question, text=f"in the {which} image , {question.text}"), picture))
    return found


def make_batch(random: Random, kind: str, shape: tuple[int, ...], size: int, questions: int, interval: float) -> Batch:
    """Draw ``size`` samples of a kind ("picture", "pair" or "clip") and a shape in pixels."""
    shown: list[Shown] = []
    rows: list[dict[str, list]] = []
    while len(rows) < size:
        one: list[Shown]
        if kind == "clip":
            one = [draw_clip(random, (shape[0], shape[1], shape[2]))]
        else:
            one = [draw_picture(random, (shape[0], shape[1])) for _ in range(2 if kind == "pair" else 1)]
        if kind == "pair":
            asked = _about([picture for picture in one if isinstance(picture, Picture)], random, questions)
        else:
            asked = [(question, one[0]) for question in ask(one[0], random, questions)]
        if asked:
            shown += one
            rows.append(text_rows(asked))
    targets = [targets_of(each) for each in shown]
    images = [each.frames if isinstance(each, Clip) else each.image[None] for each in shown]
    return Batch(
        frames=torch.from_numpy(np.stack(images)),
        patches=torch.from_numpy(np.stack([patches for patches, _ in targets])),
        tokens=torch.from_numpy(np.stack([tokens for _, tokens in targets])),
        events=torch.from_numpy(np.stack([events_of(each) for each in shown])),
        interval=torch.tensor(interval),
        **LANGUAGE.collated(rows),
    )


@dataclass(frozen=True)
class Mix:
    """One phase of training.

    Attributes
    ----------
    steps : of the optimizer.
    most : tokens of a picture or a clip.
    budget : tokens of all pictures of a batch in each process.
    kinds : shares of pictures, pairs and clips.
    language : whether the decoder is trained.
    """

    steps: int
    most: int
    budget: int
    kinds: tuple[float, float, float] = (0.6, 0.06, 0.34)
    language: bool = True


class NativeBatches(Phased[Batch, Mix]):
    """Batch ``step`` for this process. Every process draws the same kind and shape in a step, so that none waits for another."""

    def options(self, step: int) -> dict[str, bool]:
        """What a step trains."""
        return {"language": self.phase(step).language}

    def __getitem__(self, step: int) -> Batch:
        phase, common = self.phase(step), Random(f"native/{self.seed}/{step}")
        kind = common.choices(("picture", "pair", "clip"), phase.kinds)[0]
        if kind == "clip":
            shape: tuple[int, ...] = draw_clip_shape(common, phase.most + 40)
            tokens = shape[0] * shape[1] * shape[2] // CELL**2
        else:
            shape = draw_size(common, most=min(phase.most, 200) if kind == "pair" else phase.most)
            tokens = shape[0] * shape[1] // CELL**2 * (2 if kind == "pair" else 1)
        questions = 14 if kind == "clip" else 8 + tokens // 20
        size = max(1, phase.budget // (tokens + 6 * questions))
        random = Random(f"native/{self.seed}/{step}/{self.rank}")
        return make_batch(random, kind, shape, size, questions, common.choice(INTERVALS))
