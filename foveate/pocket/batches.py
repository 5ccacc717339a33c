"""Training batches of the pocket model: scenes, many questions each, and the targets of the auxiliary losses.

Batch number ``step`` of process ``rank`` is a function of (seed, step, rank): training can stop and resume anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from random import Random
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .build import PIXEL_MEAN, PIXEL_STD
from .questions import QUESTION_KINDS, PocketQuestion, ask
from .rows import IGNORE, Language, Targets
from .scenes import PATCH, SIDE, Scene, SceneItem, draw_scene
from .vocabulary import CHARACTERS, COLORS, EOS, PAD, SHAPES, TOKEN_ID, WORDS

BINS = 12  # places along each side of the picture for the position targets
COLOR_NAMES = tuple(COLORS)
# what each patch is asked about, and with how many classes
PATCH_TARGETS = {
    "kind": 1 + len(SHAPES) + 3,
    "color": len(COLORS),
    "word": len(WORDS),
    "digit": 10,
    "tens": 11,
    "ones": 11,
    "size": 2,
    "character": len(CHARACTERS),
    "column": BINS,
    "row": BINS,
}
# a caption is the set of these facts
CAPTION_SIZE = len(SHAPES) * len(COLORS) + len(WORDS) + 10 + 20
HARD_NEGATIVES = 6


class Phase(Protocol):
    """A phase of training."""

    @property
    def steps(self) -> int: ...


B = TypeVar("B")
P = TypeVar("P", bound=Phase)


@dataclass
class Batch:
    """B scenes on windows of N patches with T text tokens. Questions of a scene stand one after the other; ``block`` tells them
    apart, so that each sees the picture and itself.
    """

    pixels: Tensor  # [B, 3, H, W] normalised
    positions: Tensor  # [B, N] rows of the position table
    patches: Tensor  # [B, N, len(PATCH_TARGETS)] classes, IGNORE = not asked
    caption: Tensor  # [B, CAPTION_SIZE] 0/1
    wrong_captions: Tensor  # [B, HARD_NEGATIVES, CAPTION_SIZE], one fact changed in each
    ids: Tensor  # [B, T]
    block: Tensor  # [B, T], -1 = padding
    offset: Tensor  # [B, T] position inside its question
    labels: Tensor  # [B, T] next token where it is part of the answer
    family: Tensor  # [B, T]
    grounding: Tensor  # [B, T, 3] column and row bin, presence of the object a word names; IGNORE = none

    def to(self, device: torch.device | str) -> Batch:
        return Batch(*(getattr(self, field.name).to(device, non_blocking=True) for field in fields(self)))


def normalise(images: Sequence[np.ndarray]) -> Tensor:
    """uint8 pictures [H, W, 3] as the image processor hands them to the model, [B, 3, H, W]."""
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
    return ((pixels - PIXEL_MEAN) / PIXEL_STD).contiguous()


def _bins(item: SceneItem) -> tuple[int, int]:
    x, y = item.center
    return min(BINS - 1, int(x * BINS / SIDE)), min(BINS - 1, int(y * BINS / SIDE))


def patch_targets(scene: Scene) -> np.ndarray:
    """[n * n, len(PATCH_TARGETS)] classes of each patch."""
    names, n = list(PATCH_TARGETS), scene.side
    targets = np.full((n * n, len(names)), IGNORE, np.int64)
    targets[:, 0] = 0
    for index, item in enumerate(scene.items):
        mine = np.flatnonzero(scene.owner == index)
        facts: dict[str, int] = dict(zip(("column", "row"), _bins(item), strict=True))
        if item.kind == "shape":
            facts |= {"kind": 1 + SHAPES.index(item.name), "color": COLOR_NAMES.index(item.color or ""), "size": int(item.large)}
        elif item.kind == "word":
            facts |= {"kind": 1 + len(SHAPES), "word": WORDS.index(item.name)}
        elif item.kind == "number":
            facts |= {"kind": 2 + len(SHAPES), "tens": int(item.name[0]), "ones": int(item.name[1]) if len(item.name) > 1 else 10}
        else:
            facts |= {"kind": 3 + len(SHAPES), "digit": int(item.name)}
        for name, value in facts.items():
            targets[mine, names.index(name)] = value
        if item.kind in ("word", "number"):
            middle = (mine % n + scene.corner[1]) * PATCH + PATCH / 2 - item.box[0]
            codes = np.array([CHARACTERS.index(c) for c in item.name.upper()])
            targets[mine, names.index("character")] = codes[np.searchsorted(item.character_starts, middle)]
    return targets


def _facts(item: SceneItem) -> list[int]:
    """Which entries of a caption an item sets."""
    words = len(SHAPES) * len(COLORS)
    if item.kind == "shape":
        return [SHAPES.index(item.name) * len(COLORS) + COLOR_NAMES.index(item.color or "")]
    if item.kind == "word":
        return [words + WORDS.index(item.name)]
    if item.kind == "digit":
        return [words + len(WORDS) + int(item.name)]
    return [words + len(WORDS) + 10 + 10 * place + int(d) for place, d in enumerate(item.name)]


def _altered(fact: int, random: Random) -> int:
    """Another value of the same fact: a shape keeps its colour or the other way round, a sign says something else."""
    pairs, words = len(SHAPES) * len(COLORS), len(WORDS)
    if fact < pairs:
        shape, color = divmod(fact, len(COLORS))
        if random.random() < 0.5:
            return (shape + random.randrange(1, len(SHAPES))) % len(SHAPES) * len(COLORS) + color
        return shape * len(COLORS) + (color + random.randrange(1, len(COLORS))) % len(COLORS)
    if fact < pairs + words:
        return pairs + (fact - pairs + random.randrange(1, words)) % words
    start = pairs + words + (fact - pairs - words) // 10 * 10
    return start + (fact - start + random.randrange(1, 10)) % 10


def captions(scene: Scene, random: Random) -> tuple[np.ndarray, np.ndarray]:
    """A caption [CAPTION_SIZE] and wrong ones [HARD_NEGATIVES, CAPTION_SIZE] that differ in one fact.

    Shapes are left out of captions more often than signs, and the changed fact is drawn by kind first: otherwise [CLS] learns
    that text and handwritten digits are not worth looking at.
    """
    told = [i for i in scene.items if random.random() > (0.35 if i.kind == "shape" else 0.1)] or [random.choice(scene.items)]
    caption = np.zeros(CAPTION_SIZE, np.float32)
    by_kind: dict[str, list[int]] = {}
    for item in told:
        caption[_facts(item)] = 1
        by_kind.setdefault(item.kind, []).extend(_facts(item))
    wrong = np.repeat(caption[None], HARD_NEGATIVES, 0)
    for row in wrong:
        fact = random.choice(by_kind[random.choice(sorted(by_kind))])
        row[fact], row[_altered(fact, random)] = 0, 1
    return caption, wrong


def _grounding(text: str, scene: Scene) -> Targets:
    """For each word of a question that names an object ("star", "red star", "red object"): where it is, if there is just one."""
    words, found = text.split(), Targets()
    for i, word in enumerate(words):
        before = words[i - 1] if i else ""
        color = before if before in COLORS else None
        if before.startswith("(") or not (word in SHAPES or (color and word in ("object", "objects"))):
            found.append((IGNORE,) * 3)
            continue
        meant = [s for s in scene.of("shape") if color in (None, s.color) and word in (s.name, "object", "objects")]
        column, row = _bins(meant[0]) if len(meant) == 1 else (IGNORE, IGNORE)
        found.append((column, row, int(bool(meant))))
    return found


LANGUAGE = Language(TOKEN_ID, "assistant:", PAD, EOS, QUESTION_KINDS, 3)


def text_rows(questions: Sequence[PocketQuestion], scene: Scene | None = None) -> dict[str, list]:
    """All questions of one scene as a row of tokens, with where what they name is."""
    return LANGUAGE.rows([(question, _grounding(question.text, scene) if scene else []) for question in questions])


def make_batch(random: Random, *, size: int, side: int, questions: int, hard: bool) -> Batch:
    """Draw ``size`` scenes on windows of ``side`` x ``side`` patches; ``hard`` prefers crowded ones."""
    scenes: list[Scene] = []
    asked: list[list[PocketQuestion]] = []
    while len(scenes) < size:
        scene = draw_scene(random, side=side, level=2 if hard and random.random() < 0.6 else None)
        found = ask(scene, random, questions)
        if found:
            scenes.append(scene)
            asked.append(found)
    told = [captions(scene, random) for scene in scenes]
    return Batch(
        pixels=normalise([scene.image for scene in scenes]),
        positions=torch.from_numpy(np.stack([scene.position_ids() for scene in scenes])),
        patches=torch.from_numpy(np.stack([patch_targets(scene) for scene in scenes])),
        caption=torch.from_numpy(np.stack([right for right, _ in told])),
        wrong_captions=torch.from_numpy(np.stack([wrong for _, wrong in told])),
        **LANGUAGE.collated([text_rows(found, scene) for found, scene in zip(asked, scenes, strict=True)]),
    )


@dataclass(frozen=True)
class Mix:
    """One phase of training: how often each window is drawn, and its batch size per process."""

    steps: int
    weights: dict[int, float]
    sizes: dict[int, int]
    language: bool = True
    calm: bool = False


QUESTIONS = {8: 10, 12: 14, 16: 22, 24: 36}


class Phased(Dataset[B], Generic[B, P]):
    """Batches of several phases, one after the other, of this process."""

    def __init__(self, phases: Sequence[P], seed: int, rank: int) -> None:
        self.phases, self.seed, self.rank = phases, seed, rank

    def __len__(self) -> int:
        return sum(phase.steps for phase in self.phases)

    def phase(self, step: int) -> P:
        """The phase that a step belongs to."""
        for phase in self.phases:
            if step < phase.steps:
                return phase
            step -= phase.steps
        return self.phases[-1]


class PocketBatches(Phased[Batch, Mix]):
    """Batch ``step`` for this process. Every process draws the same window in the same step, so that none waits for another."""

    def options(self, step: int) -> dict[str, bool]:
        """What a step trains, and how."""
        phase = self.phase(step)
        return {"language": phase.language, "calm": phase.calm}

    def __getitem__(self, step: int) -> Batch:
        phase = self.phase(step)
        side = Random(f"{self.seed}/{step}").choices(list(phase.weights), list(phase.weights.values()))[0]
        random = Random(f"{self.seed}/{step}/{self.rank}")
        hard = not phase.language or random.random() < 0.3
        return make_batch(random, size=phase.sizes[side], side=side, questions=QUESTIONS[side], hard=hard)
