"""The raw material of the pocket scenes: letters of three typefaces and handwritten digits, in one small file.

``python -m foveate.pocket.assets`` rebuilds the file; that alone needs scikit-learn (its digits are the test part of the UCI
"Optical Recognition of Handwritten Digits" set, CC BY 4.0) and the DejaVu fonts (free licence). Everything else reads the file,
so scenes do not depend on the fonts, FreeType or scikit-learn of a machine.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from .vocabulary import CHARACTERS

ASSETS = Path(__file__).with_name("assets.npz")
FONT_FOLDER = Path("/usr/share/fonts/truetype/dejavu")
FONTS = ("DejaVuSans-Bold.ttf", "DejaVuSansCondensed-Bold.ttf", "DejaVuSansMono-Bold.ttf")
EM = 56  # pixels per em of the stored letters
CAP_HEIGHT = 0.729  # of DejaVu, in em
TRAIN_DIGITS, VALIDATION_DIGITS = 1300, 150  # the other 347 handwritten digits are only ever seen in the test set


@dataclass(frozen=True)
class Assets:
    """``glyphs`` [fonts, characters, height, width] in 0..255, ``advances`` [fonts, characters] in pixels at ``EM``,
    ``digits`` [n, 8, 8] in 0..16, ``digit_labels`` [n].
    """

    glyphs: NDArray[np.uint8]
    advances: NDArray[np.float32]
    digits: NDArray[np.uint8]
    digit_labels: NDArray[np.uint8]

    def digit_pool(self, split: str) -> tuple[int, int]:
        """First and one-past-last index of the handwritten digits of a split; the splits are disjoint."""
        last = TRAIN_DIGITS + VALIDATION_DIGITS
        return {"train": (0, TRAIN_DIGITS), "validation": (TRAIN_DIGITS, last), "test": (last, len(self.digits))}[split]


@functools.cache
def load_assets() -> Assets:
    with np.load(ASSETS) as archive:
        return Assets(**{name: archive[name] for name in ("glyphs", "advances", "digits", "digit_labels")})


@functools.lru_cache(maxsize=4096)
def text_mask(text: str, font: int, cap_height: int) -> tuple[NDArray[np.float32], tuple[float, ...]]:
    """A text in capitals as coverage in 0..1 [height, width], and the x at which each character but the first begins."""
    assets = load_assets()
    codes = [CHARACTERS.index(character) for character in text.upper()]
    starts = np.concatenate([[0.0], np.cumsum(assets.advances[font, codes])])
    canvas = np.zeros((EM, int(np.ceil(starts[-1])) + EM), np.uint8)
    for code, start in zip(codes, starts, strict=False):
        glyph, x = assets.glyphs[font, code], round(start)
        canvas[:, x : x + glyph.shape[1]] = np.maximum(canvas[:, x : x + glyph.shape[1]], glyph)
    columns = np.flatnonzero(canvas.any(0))
    rows = np.flatnonzero(canvas.any(1))
    cut = canvas[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    scale = cap_height / (CAP_HEIGHT * EM)
    size = (max(1, round(cut.shape[1] * scale)), max(1, round(cut.shape[0] * scale)))
    small = np.asarray(Image.fromarray(cut).resize(size, Image.Resampling.BOX), np.float32) / 255
    return np.pad(small, 3), tuple(float((s - columns[0]) * scale + 3) for s in starts[1:-1])


def build(path: Path = ASSETS) -> None:
    """Write the asset file from the fonts and scikit-learn's digits."""
    from sklearn.datasets import load_digits

    glyphs = np.zeros((len(FONTS), len(CHARACTERS), EM, EM), np.uint8)
    advances = np.zeros((len(FONTS), len(CHARACTERS)), np.float32)
    for f, name in enumerate(FONTS):
        face = ImageFont.truetype(str(FONT_FOLDER / name), EM)
        for c, character in enumerate(CHARACTERS):
            image = Image.new("L", (EM, EM), 0)
            ImageDraw.Draw(image).text((0, EM * 0.85), character, font=face, fill=255, anchor="ls")
            glyphs[f, c] = np.asarray(image)
            advances[f, c] = face.getlength(character)
    data = load_digits()
    order = np.random.RandomState(0).permutation(len(data.target))
    np.savez_compressed(
        path,
        glyphs=glyphs,
        advances=advances,
        digits=data.images[order].astype(np.uint8),
        digit_labels=data.target[order].astype(np.uint8),
    )


if __name__ == "__main__":
    build()
