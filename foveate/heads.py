"""Opens pictures with Pillow, but for small files that would take it hours or gigabytes."""

from __future__ import annotations

import io
import math
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from .errors import InputError

PIECES = 8192  # reads of a file until Pillow knows what it is; each part of its head takes two or more
SCANS = 100  # of a JPEG; each goes over the whole picture, and may be written in a few bytes
NUMBERS = 2**18  # that one tag of a TIFF has, such as the places of its strips
TILE = 2**22  # pixels that a tile of a TIFF may have where the picture has fewer
# the head of a scan as decoders take it; inside of one, 0xff never comes before anything but 0
SCAN = re.compile(rb"\xff\xda\x00(?:\x08\x01|\x0a\x02|\x0c\x03|\x0e\x04)")
OVERLAP = 4  # bytes of such a head that may be in the piece before
PIECE = 2**20
BYTES, TEXTS = {1: 1, 3: 2, 4: 4, 6: 1, 8: 2, 9: 4, 16: 8, 17: 8}, (1, 2, 6, 7)  # kinds of a tag's values
WIDTH, HEIGHT, TILE_WIDTH, TILE_HEIGHT = 256, 257, 322, 323  # tags


class _Few(io.BufferedIOBase):
    """Mixed into a file: it can be read so many times only."""

    left: float = math.inf

    def read(self, size: int | None = -1, /) -> bytes:
        self.left -= 1
        if self.left < 0:
            raise InputError(f"the head of the picture is in more than {PIECES} pieces. Save it anew as PNG or JPEG.")
        return super().read(size)


class _Bytes(_Few, io.BytesIO):
    pass


class _File(_Few, io.BufferedReader):
    pass


@contextmanager
def opening(source: bytes | Path, formats: tuple[str, ...]) -> Iterator[Image.Image]:
    """A picture of some bytes or of a file, of which Pillow has read the head.

    Raises
    ------
    InputError : it is made to take far more time or memory than its size tells.
    """
    with _Bytes(source) if isinstance(source, bytes) else _File(io.FileIO(source)) as file:
        start = file.read(16)
        if start.startswith(b"\xff\xd8"):
            _check_scans(file)
        if start[:2] in (b"II", b"MM") and {*b"*+"} & {*start[2:4]}:
            _check_tags(file, start)
        file.seek(0)
        file.left = PIECES
        with Image.open(file, formats=formats) as opened:
            file.left = math.inf
            yield opened


def _check_scans(file: BinaryIO | _Few) -> None:
    """Refuse a JPEG of very many scans."""
    found, rest = 0, b""
    while piece := file.read(PIECE):
        found += len(SCAN.findall(rest + piece))
        rest = piece[-OVERLAP:]
    if found > SCANS:
        raise InputError(f"the picture is a JPEG of {found} scans; at most {SCANS} are opened. Save it anew.")


def _check_tags(file: BinaryIO | _Few, start: bytes) -> None:
    """Refuse a TIFF with a tag of very many numbers, or with tiles that are far larger than the picture.

    What is no TIFF, or damaged, is left to Pillow.
    """
    order, big = "<" if start[:2] == b"II" else ">", start[2:3] == b"+"
    place, number, entry = ("Q", "Q", "HHQ8s") if big else ("L", "H", "HHL4s")
    try:
        file.seek(struct.unpack_from(order + place, start, 8 if big else 4)[0])
        (count,) = struct.unpack(order + number, file.read(struct.calcsize(order + number)))
    except (struct.error, OSError, ValueError, OverflowError):
        return
    size = struct.calcsize(order + entry)
    entries = file.read(min(count, 2**16) * size)
    sides: dict[int, int] = {}
    for tag, kind, many, value in struct.iter_unpack(order + entry, entries[: len(entries) // size * size]):
        if many > NUMBERS and kind not in TEXTS:
            raise InputError(f"the picture is a TIFF whose tag {tag} has {many} numbers; at most {NUMBERS} are read. Save it anew.")
        if tag in (WIDTH, HEIGHT, TILE_WIDTH, TILE_HEIGHT):
            told = int.from_bytes(value[: BYTES.get(kind, len(value))], "little" if order == "<" else "big")
            sides[tag] = max(told, sides.get(tag, 0)) if tag in (TILE_WIDTH, TILE_HEIGHT) else min(told, sides.get(tag, told))
    pixels, tile = (sides.get(one, 0) * sides.get(other, 0) for one, other in ((WIDTH, HEIGHT), (TILE_WIDTH, TILE_HEIGHT)))
    if tile > max(TILE, pixels):
        raise InputError(f"the picture is a TIFF of {pixels} pixels in tiles of {tile}. Save it anew.")
