"""Opening pictures as people have them: any mode, any orientation, with an error that says what is wrong."""

from __future__ import annotations

import warnings
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .errors import InputError

SMALLEST = 4  # pixels along a side; below this, image processors mistake rows for channels


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
    try:
        with warnings.catch_warnings(), ExitStack() as stack:
            warnings.simplefilter("ignore")  # of large pictures, and of odd tags in files that can be read all the same
            opened = stack.enter_context(Image.open(path))
            frames = getattr(opened, "n_frames", 1)
            if frames > 1 and opened.format != "MPO":  # the further frames of a phone's picture are previews
                notes.append(f"{path.name} has {frames} frames; the first one is used")
            opened.seek(0)
            opened.load()
            turned = ImageOps.exif_transpose(opened) or opened
            image = _as_rgb(turned)
    except FileNotFoundError as error:
        raise InputError(f"there is no file {path}") from error
    except IsADirectoryError as error:
        raise InputError(f"{path} is a folder; give one picture") from error
    except UnidentifiedImageError as error:
        raise InputError(f"{path} is not a picture that Pillow can read. Convert it to PNG or JPEG.") from error
    except Image.DecompressionBombError as error:
        raise InputError(f"{path} is too large to open safely ({error}). Scale it down first.") from error
    except Exception as error:  # decoders of damaged files raise whatever their format makes them
        if isinstance(error, OSError) and error.errno is not None:
            raise InputError(f"{path} cannot be read: {error.strerror}") from error
        raise InputError(f"{path} is damaged: {error}. Save it anew or use another copy.") from error
    if min(image.size) < SMALLEST:
        raise InputError(f"{path} is {image.width} x {image.height} pixels; at least {SMALLEST} x {SMALLEST} are needed")
    return Picture(image, tuple(notes))


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        pixels = np.nan_to_num(np.asarray(image, np.float64), posinf=0, neginf=0)
        # 16-bit pictures use the whole range; others are stretched to what they hold
        top = 65535.0 if image.mode.startswith("I;16") or (image.mode == "I" and pixels.max(initial=0) <= 65535) else None
        low, high = (0.0, top) if top else (float(pixels.min(initial=0)), float(pixels.max(initial=0)))
        scaled = (pixels - low) / max(high - low, 1e-12) * 255
        return Image.fromarray(scaled.round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")
