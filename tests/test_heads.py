"""Small pictures that would take Pillow hours or gigabytes."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image

from foveate.errors import InputError
from foveate.images import open_picture, picture_in
from foveate.serving.gateway.limits import Limits, RequestError
from foveate.serving.pictures import decoded, measured


def saved(kind: str, mode: str = "RGB", size: tuple[int, int] = (64, 64), **options: object) -> bytes:
    file = io.BytesIO()
    Image.new(mode, size, 200).save(file, kind, **options)
    return file.getvalue()


def scans(number: int) -> bytes:
    """A JPEG whose last scan, of 40 bytes or so, comes again and again."""
    plain = saved("JPEG", "L", (1000, 1000), progressive=True)
    end, last = plain.rindex(b"\xff\xd9"), plain.rindex(b"\xff\xda")
    return plain[:end] + plain[last:end] * number + plain[end:]


def segments(number: int, of: bytes) -> bytes:
    """A JPEG with segments; Pillow copies EXIF of several as often as there are segments."""
    plain = saved("JPEG")
    return plain[:2] + (b"\xff\xe1" + struct.pack(">H", 2 + len(of)) + of) * number + plain[2:]


def chunks(number: int) -> bytes:
    plain = saved("PNG")
    chunk = struct.pack(">L", 0) + b"teSt" + struct.pack(">L", zlib.crc32(b"teSt"))
    return plain[:33] + chunk * number + plain[33:]


def comment(number: int) -> bytes:
    plain = saved("GIF", "L")
    begin = 13 + 3 * (2 << (plain[10] & 7))
    return plain[:begin] + b"\x21\xfe" + b"\1a" * number + b"\0" + plain[begin:]


def tiff(order: str, strips: int = 1, tile: int = 0, big: bool = False) -> bytes:
    """A TIFF of 64 x 64 pixels, in one strip whose place is told so many times, or in one packed tile."""
    place, number = ("Q", "Q") if big else ("L", "H")
    data = zlib.compress(bytes(tile * tile)) if tile else bytes(64 * 64)
    tags = [(256, 4, 1, 64), (257, 4, 1, 64), (258, 3, 1, 8), (259, 3, 1, 8 if tile else 1), (262, 3, 1, 1), (277, 3, 1, 1)]
    tags += [(322, 4, 1, tile), (323, 4, 1, tile)] if tile else [(278, 4, 1, 64)]
    places, sizes = (324, 325) if tile else (273, 279)
    head, size = (16 if big else 8), struct.calcsize(order + "HH" + 2 * place)
    table = head + struct.calcsize(order + number + place) + size * (len(tags) + 2)
    begin = table + 8 * strips
    tags += [
        (places, 4, strips, begin if strips == 1 else table),
        (sizes, 4, strips, len(data) if strips == 1 else begin - 4 * strips),
    ]
    told = b"".join(_entry(order, place, *tag) for tag in sorted(tags))
    mark = (b"II" if order == "<" else b"MM") + struct.pack(order + "H", 43 if big else 42)
    first = mark + (struct.pack(order + "HHQ", 8, 0, head) if big else struct.pack(order + "L", head))
    numbers = struct.pack(order + "L", begin) * strips + struct.pack(order + "L", len(data)) * strips
    return first + struct.pack(order + number, len(tags)) + told + struct.pack(order + place, 0) + numbers + data


def _entry(order: str, place: str, tag: int, kind: int, many: int, value: int) -> bytes:
    if kind == 3:  # short numbers stand at the left
        return struct.pack(f"{order}HH{place}H", tag, kind, many, value) + bytes(struct.calcsize(order + place) - 2)
    told = struct.pack(f"{order}HH{place}", tag, kind, many)
    return told + (struct.pack(order + "L", value) + bytes(4) if place == "Q" and many == 1 else struct.pack(order + place, value))


BOMBS = {
    "scans": scans(3000),
    "exif in segments": segments(9000, b"Exif\0\0" + bytes(100)),
    "empty segments": segments(9000, b""),
    "chunks": chunks(9000),
    "a comment in pieces": comment(9000),
    "places of strips": tiff("<", strips=2**18 + 1),
    "places of strips, BigTIFF": tiff("<", strips=2**18 + 1, big=True),
    "a large tile": tiff("<", tile=3000),
    "a large tile, the other order": tiff(">", tile=3000),
    "a large tile, BigTIFF": tiff("<", tile=3000, big=True),
}
FINE = {
    "scans": scans(50),
    "exif in segments": segments(300, b"Exif\0\0" + bytes(60_000)),
    "chunks": chunks(1000),
    "a comment": comment(1000),
    "strips": tiff(">", strips=1),
    "a tile": tiff("<", tile=512),
    "a tile, BigTIFF": tiff("<", tile=512, big=True),
}


@pytest.mark.parametrize("name", BOMBS)
def test_small_files_that_take_much_are_refused(tmp_path: Path, name: str) -> None:
    data, file = BOMBS[name], tmp_path / "a"
    file.write_bytes(data)
    for work in (lambda: open_picture(file), lambda: picture_in(data, "a")):
        with pytest.raises(InputError, match="Save it anew"):
            work()
    with pytest.raises(RequestError, match="Save it anew"):
        measured(data, "picture 1", Limits(), None, False)


@pytest.mark.parametrize("name", FINE)
def test_others_are_opened(tmp_path: Path, name: str) -> None:
    data, file = FINE[name], tmp_path / "a"
    file.write_bytes(data)
    opened = open_picture(file).image
    assert opened.tobytes() == picture_in(data, "a").tobytes() == decoded(measured(data, "a", Limits(), None, False)).tobytes()


def test_phones_pictures_with_previews(tmp_path: Path) -> None:
    """Each of several pictures in a file has scans of its own."""
    file, frames = tmp_path / "a.mpo", [Image.new("RGB", (64, 64), (each, 0, 0)) for each in (9, 99, 199)]
    frames[0].save(file, "MPO", save_all=True, append_images=frames[1:], progressive=True)
    assert open_picture(file).image.size == (64, 64)
