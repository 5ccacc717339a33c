"""Drawing the pocket scenes: coloured shapes, signs with words or numbers, and handwritten digits on a textured background.

A scene is drawn on a window of ``n`` x ``n`` patches of the full picture (24 x 24 patches of 8 x 8 pixels). Tests use the whole
picture; training also uses smaller windows, which are many times cheaper. All randomness comes from the generator passed in.
Backgrounds and handwritten digits of the train, validation and test splits never overlap.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from random import Random

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from .assets import FONTS, load_assets, text_mask
from .vocabulary import COLORS, SHAPES, WORDS

PATCH = 8
GRID = 24
SIDE = PATCH * GRID
SPLITS = ("train", "validation", "test")
LEVELS = ("plain", "medium", "crowded")
ITEMS = {24: ((1, 3), (4, 7), (8, 12)), 16: ((1, 3), (3, 5), (5, 8)), 12: ((1, 2), (2, 3), (3, 5)), 8: ((1, 1), (1, 2), (2, 3))}
TEXT_KINDS = ("word", "number", "digit")
INKS = (
    ((20, 20, 20), (235, 235, 230)),
    ((240, 240, 240), (40, 40, 60)),
    ((235, 235, 235), (30, 90, 60)),
    ((150, 20, 20), (240, 235, 220)),
)
Array = NDArray[np.float32]


@dataclass(frozen=True)
class SceneItem:
    """One thing in a scene. ``box`` is (x, y, width, height) in pixels of the full picture."""

    kind: str  # "shape", "word", "number" or "digit"
    name: str  # the shape, or what is written
    color: str | None
    large: bool
    box: tuple[int, int, int, int]
    character_starts: tuple[float, ...] = ()  # words and numbers: pixels from the box's left edge

    @property
    def center(self) -> tuple[float, float]:
        x, y, w, h = self.box
        return x + w / 2, y + h / 2


@dataclass(frozen=True)
class Scene:
    """One picture, or a window of it.

    ``image`` uint8 [8n, 8n, 3]; ``owner`` [n * n]: which item covers a patch, -1 = none; ``corner`` (row, column) of the window.
    """

    image: NDArray[np.uint8]
    items: tuple[SceneItem, ...]
    owner: NDArray[np.int64]
    corner: tuple[int, int]
    level: int

    @property
    def side(self) -> int:
        return self.image.shape[0] // PATCH

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the whole picture in pixels, a window of which this may be."""
        return SIDE, SIDE

    def of(self, kind: str) -> list[SceneItem]:
        return [item for item in self.items if item.kind == kind]

    def position_ids(self) -> NDArray[np.int64]:
        """[n * n] index of each patch of the window in the position table of the full grid (0 is [CLS])."""
        row, column = self.corner
        rows, columns = np.arange(self.side) + row, np.arange(self.side) + column
        return (rows[:, None] * GRID + columns[None]).ravel() + 1


def _star(m: float) -> list[tuple[float, float]]:
    points = []
    for i in range(10):
        radius, angle = m / 2 * (1.05 if i % 2 == 0 else 0.45), -math.pi / 2 + i * math.pi / 5
        points.append((m / 2 + radius * math.cos(angle), m * 0.53 + radius * math.sin(angle)))
    return points


@functools.lru_cache(maxsize=512)
def sprite(shape: str, side: int) -> Array:
    """Coverage in 0..1 of a shape [side, side], drawn at four times the size and averaged down."""
    m = side * 4 - 1.0
    image = Image.new("L", (side * 4, side * 4), 0)
    draw = ImageDraw.Draw(image)
    bar = m * 0.34
    if shape == "square":
        draw.rectangle([m * 0.07, m * 0.07, m * 0.93, m * 0.93], fill=255)
    elif shape == "triangle":
        draw.polygon([(m / 2, 0), (m, m * 0.93), (0, m * 0.93)], fill=255)
    elif shape == "diamond":
        draw.polygon([(m / 2, 0), (m * 0.9, m / 2), (m / 2, m), (m * 0.1, m / 2)], fill=255)
    elif shape == "cross":
        draw.rectangle([bar, 0, m - bar, m], fill=255)
        draw.rectangle([0, bar, m, m - bar], fill=255)
    elif shape == "star":
        draw.polygon(_star(m), fill=255)
    else:
        draw.ellipse([0, 0, m, m], fill=255)
        if shape == "ring":
            draw.ellipse([m * 0.27, m * 0.27, m * 0.73, m * 0.73], fill=0)
        elif shape == "moon":
            draw.ellipse([m * 0.35, -m * 0.08, m * 1.15, m * 0.8], fill=0)
    return np.asarray(image.resize((side, side), Image.Resampling.BOX), np.float32) / np.float32(255)


def _background(rng: np.random.RandomState, style: int, side: int) -> Array:
    y, x = np.mgrid[0:side, 0:side].astype(np.float32) / 192
    base = rng.uniform(85, 190) + rng.uniform(-22, 22, 3)
    angle = rng.uniform(0, 2 * math.pi)
    ramp = np.cos(angle) * x + np.sin(angle) * y
    texture: NDArray[np.floating] = np.zeros((side, side))
    if style == 1:
        texture = (ramp - 0.3) * rng.uniform(30, 70)
    elif style == 2:
        texture = rng.randn(side, side) * rng.uniform(6, 18)
    elif style == 3:
        texture = np.sign(np.sin(rng.uniform(10, 45) * ramp)) * rng.uniform(6, 16)
    elif style == 4:
        cell = np.arange(side) // rng.choice([4, 6, 8, 12, 16])
        texture = ((cell[:, None] + cell[None]) % 2 * 2.0 - 1) * rng.uniform(6, 16)
    elif style >= 5:
        for cells, strength in ((6, 22), (14, 14), (40, 9), (96, 6)):
            noise = Image.fromarray(rng.randn(cells, cells).astype(np.float32)).resize((side, side), Image.Resampling.BICUBIC)
            texture = texture + np.asarray(noise) * strength * rng.uniform(0.3, 1)
    return np.clip(base + texture[..., None], 50, 215).astype(np.float32)


@functools.cache
def backgrounds(split: str) -> list[Array]:
    """The textures of a split: 256 pictures of 256 x 256 pixels from a seed of its own, from which windows are cut."""
    rng = np.random.RandomState(1000 + SPLITS.index(split))
    return [_background(rng, i % 8, 256) for i in range(256)]


def _digit_mask(random: Random, split: str, side: int) -> tuple[Array, str]:
    """A handwritten digit, slightly turned, as coverage [side, side], and what it says."""
    assets = load_assets()
    index = random.randrange(*assets.digit_pool(split))
    picture = Image.fromarray(assets.digits[index].astype(np.float32) / 16).resize((side - 4, side - 4), Image.Resampling.BICUBIC)
    turned = picture.rotate(random.uniform(-12, 12), Image.Resampling.BILINEAR)
    return np.pad(np.clip(np.asarray(turned, np.float32) * np.float32(1.2), 0, 1), 2), str(assets.digit_labels[index])


@dataclass(frozen=True)
class Draft:
    """An item before it has a place: what to paint (``mask``) and with which ink on which plate (None: straight on the scene)."""

    kind: str
    name: str
    mask: Array
    ink: tuple[float, ...]
    plate: tuple[int, int, int] | None = None
    color: str | None = None
    large: bool = False
    character_starts: tuple[float, ...] = ()


def draft_item(kind: str, random: Random, split: str, shapes: list[SceneItem]) -> Draft:
    """Something of a kind; shapes that are there already give their name or colour to some new ones."""
    if kind == "shape":
        name = random.choice(shapes).name if shapes and random.random() < 0.35 else random.choice(SHAPES)
        color = random.choice(shapes).color if shapes and random.random() < 0.3 else random.choice(list(COLORS))
        large = random.random() < 0.45
        mask = sprite(name, random.randint(20, 26) if large else random.randint(13, 16))
        ink = tuple(c + random.uniform(-14, 14) for c in COLORS[color or ""])
        return Draft(kind, name, mask, ink, color=color, large=large)
    if kind == "digit":
        mask, name = _digit_mask(random, split, random.randint(22, 28))
        light, dark = (235,) * 3, (45,) * 3
        ink, plate = (light, dark) if random.random() < 0.5 else (dark, light)
        return Draft(kind, name, mask, ink, plate)
    name = random.choice(WORDS) if kind == "word" else "".join(random.choice("0123456789") for _ in range(random.choice((1, 2, 2))))
    mask, starts = text_mask(name, random.randrange(len(FONTS)), random.randint(13, 17))
    ink, plate_color = random.choice(INKS)
    if random.random() < 0.3:  # no plate: written straight on the background
        return Draft(kind, name, mask, random.choice(((10,) * 3, (250,) * 3)), None, character_starts=starts)
    return Draft(kind, name, mask, ink, plate_color, character_starts=starts)


def free_spot(occupied: NDArray[np.bool_], w: int, h: int, random: Random) -> tuple[int, int] | None:
    """Where a thing of ``w`` x ``h`` pixels covers nothing that is there already, or None."""
    height, width = occupied.shape
    if w > width or h > height:
        return None
    for _ in range(40):
        x, y = random.randint(0, width - w), random.randint(0, height - h)
        if not occupied[max(0, y - 2) : y + h + 2, max(0, x - 2) : x + w + 2].any():
            return x, y
    return None


def owners(item_map: NDArray[np.int64], items: int, cell: int = PATCH) -> NDArray[np.int64]:
    """Which item has the most pixels in each square of ``cell`` pixels, at least 10 of 64; -1 = none. Row by row."""
    rows, columns = (side // cell for side in item_map.shape)
    patches = item_map.reshape(rows, cell, columns, cell).swapaxes(1, 2).reshape(rows * columns, cell * cell)
    pixels = np.stack([(patches == i).sum(1) for i in range(items)], 1)
    return np.where(pixels.max(1) * 64 >= 10 * cell * cell, pixels.argmax(1), -1)


def paint(canvas: Array, draft: Draft, x: int, y: int) -> None:
    """Paint a draft into a picture [h, w, 3] in place, its upper left corner at ``x``, ``y``."""
    h, w = draft.mask.shape
    area = np.s_[y : y + h, x : x + w]
    under = canvas[area] if draft.plate is None else np.broadcast_to(np.asarray(draft.plate, np.float32), (h, w, 3))
    cover = draft.mask[..., None]
    canvas[area] = under * (1 - cover) + np.asarray(draft.ink, np.float32) * cover


def draw_scene(random: Random, *, side: int = GRID, split: str = "train", level: int | None = None) -> Scene:
    """Draw one scene.

    Parameters
    ----------
    random : the only source of randomness.
    side : patches along one side of the window: 8, 12, 16 or 24 (the whole picture).
    split : "train", "validation" or "test": which backgrounds and handwritten digits may appear.
    level : 0 plain, 1 medium, 2 crowded; None draws one.
    """
    pixels = side * PATCH
    corner = (random.randint(0, GRID - side), random.randint(0, GRID - side))
    noise = np.random.RandomState(random.randrange(2**32))
    texture = random.choice(backgrounds(split))
    cut_y, cut_x = random.randint(0, 256 - pixels), random.randint(0, 256 - pixels)
    canvas = texture[cut_y : cut_y + pixels, cut_x : cut_x + pixels] * random.uniform(0.85, 1.15)
    if random.random() < 0.5:
        canvas = canvas[::-1].copy()
    level = random.choice((0, 1, 2)) if level is None else level
    total = random.randint(*ITEMS[side][level])
    # At most one sign of each kind, so that "what does the sign say ?" has one answer.
    signs = random.sample(TEXT_KINDS, min(random.randint(*((0, 1), (1, 2), (2, 3))[level]), total))
    occupied = np.zeros((pixels, pixels), bool)
    item_map = np.full((pixels, pixels), -1, np.int64)
    items: list[SceneItem] = []
    for kind in [*signs, *["shape"] * (total - len(signs))]:
        draft = draft_item(kind, random, split, [item for item in items if item.kind == "shape"])
        h, w = draft.mask.shape
        spot = free_spot(occupied, w, h, random)
        if spot is None:
            continue
        x, y = spot
        area = np.s_[y : y + h, x : x + w]
        occupied[area] = True
        paint(canvas, draft, x, y)
        item_map[area][(draft.mask > 0.5) | (kind != "shape")] = len(items)
        box = (corner[1] * PATCH + x, corner[0] * PATCH + y, w, h)
        items.append(SceneItem(kind, draft.name, draft.color, draft.large, box, draft.character_starts))
    if not items:  # a window too small for what was drawn: try again with the same generator
        return draw_scene(random, side=side, split=split, level=level)
    canvas = canvas + noise.randn(pixels, pixels, 1).astype(np.float32) * random.choice((0, 2, 5))
    image = np.clip(canvas, 0, 255).astype(np.uint8)
    return Scene(image, tuple(items), owners(item_map, len(items)), corner, level)
