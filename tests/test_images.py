"""Pictures as people have them."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

import foveate
from foveate.images import open_picture

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
