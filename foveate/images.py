"""Opening pictures as people have them: any mode, any orientation, with an error that says what is wrong."""

from __future__ import annotations

import errno
import functools
import math
import re
import stat
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .errors import FoveateError, InputError, cut, first_line
from .heads import opening

SMALLEST = 4  # pixels along a side; below this, image processors mistake rows for channels
SCALED = 25_000_000  # pixels that a processor may make of a small picture
GROWTH = 4  # how many times its own pixels it may make of a large one
STRIP = 2**22  # pixels that are worked on at once
ORIENTATION, TURNED = 274, range(2, 9)  # the tag of EXIF, and its values for pictures that are not upright
PHOTOMETRIC = 262  # the tag of a TIFF that says, among others, whether 0 is white
# what pictures are saved as, where it is there; among Pillow's others are some that run programs, such as Ghostscript for EPS
FORMATS = frozenset("PNG JPEG WEBP GIF BMP DIB TIFF PPM TGA ICO PCX SGI JPEG2000 AVIF HEIF".split())
LONGEST = 160  # characters of a path in a message
BASE64 = re.compile(r"(image/[\w.+-]+;base64,)?[\w+/=\s-]{80,}")
ADDRESS = re.compile(r"(https?|ftp|s3|gs|data):/*", re.IGNORECASE)


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
    with reading(path):
        check_regular(path)
        # as an open file: by its name Pillow may map it into memory, and garbles grey TIFFs that are to be turned
        with opening(path, formats()) as opened:
            frames = getattr(opened, "n_frames", 1)
            if frames > 1 and opened.format != "MPO":  # the further frames of a phone's picture are previews
                notes.append(f"{path.name} has {frames} frames; the first one is used")
            opened.seek(0)
            image = as_rgb(opened)
            check_size(path, image)
    return Picture(image, tuple(notes))


def picture_in(data: bytes, name: str) -> Image.Image:
    """The picture that some bytes hold, as ``open_picture`` opens files; ``name`` is for messages.

    Raises
    ------
    InputError : as for ``open_picture``.
    """
    with reading(Path(name)), opening(data, formats()) as opened:
        image = as_rgb(opened)
        check_size(Path(name), image)
    return image


@functools.cache
def formats() -> tuple[str, ...]:
    """Those of ``FORMATS`` that this Pillow reads."""
    Image.init()
    return tuple(sorted(FORMATS & Image.OPEN.keys()))


def check_regular(path: Path, kind: str = "picture") -> None:
    """Refuse pipes, devices and sockets, from which reading may never end; what is not there is for others to tell.

    Raises
    ------
    InputError : it is one.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise InputError(f"{named(path)} is a pipe, a device or a socket. Give a {kind} that is saved as a file.")


def named(path: Path) -> str:
    """A path as messages name it: not longer than a path is."""
    return cut(str(path), LONGEST)


def is_base64(text: str) -> bool:
    """Whether a text that should be a path looks like a picture itself, in base64."""
    return BASE64.fullmatch(text) is not None


def missing(path: Path) -> str:
    """What to say of a path where there is no file."""
    text = str(path)
    address = ADDRESS.match(text)
    if address:
        kind = address[1].lower()
        if kind == "data":
            return f"{cut(text)} is a data URL, and a file is read here. Save the picture as a file, and give its path."
        address_again = cut(f"{kind}://{text[address.end() :]}", LONGEST)  # of two slashes, a path keeps one
        return f"{address_again} is an address, and a file is read here: nothing is loaded from the network. Download it first."
    if is_base64(text):
        return f"there is no file {cut(text)}. A picture in base64 is no path: save it as a file, and give its path."
    return f"there is no file {named(path)}"


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
    except MemoryError:  # which is not the file's fault
        raise
    except FileNotFoundError as error:
        raise InputError(missing(path)) from error
    except IsADirectoryError as error:
        raise InputError(f"{named(path)} is a folder; give one {kind}") from error
    except UnidentifiedImageError as error:
        raise InputError(f"{named(path)} is not a picture that Pillow can read. Convert it to PNG or JPEG.") from error
    except Image.DecompressionBombError as error:
        raise InputError(f"{named(path)} is too large to open safely ({error}). Scale it down first.") from error
    except Exception as error:  # decoders of damaged files raise whatever their format makes them
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            raise InputError(missing(path)) from error
        if isinstance(error, OSError) and error.errno is not None:
            raise InputError(f"{named(path)} cannot be read: {error.strerror}") from error
        raise InputError(f"{named(path)} is damaged: {first_line(error)}. Save it anew or use another copy.") from error


def check_size(path: Path, image: Image.Image) -> None:
    """Refuse what image processors cannot take.

    Raises
    ------
    InputError : a side has fewer than 4 pixels.
    """
    if min(image.size) < SMALLEST:
        raise InputError(f"{named(path)} is {image.width} x {image.height} pixels; at least {SMALLEST} x {SMALLEST} are needed")


def check_scaled(size: tuple[int, int], name: str, scaler: Any, together: bool = False) -> None:
    """Refuse a picture that a processor would blow up: long and thin ones, whose short side is scaled to what the encoder takes.

    Parameters
    ----------
    size : of the picture, width and height.
    scaler : a processor of images or videos.
    together : whether the prompt has other pictures, too.

    Raises
    ------
    InputError : it would have more than ``SCALED`` pixels on the way, and more than ``GROWTH`` times its own.
    """
    width, height = largest(size, scaler, together)
    if width * height > max(SCALED, GROWTH * size[0] * size[1]):
        raise InputError(
            f"{name} is {size[0]} x {size[1]} pixels, and the processor of this model would make {width} x {height} of it. "
            "Cut it into parts that are less long and thin."
        )


def largest(size: tuple[int, int], scaler: Any, together: bool = False) -> tuple[int, int]:
    """The largest width and height that a processor brings a picture to, on the way to what the encoder takes."""
    width, height = size
    tiles = getattr(scaler, "image_grid_pinpoints", None)  # to one of these sizes
    if getattr(scaler, "do_pad", False) and hasattr(scaler, "pad_to_square") and (together or not tiles):
        width = height = max(size)
    found = [(width, height)]
    if getattr(scaler, "do_resize", True):
        short = _setting(scaler, "size", "shortest_edge")
        # with a longest edge, both may be numbers of pixels; that bounds what is made either way
        if tiles or not short or _setting(scaler, "size", "longest_edge"):
            return found[0]
        scale = short / min(width, height)
        width, height = round(width * scale), round(height * scale)
        found.append((width, height))
    if getattr(scaler, "do_center_crop", False):  # what is smaller than the crop is padded
        found.append((max(width, _setting(scaler, "crop_size", "width")), max(height, _setting(scaler, "crop_size", "height"))))
    return max(found, key=math.prod)


def _setting(scaler: Any, name: str, side: str) -> int:
    """A side of a size that a processor has among its settings; 0 where it has none."""
    sizes = getattr(scaler, name, None)
    return int((sizes.get(side) if isinstance(sizes, Mapping) else getattr(sizes, side, None)) or 0)


def as_rgb(opened: Image.Image) -> Image.Image:
    """The frame at which an opened picture stands, as 8-bit RGB, upright and on white.

    What takes more memory than the picture itself is done in strips.
    """
    opened.load()
    image = ImageOps.exif_transpose(opened) if opened.getexif().get(ORIENTATION) in TURNED else opened
    deep, clear = image.mode.startswith("I") or image.mode == "F", image.info.get("transparency")
    if not deep and clear is None and image.mode not in ("RGBA", "LA", "PA", "La", "RGBa"):
        return image.convert("RGB")
    made, height = Image.new("RGB", image.size), max(1, STRIP // image.width)
    places = [(0, top, image.width, min(top + height, image.height)) for top in range(0, image.height, height)]
    low, high = _range(image, opened.format, places) if deep else (0.0, 0.0)
    white_is_zero = getattr(opened, "tag_v2", {}).get(PHOTOMETRIC) == 0
    for place in places:
        strip = image.crop(place)
        if deep:
            pixels = _pixels(strip)
            scaled = (pixels - low) / max(high - low, 1e-12) * 255
            grey = (255 - scaled if white_is_zero else scaled).round().clip(0, 255)  # Pillow turns only 8 bits the right way
            made.paste(Image.fromarray(np.where(pixels == clear, 255, grey).astype(np.uint8)), place)
        else:
            if isinstance(clear, tuple) and max(clear) > 255:  # of a picture of 16 bits, of which Pillow keeps the upper 8
                strip.info["transparency"] = tuple(value >> 8 for value in clear)
            white = Image.new("RGBA", strip.size, (255, 255, 255, 255))
            made.paste(Image.alpha_composite(white, strip.convert("RGBA")).convert("RGB"), place)
    return made


def _pixels(strip: Image.Image) -> np.ndarray:
    return np.nan_to_num(np.asarray(strip, np.float32), posinf=0, neginf=0)


def _range(image: Image.Image, kind: str | None, places: Sequence[tuple[int, int, int, int]]) -> tuple[float, float]:
    """Which values of a grey picture of more than 8 bits are black and white.

    16 bits use their whole range. So do 32-bit integers that fit into 8 or 16 bits, as tables and masks are saved; others, and
    floating-point numbers, are stretched to what the picture holds.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and kind == "PNG"):
        return 0.0, 65535.0
    ends = [(float(pixels.min()), float(pixels.max())) for pixels in (_pixels(image.crop(place)) for place in places)]
    low, high = min(0.0, *(low for low, _ in ends)), max(0.0, *(high for _, high in ends))
    if image.mode == "I" and low >= 0 and high <= 65535:
        return 0.0, 255.0 if high <= 255 else 65535.0
    return low, high
