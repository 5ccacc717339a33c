"""Pictures of many sizes: scenes of things, boards of several colours, and pages of words and numbers.

All randomness comes from the generator passed in. Backgrounds and handwritten digits of the splits never overlap, as in the first
pocket world.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import numpy as np
from numpy.typing import NDArray

from ..assets import FONTS, text_mask
from ..scenes import TEXT_KINDS, Array, Draft, SceneItem, backgrounds, draft_item, free_spot, paint
from ..vocabulary import COLORS, WORDS

CELL = 16  # pixels of a token
SMALLEST, LARGEST = 64, 600  # tokens of a picture
SIDES = (96, 512)  # pixels
STYLES = ("things", "boards", "page")
TOKENS_PER_THING, MOST_THINGS = 26, 14
LIGHT = ("yellow", "white", "orange", "green")  # boards that are written on in black


@dataclass(frozen=True)
class Picture:
    """A picture of its own size.

    Attributes
    ----------
    image : uint8 [height, width, 3].
    items : what it shows; on a page a word and a number alternate, from top to bottom.
    item_map : int64 [height, width], which item a pixel belongs to, -1 = none.
    style : "things", "boards" or "page".
    """

    image: NDArray[np.uint8]
    items: tuple[SceneItem, ...]
    item_map: NDArray[np.int64]
    style: str

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.image.shape[1], self.image.shape[0]

    def of(self, kind: str) -> list[SceneItem]:
        """Things of a kind: "shape", "word", "number", "digit", "board" (a sign with a colour), "key" or "value" (of a page)."""
        return [item for item in self.items if item.kind == kind]


def draw_size(random: Random, fewest: int = SMALLEST, most: int = LARGEST) -> tuple[int, int]:
    """Width and height in pixels, multiples of ``CELL``, with ``fewest`` to ``most`` tokens and no side over twice the other."""
    low, high = (side // CELL for side in SIDES)
    while True:
        columns, rows = random.randint(low, high), random.randint(low, high)
        if fewest <= columns * rows <= most and max(columns, rows) <= 2 * min(columns, rows):
            return columns * CELL, rows * CELL


def backdrop(random: Random, size: tuple[int, int], split: str) -> Array:
    """A texture of a split, mirrored where the picture is larger, float [height, width, 3]."""
    texture = random.choice(backgrounds(split))
    if random.random() < 0.5:
        texture = texture[::-1]
    width, height = size
    y, x = random.randint(0, 255), random.randint(0, 255)
    folded = [np.abs((np.arange(n) + start + 256) % 512 - 256).clip(0, 255) for n, start in ((height, y), (width, x))]
    return texture[np.ix_(*folded)] * np.float32(random.uniform(0.85, 1.15))


def _board(random: Random, colors: list[str]) -> Draft:
    """A sign with a word or a number on a plate of a colour that no other one has."""
    color = colors.pop()
    name = random.choice(WORDS) if random.random() < 0.6 else str(random.randrange(100))
    mask, starts = text_mask(name, random.randrange(len(FONTS)), random.randint(12, 17))
    plate = tuple(int(np.clip(c + random.uniform(-10, 10), 0, 255)) for c in COLORS[color])
    ink = (15.0,) * 3 if color in LIGHT else (245.0,) * 3
    return Draft("board", name, mask, ink, (plate[0], plate[1], plate[2]), color, character_starts=starts)


class _Painter:
    """A picture in the making."""

    def __init__(self, canvas: Array) -> None:
        self.canvas, self.items = canvas, list[SceneItem]()
        self.occupied = np.zeros(canvas.shape[:2], bool)
        self.item_map = np.full(canvas.shape[:2], -1, np.int64)

    def put(self, draft: Draft, x: int, y: int) -> None:
        h, w = draft.mask.shape
        area = np.s_[y : y + h, x : x + w]
        paint(self.canvas, draft, x, y)
        self.occupied[area] = True
        self.item_map[area][(draft.mask > 0.5) | (draft.kind != "shape")] = len(self.items)
        self.items.append(SceneItem(draft.kind, draft.name, draft.color, draft.large, (x, y, w, h), draft.character_starts))

    def put_somewhere(self, draft: Draft, random: Random) -> None:
        h, w = draft.mask.shape
        spot = free_spot(self.occupied, w, h, random)
        if spot is not None:
            self.put(draft, *spot)

    def finished(self, random: Random, style: str) -> Picture:
        noise = np.random.RandomState(random.randrange(2**32)).randn(*self.canvas.shape[:2], 1).astype(np.float32)
        image = np.clip(self.canvas + noise * random.choice((0, 2, 5)), 0, 255).astype(np.uint8)
        return Picture(image, tuple(self.items), self.item_map, style)


def _things(painter: _Painter, random: Random, split: str, most: int) -> None:
    total = random.randint(1, most)
    signs = random.sample(TEXT_KINDS, min(random.randint(0, 3), total))
    for kind in [*signs, *["shape"] * (total - len(signs))]:
        painter.put_somewhere(draft_item(kind, random, split, [i for i in painter.items if i.kind == "shape"]), random)


def _boards(painter: _Painter, random: Random, split: str, most: int) -> None:
    colors = random.sample(list(COLORS), len(COLORS))
    for _ in range(random.randint(2, max(2, min(6, most // 2)))):
        painter.put_somewhere(_board(random, colors), random)
    for _ in range(random.randint(1, max(2, most - len(painter.items)))):
        painter.put_somewhere(draft_item("shape", random, split, [i for i in painter.items if i.kind == "shape"]), random)


def _page(painter: _Painter, random: Random) -> None:
    """Rows of a word and a number in small letters."""
    height, width = painter.canvas.shape[:2]
    font, cap, dark = random.randrange(len(FONTS)), random.randint(9, 13), random.random() < 0.25
    ink = (235.0,) * 3 if dark else (25.0,) * 3
    painter.canvas[:] = np.asarray([random.uniform(*((25, 60) if dark else (215, 250))) for _ in range(3)], np.float32)
    step = cap + 7 + random.randint(2, 12)
    top = random.randint(2, 12)
    rows = min(random.randint(2, 10), (height - top - cap - 8) // step + 1)
    column = random.randint(62, max(62, min(width - 40, 62 + width // 3)))
    for number, word in enumerate(random.sample(WORDS, max(1, rows))):
        for kind, name, x in (("key", word, 4), ("value", str(random.randrange(100)), column)):
            mask, starts = text_mask(name, font, cap)
            y = top + number * step
            if y + mask.shape[0] <= height and x + mask.shape[1] <= width:
                painter.put(Draft(kind, name, mask, ink, None, character_starts=starts), x, y)


def draw_picture(random: Random, size: tuple[int, int], *, split: str = "train", style: str | None = None) -> Picture:
    """Draw one picture.

    Parameters
    ----------
    random : the only source of randomness.
    size : width and height in pixels.
    split : "train", "validation" or "test".
    style : "things", "boards" or "page"; None draws one.
    """
    width, height = size
    most = min(MOST_THINGS, max(2, width * height // CELL**2 // TOKENS_PER_THING))
    while True:
        chosen = style or random.choices(STYLES, (0.55, 0.2, 0.25))[0]
        painter = _Painter(backdrop(random, size, split))
        if chosen == "page":
            _page(painter, random)
        elif chosen == "boards":
            _boards(painter, random, split, most)
        else:
            _things(painter, random, split, most)
        if painter.items:
            return painter.finished(random, chosen)
