"""Opening pictures as people have them: any mode, any orientation, with an error that says what is wrong."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .errors import FoveateError, InputError

SMALLEST = 4  # pixels along a side; below this, image processors mistake rows for channels
PHOTOMETRIC = 262  # the tag of a TIFF that says, among others, whether 0 is white


@dataclass(frozen=True)
class Picture:
    """An RGB picture, and what was done to make it one."""

    image: Image.Image
    notes: tuple[str, ...]


def open_picture(path: str | Path) -> Picture:
    """Open a picture as 8-bit RGB, upright.

    Turns it by its EXIF orientation, takes the first frame of animations, puts transparent pixels on white, scales 16-bit and
    float pixels to 8 bits, and converts palettes, CMYK and grey.

    Raises
    ------
    InputError : there is no such file, it is no picture, it is damaged, too large to open safely, or smaller than 4 pixels.
    """
    path, notes = Path(path), []
    with reading(path), Image.open(path) as opened:
        frames = getattr(opened, "n_frames", 1)
        if frames > 1 and opened.format != "MPO":  # the further frames of a phone's picture are previews
            notes.append(f"{path.name} has {frames} frames; the first one is used")
        opened.seek(0)
        image = as_rgb(opened)
        check_size(path, image)
    return Picture(image, tuple(notes))


@contextmanager
def reading(path: Path, kind: str = "picture") -> Iterator[None]:
    """Errors of Pillow and of the file system as errors of ours, about a file of that ``kind``.

    Raises
    ------
    InputError : there is no such file, it is of another kind, it is damaged or too large to open safely.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large pictures, and of odd tags in files that can be read all the same
            yield
    except FoveateError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"there is no file {path}") from error
    except IsADirectoryError as error:
        raise InputError(f"{path} is a folder; give one {kind}") from error
    except UnidentifiedImageError as error:
        raise InputError(f"{path} is not a picture that Pillow can read. Convert it to PNG or JPEG.") from error
    except Image.DecompressionBombError as error:
        raise InputError(f"{path} is too large to open safely ({error}). Scale it down first.") from error
    except Exception as error:  # decoders of damaged files raise whatever their format makes them
        if isinstance(error, OSError) and error.errno is not None:
            raise InputError(f"{path} cannot be read: {error.strerror}") from error
        raise InputError(f"{path} is damaged: {error}. Save it anew or use another copy.") from error


def check_size(path: Path, image: Image.Image) -> None:
    """Refuse what image processors cannot take.

    Raises
    ------
    InputError : a side has fewer than 4 pixels.
    """
    if min(image.size) < SMALLEST:
        raise InputError(f"{path} is {image.width} x {image.height} pixels; at least {SMALLEST} x {SMALLEST} are needed")


def _range(image: Image.Image, kind: str | None, pixels: np.ndarray) -> tuple[float, float]:
    """Which values of a grey picture of more than 8 bits are black and white.

    16 bits use their whole range. So do 32-bit integers that fit into 8 or 16 bits, as tables and masks are saved; others, and
    floating-point numbers, are stretched to what the picture holds.
    """
    low, high = float(pixels.min(initial=0)), float(pixels.max(initial=0))
    if image.mode.startswith("I;16") or (image.mode == "I" and kind == "PNG"):
        return 0.0, 65535.0
    if image.mode == "I" and low >= 0 and high <= 65535:
        return 0.0, 255.0 if high <= 255 else 65535.0
    return low, high


def as_rgb(opened: Image.Image) -> Image.Image:
    """The frame at which an opened picture stands, as 8-bit RGB, upright and on white."""
    opened.load()
    white_is_zero = getattr(opened, "tag_v2", {}).get(PHOTOMETRIC) == 0
    image = ImageOps.exif_transpose(opened)
    clear = image.info.get("transparency")
    if image.mode.startswith("I") or image.mode == "F":
        pixels = np.nan_to_num(np.asarray(image, np.float64), posinf=0, neginf=0)
        low, high = _range(image, opened.format, pixels)
        scaled = (pixels - low) / max(high - low, 1e-12) * 255
        grey = (255 - scaled if white_is_zero else scaled).round().clip(0, 255)  # Pillow turns only 8 bits the right way
        return Image.fromarray(np.where(pixels == clear, 255, grey).astype(np.uint8)).convert("RGB")
    if isinstance(clear, tuple) and max(clear) > 255:  # of a picture of 16 bits, of which Pillow keeps the upper 8
        image.info["transparency"] = tuple(value >> 8 for value in clear)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or clear is not None:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")
