"""Pictures as people have them."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import subprocess
import sys
import tracemalloc
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import transformers
from PIL import EpsImagePlugin, Image

import foveate
from foveate import images as images_module
from foveate.chat import make_inputs
from foveate.errors import first_line, shown
from foveate.images import SCALED, check_scaled, formats, largest, open_picture, picture_in
from foveate.video import open_video

RED = (200, 30, 40)


def close(image, color, tolerance=6):
    assert image.mode == "RGB"
    return np.abs(np.asarray(image, float).mean((0, 1)) - color).max() <= tolerance


@pytest.mark.parametrize(
    ("mode", "name"),
    [
        ("RGB", "a.png"),
        ("RGB", "a.jpg"),
        ("CMYK", "a.jpg"),
        ("P", "a.png"),
        ("P", "a.gif"),
        ("RGBA", "a.png"),
        ("RGB", "a.webp"),
        ("CMYK", "a.tiff"),
    ],
)
def test_modes_and_formats(tmp_path, mode, name):
    Image.new("RGB", (20, 30), RED).convert(mode).save(tmp_path / name)
    picture = open_picture(tmp_path / name)
    assert picture.image.size == (20, 30)
    assert close(picture.image, RED)
    assert picture.notes == ()


def test_sixteen_bits_are_scaled_and_not_cut(tmp_path):
    ramp = np.linspace(0, 65535, 64, dtype=np.uint16).repeat(8).reshape(64, 8)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    pixels = np.asarray(open_picture(tmp_path / "deep.png").image)[:, 0, 0].astype(float)
    np.testing.assert_allclose(pixels, np.linspace(0, 255, 64), atol=1)


def write_png(path, pixels, color_type, clear=None):
    """A PNG of 16 bits by its specification: Pillow cannot write all kinds. ``clear`` is the colour that stands for no pixel."""
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in pixels)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 16, color_type, 0, 0, 0))]
    chunks += [] if clear is None else [(b"tRNS", struct.pack(f">{len(clear)}H", *clear))]
    chunks += [(b"IDAT", zlib.compress(lines)), (b"IEND", b"")]
    framed = [struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(framed))


def over_white(color, alpha):
    """The upper 8 of 16 bits, laid over white."""
    return [value / 257 * alpha / 65535 + 255 * (1 - alpha / 65535) for value in color]


@pytest.mark.parametrize(
    ("color_type", "values", "expected"),
    [
        (0, (0x4321,), over_white([0x4321] * 3, 65535)),
        (2, (0xABCD, 0x1200, 0xFFFF), over_white([0xABCD, 0x1200, 0xFFFF], 65535)),
        (4, (0x4321, 0x8000), over_white([0x4321] * 3, 0x8000)),
        (6, (0xABCD, 0x1200, 0xFFFF, 0x4000), over_white([0xABCD, 0x1200, 0xFFFF], 0x4000)),
    ],
    ids=["grey", "colour", "grey and alpha", "colour and alpha"],
)
def test_png_of_sixteen_bits(tmp_path, color_type, values, expected):
    write_png(tmp_path / "deep.png", np.broadcast_to(np.array(values), (8, 6, len(values))), color_type)
    assert close(open_picture(tmp_path / "deep.png").image, expected, 1.5)


@pytest.mark.parametrize(("color_type", "clear"), [(0, (0x4321,)), (2, (0xABCD, 0x1200, 0xFFFF))])
def test_a_clear_colour_of_sixteen_bits(tmp_path, color_type, clear):
    pixels = np.full((8, 8, len(clear)), 0x1000)
    pixels[:4] = clear
    write_png(tmp_path / "deep.png", pixels, color_type, clear)
    found = np.asarray(open_picture(tmp_path / "deep.png").image)
    assert found[:4].min() == 255
    assert found[4:].max() == 16


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("white", [0, 1])
def test_tiff_of_sixteen_bits(tmp_path, order, white):
    """By its specification: one strip; ``white`` = 0 says that 0 is white."""
    pixels = np.linspace(0, 65535, 64).astype(f"{order}u2").repeat(8)
    tags = [(256, 8), (257, 64), (258, 16), (259, 1), (262, white), (273, 8), (277, 1), (278, 64), (279, 1024)]
    entries = b"".join(struct.pack(f"{order}HHIH2x", tag, 3, 1, value) for tag, value in tags)
    head = {"<": b"II", ">": b"MM"}[order] + struct.pack(f"{order}HI", 42, 8 + 1024)
    ends = struct.pack(f"{order}H", len(tags)) + entries + bytes(4)
    (tmp_path / "deep.tiff").write_bytes(head + pixels.tobytes() + ends)
    if (order, white) == (">", 0):  # which no version of Pillow knows
        with pytest.raises(foveate.InputError, match="not a picture that Pillow can read"):
            open_picture(tmp_path / "deep.tiff")
        return
    found = np.asarray(open_picture(tmp_path / "deep.tiff").image)[:, 0, 0].astype(float)
    np.testing.assert_allclose(found, np.linspace(0, 255, 64) if white else np.linspace(255, 0, 64), atol=1)


def test_float_pixels_are_stretched(tmp_path):
    Image.fromarray(np.linspace(-1, 1, 64, dtype=np.float32).reshape(8, 8)).save(tmp_path / "float.tiff")
    pixels = np.asarray(open_picture(tmp_path / "float.tiff").image)
    assert (pixels.min(), pixels.max()) == (0, 255)


def test_grey_and_bilevel(tmp_path):
    for mode in ("L", "1", "LA"):
        Image.new(mode, (9, 9), 255 if mode != "LA" else (255, 255)).save(tmp_path / "grey.png")
        assert close(open_picture(tmp_path / "grey.png").image, (255, 255, 255))


def test_transparent_pixels_are_white(tmp_path):
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert close(open_picture(tmp_path / "clear.png").image, (255, 255, 255))


@pytest.mark.parametrize(("name", "clear"), [("a.png", 1), ("a.png", bytes([255, 0, 255])), ("a.gif", 1)])
def test_palettes_with_clear_colours(tmp_path, name, clear):
    image = Image.new("P", (8, 8), 2)
    image.putpalette([0, 0, 0, *RED, 0, 0, 255])
    image.paste(1, (0, 0, 8, 4))
    image.save(tmp_path / name, transparency=clear)
    found = np.asarray(open_picture(tmp_path / name).image)
    assert found[:4].min() == 255
    assert (found[4:] == (0, 0, 255)).all()


def write_cmyk_jpeg(path, ink):
    """8 x 8 pixels of one colour, by hand: each block has a first coefficient only. Adobe's files hold 255 for no ink."""

    def segment(marker, data):
        return bytes([255, marker]) + struct.pack(">H", len(data) + 2) + data

    bits = ""
    for amount in ink:
        level = 8 * (255 - amount - 128)  # in steps of 1
        size = abs(level).bit_length()
        bits += f"{size:04b}" + (f"{level if level > 0 else level + 2**size - 1:0{size}b}" if size else "") + "0"
    bits += "1" * (-len(bits) % 8)
    scan = int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\0")
    planes = range(1, 5)
    path.write_bytes(
        b"\xff\xd8"
        + segment(0xEE, b"Adobe" + struct.pack(">HHHB", 100, 0, 0, 0))
        + segment(0xDB, b"\0" + b"\1" * 64)
        + segment(0xC0, struct.pack(">BHHB", 8, 8, 8, 4) + b"".join(bytes([plane, 0x11, 0]) for plane in planes))
        + segment(0xC4, b"\0" + bytes([0, 0, 0, 12] + [0] * 12) + bytes(range(12)))  # sizes 0 to 11, in 4 bits each
        + segment(0xC4, b"\x10" + bytes([1] + [0] * 15) + b"\0")  # the end of a block, in 1 bit
        + segment(0xDA, b"\4" + b"".join(bytes([plane, 0]) for plane in planes) + b"\0\x3f\0")
        + scan
        + b"\xff\xd9"
    )


@pytest.mark.parametrize(
    ("ink", "expected"),
    [
        ((0, 0, 0, 0), (255, 255, 255)),
        ((0, 255, 255, 0), (255, 0, 0)),
        ((255, 0, 255, 128), (0, 127, 0)),
        ((0, 0, 0, 255), (0, 0, 0)),
    ],
)
def test_inks_of_adobe_are_not_inverted(tmp_path, ink, expected):
    write_cmyk_jpeg(tmp_path / "print.jpg", ink)
    assert close(open_picture(tmp_path / "print.jpg").image, expected, 2)


def test_phones_store_a_preview_behind_the_picture(tmp_path):
    Image.new("RGB", (20, 30), RED).save(tmp_path / "a.mpo", save_all=True, append_images=[Image.new("RGB", (10, 15))])
    picture = open_picture(tmp_path / "a.mpo")
    assert close(picture.image, RED)
    assert picture.notes == ()


ORIENTATIONS = {  # of the tag: where the first row and the first column are shown (EXIF 2.3, table of tag 274)
    1: ("top", "left"),
    2: ("top", "right"),
    3: ("bottom", "right"),
    4: ("bottom", "left"),
    5: ("left", "top"),
    6: ("right", "top"),
    7: ("right", "bottom"),
    8: ("left", "bottom"),
}


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_jpeg_of_any_orientation(tmp_path, orientation):
    """The first row is red, the first column blue; where they are seen is the tag's definition."""
    image = Image.new("RGB", (48, 32))
    image.paste((0, 0, 255), (0, 0, 16, 32))
    image.paste((255, 0, 0), (16, 0, 48, 8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "a.jpg", exif=exif, quality=95, subsampling=0)
    found = np.asarray(open_picture(tmp_path / "a.jpg").image, float)
    assert found.shape == ((32, 48, 3) if orientation < 5 else (48, 32, 3))
    sides = {"top": found[:4], "bottom": found[-4:], "left": found[:, :4], "right": found[:, -4:]}
    for side, channel in zip(ORIENTATIONS[orientation], (0, 2), strict=True):
        amounts = {name: pixels[..., channel].mean() for name, pixels in sides.items()}
        assert max(amounts, key=amounts.get) == side


def test_a_broken_exif_is_no_broken_picture(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20), RED).save(tmp_path / "a.jpg", exif=exif)
    data = (tmp_path / "a.jpg").read_bytes()
    place = data.index(b"Exif") + 6
    for damage in (b"\xff" * 8, b"II*\0\xff\xff\xff\x7f", b"MM\0*\0\0\0\x08\xff\xff"):
        (tmp_path / "a.jpg").write_bytes(data[:place] + damage + data[place + len(damage) :])
        assert close(open_picture(tmp_path / "a.jpg").image, RED)


def test_exif_orientation(tmp_path):
    image = Image.new("RGB", (40, 20), (0, 0, 0))
    image.paste((255, 255, 255), (0, 0, 10, 20))  # white on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise
    image.save(tmp_path / "turned.png", exif=exif)
    upright = np.asarray(open_picture(tmp_path / "turned.png").image)
    assert upright.shape == (40, 20, 3)
    assert upright[:8].min() == 255
    assert upright[12:].max() == 0


def test_animations_give_their_first_frame_and_say_so(tmp_path):
    frames = [Image.new("RGB", (12, 12), color) for color in (RED, (0, 255, 0), (0, 0, 255))]
    frames[0].save(tmp_path / "move.gif", save_all=True, append_images=frames[1:])
    picture = open_picture(tmp_path / "move.gif")
    assert close(picture.image, RED, 12)
    assert picture.notes == ("move.gif has 3 frames; the first one is used",)


@pytest.mark.parametrize("name", ["a.webp", "a.png", "a.tiff"])
def test_other_files_of_several_pictures(tmp_path, name):
    frames = [Image.new("RGB", (12, 12), color) for color in (RED, (0, 255, 0))]
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
    picture = open_picture(tmp_path / name)
    assert close(picture.image, RED)
    assert picture.notes == (f"{name} has 2 frames; the first one is used",)


def test_long_thin_pictures(tmp_path):
    for size in ((4, 3000), (3000, 4)):
        Image.new("RGB", size, RED).save(tmp_path / "thin.png")
        assert open_picture(tmp_path / "thin.png").image.size == size


@pytest.mark.parametrize("size", [(1, 1), (3, 50), (50, 2)])
def test_too_small(tmp_path, size):
    Image.new("RGB", size).save(tmp_path / "dot.png")
    with pytest.raises(foveate.InputError, match="at least 4 x 4"):
        open_picture(tmp_path / "dot.png")


def test_too_large(tmp_path):
    Image.new("1", (20_000, 20_000)).save(tmp_path / "huge.png")
    with pytest.raises(foveate.InputError, match="too large to open safely"):
        open_picture(tmp_path / "huge.png")


def test_damaged_and_other_files(tmp_path):
    Image.effect_noise((200, 200), 50).save(tmp_path / "good.png")
    data = (tmp_path / "good.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.txt").write_text("no picture")
    for name, match in (
        ("cut.png", "damaged"),
        ("empty.png", "not a picture"),
        ("text.txt", "not a picture"),
        ("none.png", "no file"),
        ("", "folder"),
    ):
        with pytest.raises(foveate.InputError, match=match):
            open_picture(tmp_path / name)


@pytest.mark.parametrize("kind", ["png", "jpg", "gif", "bmp", "tiff", "webp", "ppm", "tga", "ico"])
def test_any_damage_is_named_or_harmless(tmp_path, kind):
    """Bytes changed and cut at random: a picture comes back, or our own error."""
    whole = tmp_path / f"whole.{kind}"
    Image.effect_noise((40, 40), 60).convert("RGB").save(whole)
    random, data = np.random.default_rng(0), whole.read_bytes()
    broken, refused = tmp_path / f"broken.{kind}", 0
    for trial in range(40):
        changed = bytearray(data)
        for place in random.integers(0, len(data), 12 if trial % 2 else 3):
            changed[place] = random.integers(256)
        broken.write_bytes(bytes(changed[: random.integers(len(data) // 2, len(data) + 1)]))
        try:
            assert open_picture(broken).image.mode == "RGB"
        except foveate.InputError:
            refused += 1
    assert refused > 0 or kind in ("bmp", "ppm", "tga")


def test_pixels_that_are_no_numbers(tmp_path, recwarn):
    values = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    values[0, 0], values[0, 1] = np.nan, np.inf
    Image.fromarray(values).save(tmp_path / "float.tiff")
    pixels = np.asarray(open_picture(tmp_path / "float.tiff").image)
    assert (pixels.min(), pixels.max()) == (0, 255)
    assert not recwarn.list


@pytest.mark.parametrize(("top", "white"), [(255, 255), (200, 255), (65535, 65535), (100_000, 100_000)])
def test_grey_of_32_bit_integers(tmp_path, top, white):
    """Values that fit into 8 or 16 bits are meant so, as masks and tables are saved; others are stretched."""
    pixels = np.linspace(0, top, 64).round().astype(np.int32).reshape(8, 8)
    path = tmp_path / "grey.tif"
    Image.fromarray(pixels, "I").save(path)
    found = np.asarray(open_picture(path).image)[..., 0].astype(int)
    assert np.abs(found - pixels * 255 / white).max() <= 1


# -- long and thin pictures, which a processor scales up until the short side fits

PROCESSORS = ("CLIP", "Llava", "LlavaNext", "LlavaOnevision", "VideoLlava", "Siglip", "Qwen2VL", "GotOcr2", "Gemma3", "Idefics3")
PROCESSORS += ("SmolVLM", "Pixtral", "Glm4v")


def processor_of(name, **options):
    kind = getattr(transformers, f"{name}ImageProcessorPil", None) or getattr(transformers, f"{name}ImageProcessor")
    return kind(**options)


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("size", [(4, 6000), (6000, 4), (600, 4), (64, 48)])
@pytest.mark.parametrize("number", [1, 2])
def test_processors_of_all_families_make_no_gigabytes_of_a_picture(name, size, number):
    """What is not refused needs little memory; and what is refused would have needed much."""
    options = {"do_pad": True} if name == "Llava" else {}
    processor = processor_of(name, **options)
    width, height = largest(size, processor, number > 1)
    if width * height > SCALED:
        assert max(size) == 6000
        assert name in ("CLIP", "Llava", "VideoLlava", "LlavaOnevision")
        with pytest.raises(foveate.InputError, match=f"^picture 1 is {size[0]} x {size[1]} pixels"):
            check_scaled(size, "picture 1", processor, number > 1)
        return
    check_scaled(size, "picture 1", processor, number > 1)
    tracemalloc.start()
    with contextlib.suppress(ValueError):  # Qwen refuses what is very thin
        processor(images=[[Image.new("RGB", size)] * number])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200 * 2**20


def test_what_processors_make_of_a_size():
    def made(picture, together=False, **settings):
        return largest(picture, SimpleNamespace(**settings), together)

    assert made((4, 40_000), size={"shortest_edge": 336}) == (336, 3_360_000)
    assert made((4000, 3000), size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}) == (4000, 3000)
    assert made((4, 40_000), size={"shortest_edge": 336}, do_resize=False) == (4, 40_000)
    crop = {"crop_size": {"height": 336, "width": 336}, "do_center_crop": True, "do_resize": False}
    assert made((4, 40_000), **crop) == (336, 40_000)  # padded to the crop
    assert made((4, 40_000), size={"height": 224, "width": 224}) == (4, 40_000)
    assert made((4, 40_000), size={"shortest_edge": 3136, "longest_edge": 1_003_520}) == (4, 40_000)  # numbers of pixels
    padded = {"do_pad": True, "pad_to_square": None, "size": {"height": 384, "width": 384}}
    assert made((4, 40_000), **padded) == (40_000, 40_000)
    tiles = {"image_grid_pinpoints": [[336, 336]]}
    assert made((4, 40_000), **padded, **tiles) == (4, 40_000)
    assert made((4, 40_000), together=True, **padded, **tiles) == (40_000, 40_000)
    check_scaled((16_000, 12_000), "a large photo", SimpleNamespace(**padded))
    check_scaled((3000, 600), "a panorama", SimpleNamespace(size={"shortest_edge": 1024}))
    check_scaled((4, 40_000), "a picture", None)


def test_questions_about_pictures_that_would_be_blown_up():
    """Whoever builds the prompt: here for the pocket model."""
    model, processor = foveate.load_pocket()
    with pytest.raises(foveate.InputError, match=r"picture 1 is 4 x 40000 pixels.*would make 192 x 1920000"):
        make_inputs(processor, model, Image.new("RGB", (4, 40_000)), "what color is the star ?")
    make_inputs(processor, model, Image.new("RGB", (40, 4000)), "what color is the star ?")


# -- files that are no pictures

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\nshowpage\n%%EOF\n"


def test_no_program_is_run(tmp_path, monkeypatch):
    """A PostScript file by the name of a picture: Pillow would have Ghostscript draw it."""
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("Ghostscript was run"))
    (tmp_path / "a.png").write_bytes(EPS)
    with pytest.raises(foveate.InputError, match="not a picture that Pillow can read"):
        open_picture(tmp_path / "a.png")
    with pytest.raises(foveate.InputError, match="not a picture that Pillow can read"):
        picture_in(EPS, "picture 1")
    assert {"PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"} <= set(formats())
    assert not {"EPS", "WMF", "PDF"} & set(formats())


def test_pipes_devices_and_sockets(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "link.png").symlink_to(tmp_path / "pipe.png")
    places = [tmp_path / "pipe.png", tmp_path / "link.png", "/dev/zero"]
    with socket.socket(socket.AF_UNIX) as listening:
        monkeypatch.chdir(tmp_path)  # the path of a socket is short
        listening.bind("socket.png")
        for place in [*places, "socket.png"]:
            for reader in (open_picture, open_video):
                with pytest.raises(foveate.InputError, match="is a pipe, a device or a socket"):
                    reader(place)


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("https://example.org/a.png", "https://example.org/a.png is an address, and a file is read here"),
        ("HTTP://example.org/a.mp4", "http://example.org/a.mp4 is an address"),
        ("data:image/png;base64," + "iVBORw0K" * 10_000, "is a data URL, and a file is read here"),
        ("iVBORw0K" * 10_000, "A picture in base64 is no path"),
        ("image/png;base64," + "iVBORw0K" * 30, "A picture in base64 is no path"),
        ("a b" * 10_000, "there is no file"),
    ],
)
def test_what_is_no_path(place, said):
    for reader in (open_picture, open_video):
        with pytest.raises(foveate.InputError) as error:
            reader(place)
        assert said in str(error.value)
        assert len(str(error.value)) < 300


def test_texts_in_messages_are_short():
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    for value in ("x" * 10**6, ["y" * 10**6] * 100, deep, {"a": deep}, 10**1000):
        assert len(shown(value)) < 100
    assert (shown("a'b"), shown(None), shown(0.5), shown(True)) == ('"a\'b"', "None", "0.5", "True")
    assert len(first_line(ValueError("z" * 10**6))) < 600


def test_grey_with_transparency(tmp_path):
    grey = Image.new("LA", (8, 8), (0, 0))
    grey.paste((100, 255), (0, 0, 8, 4))
    grey.paste((100, 128), (0, 4, 8, 6))
    grey.save(tmp_path / "grey.png")
    found = np.asarray(open_picture(tmp_path / "grey.png").image)
    assert [found[row, 0].tolist() for row in (0, 4, 7)] == [[100] * 3, [177] * 3, [255] * 3]


# -- memory


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F"])
@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("compression", ["raw", "tiff_lzw"])
def test_tiff_of_any_orientation(tmp_path, mode, orientation, compression):
    """Every value in its place: the picture is that of the same values without the tag, turned."""
    values = np.random.default_rng(0).integers(0, 256, (17, 13), np.uint8)
    wide = {"I;16": values.astype(np.uint16) * 257, "I": values.astype(np.int32), "F": values.astype(np.float32)}
    image = Image.fromarray(wide[mode]) if mode in wide else Image.fromarray(values).convert(mode)
    image.save(tmp_path / "plain.tif", compression=compression)
    image.save(tmp_path / "turned.tif", compression=compression, tiffinfo={274: orientation})
    turns = (None, *(Image.Transpose(number) for number in (0, 3, 1, 5, 4, 6, 2)))  # by the tag: its definition is tested above
    plain = open_picture(tmp_path / "plain.tif").image
    turn = turns[orientation - 1]
    np.testing.assert_array_equal(open_picture(tmp_path / "turned.tif").image, plain if turn is None else plain.transpose(turn))


@pytest.mark.parametrize("strip", [1, 50, 2**22])
@pytest.mark.parametrize("name", ["la.png", "p.png", "rgba.webp", "i16.png", "i32.tif", "float.tif", "turned.png", "turned.tif"])
def test_pictures_in_strips(tmp_path, monkeypatch, name, strip):
    """The same, in however many pieces a picture is made ready."""
    random = np.random.default_rng(0)
    grey = random.integers(0, 256, (17, 13), np.uint8)
    noise = Image.fromarray(random.integers(0, 256, (17, 13, 4), np.uint8))
    exif = Image.Exif()
    exif[274] = 6
    images = {
        "la.png": noise.convert("LA"),
        "p.png": noise.convert("RGB").quantize(16),
        "rgba.webp": noise,
        "i16.png": Image.fromarray(grey.astype(np.uint16) * 257),
        "i32.tif": Image.fromarray(grey.astype(np.int32) * 1000 - 500),
        "float.tif": Image.fromarray(grey.astype(np.float32) / 7),
        "turned.png": noise,
        "turned.tif": Image.fromarray(grey.astype(np.uint16) * 257),
    }
    options = {"p.png": {"transparency": 3}, "rgba.webp": {"lossless": True}}.get(name, {})
    images[name].save(tmp_path / name, **options, **({"exif": exif} if "turned" in name else {}))
    whole = np.asarray(open_picture(tmp_path / name).image)
    monkeypatch.setattr(images_module, "STRIP", strip)
    found = np.asarray(open_picture(tmp_path / name).image)
    assert found.shape == ((13, 17, 3) if "turned" in name else (17, 13, 3))
    np.testing.assert_array_equal(found, whole)
    assert len(np.unique(found)) > 10


def test_the_memory_of_large_pictures(tmp_path):
    """Small files of many pixels: next to the picture and its RGB copy, there is little."""
    code = (
        "import resource, sys\nfrom foveate.images import open_picture\nopen_picture(sys.argv[1])\nopen_picture(sys.argv[2])\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\nopen_picture(sys.argv[3])\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)"
    )
    for mode, most in (("LA", 500), ("I;16", 400), ("RGBA", 500)):
        for side, name in ((5, "small.png"), (6000, "large.png")):
            Image.new(mode, (side, side)).save(tmp_path / name)
        places = [str(tmp_path / name) for name in ("small.png", "small.png", "large.png")]
        done = subprocess.run([sys.executable, "-c", code, *places], capture_output=True, text=True, check=True)
        assert int(done.stdout) < most, mode
