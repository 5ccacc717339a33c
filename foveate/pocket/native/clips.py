"""Clips: things that stay, move, appear, vanish or change colour, before still and moving backgrounds, and signs shown briefly.

Events fall on the first frame of a temporal patch. Later things are painted over earlier ones, so that what moves passes before or
behind what it meets. All randomness comes from the generator passed in.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import numpy as np
from numpy.typing import NDArray

from ..assets import FONTS, text_mask
from ..scenes import INKS, Draft, free_spot, paint, sprite
from ..vocabulary import COLORS, SHAPES, WORDS
from .pictures import CELL, backdrop
from .vocabulary import DIRECTIONS

FRAMES = 2  # of a temporal patch
PATCHES = (4, 16)  # temporal patches of a clip
SIDES = (80, 176)  # pixels of a frame
MOST = 640  # tokens of a clip
RATE = 4.0  # frames per second
ROLES = {"stays": 0.2, "moves": 0.28, "appears": 0.24, "vanishes": 0.13, "changes": 0.15}
STEPS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
MOVERS = 2
FAR = 36  # pixels that a mover goes, at least


@dataclass(frozen=True)
class Actor:
    """A thing in a clip; no other one has its shape.

    Attributes
    ----------
    name, color : the shape, and its colour at the start.
    role : "stays", "moves", "appears", "vanishes" or "changes".
    when : the temporal patch of its event, 0 = none.
    later : its colour after that.
    direction : of a mover.
    centers : float [frames, 2], x and y in pixels.
    side : pixels.
    """

    name: str
    color: str
    role: str
    when: int
    later: str
    direction: str | None
    centers: NDArray[np.float32]
    side: int

    def seen(self, patch: int) -> bool:
        """Whether it is there in a temporal patch."""
        return not (self.role == "appears" and patch < self.when) and not (self.role == "vanishes" and patch >= self.when)

    def color_at(self, patch: int) -> str:
        return self.later if self.role == "changes" and patch >= self.when else self.color


@dataclass(frozen=True)
class Sign:
    """A word that is shown from temporal patch ``begin`` to before ``end``; ``box`` is (x, y, width, height)."""

    word: str
    begin: int
    end: int
    box: tuple[int, int, int, int]
    character_starts: tuple[float, ...]


@dataclass(frozen=True)
class Clip:
    """Frames and what happens in them.

    Attributes
    ----------
    frames : uint8 [frames, height, width, 3].
    actors : in the order in which they are painted.
    sign : or None.
    item_maps : int64 [temporal patches, height, width] of each first frame: which actor a pixel belongs to, ``len(actors)`` = the
        sign, -1 = none.
    """

    frames: NDArray[np.uint8]
    actors: tuple[Actor, ...]
    sign: Sign | None
    item_maps: NDArray[np.int64]

    @property
    def patches(self) -> int:
        return len(self.item_maps)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.frames.shape[2], self.frames.shape[1]


def draw_clip_shape(random: Random, most: int = MOST) -> tuple[int, int, int]:
    """Temporal patches, width and height of a clip with at most ``most`` tokens."""
    low, high = (side // CELL for side in SIDES)
    while True:
        patches = random.randint(*PATCHES)
        columns, rows = random.randint(low, high), random.randint(low, high)
        if patches * columns * rows <= most and max(columns, rows) <= 2 * min(columns, rows):
            return patches, columns * CELL, rows * CELL


def _path(random: Random, direction: str | None, side: int, size: tuple[int, int], frames: int) -> NDArray[np.float32]:
    """Centres of a mover, which stays inside the picture."""
    step = STEPS[direction or "left"]
    axis = 0 if step[0] else 1
    room = size[axis] - side
    length = random.uniform(min(FAR, room), room)
    low = random.uniform(0, room - length)
    along = np.linspace(low, low + length, frames)
    centers = np.empty((frames, 2), np.float32)
    centers[:, axis] = (along if step[axis] > 0 else along[::-1]) + side / 2
    centers[:, 1 - axis] = random.uniform(0, size[1 - axis] - side) + side / 2
    return centers


def _cast(random: Random, patches: int, size: tuple[int, int]) -> list[Actor]:
    """Who appears, with which role and where; still things do not cover each other."""
    number = random.randint(1, 5 if size[0] * size[1] >= 14000 else 4)
    moments = random.sample(range(1, patches), min(number, patches - 1))
    occupied, cast, movers = np.zeros((size[1], size[0]), bool), list[Actor](), 0
    for shape in random.sample(SHAPES, number):
        color, role = random.choice(list(COLORS)), random.choices(list(ROLES), list(ROLES.values()))[0]
        if (role == "moves" and movers == MOVERS) or (role != "moves" and not moments):
            role = "stays"
        side, direction, when, later = random.randint(14, 26), None, 0, color
        if role == "moves":
            movers, direction = movers + 1, random.choice(DIRECTIONS)
            centers = _path(random, direction, side, size, patches * FRAMES)
        else:
            spot = free_spot(occupied, side, side, random)
            if spot is None:
                continue
            x, y = spot
            occupied[y : y + side, x : x + side] = True
            centers = np.tile(np.array([x + side / 2, y + side / 2], np.float32), (patches * FRAMES, 1))
            when = 0 if role == "stays" else moments.pop()
            if role == "changes":
                later = random.choice([name for name in COLORS if name != color])
        cast.append(Actor(shape, color, role, when, later, direction, centers, side))
    random.shuffle(cast)
    return cast


def _sign(random: Random, patches: int, size: tuple[int, int]) -> tuple[Sign, Draft] | None:
    word = random.choice(WORDS)
    mask, starts = text_mask(word, random.randrange(len(FONTS)), random.randint(13, 17))
    h, w = mask.shape
    if w > size[0] or h > size[1]:
        return None
    long = random.randint(1, max(1, min(3, patches // 3)))
    begin = random.randint(0, patches - long)
    x, y = random.randint(0, size[0] - w), random.randint(0, size[1] - h)
    ink, plate = random.choice(INKS)
    return Sign(word, begin, begin + long, (x, y, w, h), starts), Draft("word", word, mask, ink, plate, character_starts=starts)


def _ground(random: Random, size: tuple[int, int], frames: int, split: str) -> list[NDArray[np.float32]]:
    """The background of each frame; it moves in a third of the clips."""
    if random.random() < 0.65:
        return [backdrop(random, size, split)] * frames
    dx, dy = random.uniform(-1.5, 1.5), random.uniform(-1.5, 1.5)
    wide = backdrop(random, (size[0] + int(abs(dx) * frames) + 1, size[1] + int(abs(dy) * frames) + 1), split)
    found = []
    for frame in range(frames):
        x, y = (int(abs(d) * (frame if d > 0 else frames - 1 - frame)) for d in (dx, dy))
        found.append(wide[y : y + size[1], x : x + size[0]])
    return found


def draw_clip(random: Random, shape: tuple[int, int, int], *, split: str = "train") -> Clip:
    """Draw one clip.

    Parameters
    ----------
    random : the only source of randomness.
    shape : temporal patches, width and height in pixels (``draw_clip_shape``).
    split : "train", "validation" or "test".
    """
    patches, size = shape[0], shape[1:]
    actors = _cast(random, patches, size)
    while not actors:
        actors = _cast(random, patches, size)
    signed = _sign(random, patches, size) if random.random() < 0.45 else None
    inks = {name: [c + random.uniform(-12, 12) for c in color] for name, color in COLORS.items()}
    noise = np.random.RandomState(random.randrange(2**32)).randn(size[1], size[0], 1).astype(np.float32) * random.choice((0, 2, 4))
    frames, maps = [], []
    for number, ground in enumerate(_ground(random, size, patches * FRAMES, split)):
        patch, canvas = number // FRAMES, ground + noise
        item_map = np.full((size[1], size[0]), -1, np.int64)
        for index, actor in enumerate(actors):
            if not actor.seen(patch):
                continue
            mask = sprite(actor.name, actor.side)
            x, y = (round(float(center) - actor.side / 2) for center in actor.centers[number])
            paint(canvas, Draft("shape", actor.name, mask, tuple(inks[actor.color_at(patch)])), x, y)
            item_map[y : y + actor.side, x : x + actor.side][mask > 0.5] = index
        if signed is not None and signed[0].begin <= patch < signed[0].end:
            x, y, w, h = signed[0].box
            paint(canvas, signed[1], x, y)
            item_map[y : y + h, x : x + w] = len(actors)
        frames.append(np.clip(canvas, 0, 255).astype(np.uint8))
        if number % FRAMES == 0:
            maps.append(item_map)
    return Clip(np.stack(frames), tuple(actors), signed[0] if signed else None, np.stack(maps))
