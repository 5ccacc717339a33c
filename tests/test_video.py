"""Video files as people have them: which frames are taken, when they are shown, and what cannot be read."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

import foveate
from foveate import films
from foveate.video import open_video

av = pytest.importorskip("av")
RATE, WIDE, HIGH, BARS = 10, 64, 48, 8


def coded(number: int, size: tuple[int, int] = (WIDE, HIGH)) -> np.ndarray:
    """[H, W, 3], the binary digits of a number as black and white bars, which any codec keeps."""
    bars = [255 * (number >> bit & 1) for bit in range(BARS)]
    row = np.repeat(np.array(bars, np.uint8), size[0] // BARS)
    return np.broadcast_to(row[None, :, None], (size[1], size[0], 3)).copy()


def number_of(frame: Image.Image) -> int:
    bars = np.asarray(frame, float).mean((0, 2)).reshape(BARS, -1).mean(1)
    return sum(1 << bit for bit, bright in enumerate(bars) if bright > 127)


def write(path, codec="libx264", count=30, times=None, size=(WIDE, HIGH), image=coded, setup=None, container=None, **options):
    """A film of ``count`` frames; ``times`` in milliseconds where their rate varies."""
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV has no {codec}")
    with av.open(str(path), "w", options=container or {}) as file:
        stream = file.add_stream(codec, rate=options.pop("rate", RATE))
        stream.width, stream.height, stream.pix_fmt = *size, options.pop("pix_fmt", "yuv420p")
        stream.options = {name.replace("_", "-"): str(value) for name, value in options.items() if name != "gop"}
        stream.gop_size = options.get("gop", 12)
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        if setup:
            setup(stream)
        for number in range(count):
            frame = av.VideoFrame.from_ndarray(image(number, size), format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[number], Fraction(1, 1000)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


def even(total: int, count: int) -> list[int]:
    """Slow: frame i of n is the one at i / (n - 1) of the way, rounded down."""
    return [number * (total - 1) // (count - 1) for number in range(count)]


KINDS = [
    ("a.mp4", "libx264", dict(gop=7)),  # frames that depend on later ones
    ("a.mp4", "libx264", dict(gop=7, x264_params="open-gop=1:bframes=3")),
    ("a.mp4", "mpeg4", {}),
    ("a.mov", "libx264", {}),
    ("a.mkv", "libx264", dict(gop=5)),
    ("a.mp4", "libx265", dict(gop=10, x265_params="log-level=none")),
    ("a.webm", "libvpx-vp9", dict(gop=8)),
    ("a.webm", "libvpx", dict(auto_alt_ref=1, lag_in_frames=16)),  # with frames that are never shown
    ("a.ts", "libx264", dict(gop=6)),  # does not begin at 0 seconds
    ("a.flv", "libx264", {}),
    ("a.avi", "mpeg4", {}),
    ("a.avi", "libx264", {}),  # numbers its frames in the order of decoding
    ("a.mpg", "mpeg2video", dict(rate=25)),
    ("a.h264", "libx264", {}),  # no times, no length, no seeking
]


@pytest.mark.parametrize(("name", "codec", "options"), KINDS, ids=[f"{name[2:]}-{codec}" for name, codec, _ in KINDS])
@pytest.mark.parametrize("count", [5, 8, 10])
def test_frames_are_spread_over_the_clip(tmp_path, name, codec, options, count):
    rate = options.get("rate", RATE)
    film = open_video(write(tmp_path / name, codec, **options), count)
    assert [number_of(frame) for frame in film.frames] == even(30, count)
    np.testing.assert_allclose(film.seconds, [number / rate for number in even(30, count)], atol=1e-3)
    np.testing.assert_allclose((film.fps, film.duration), (rate, 30 / rate), rtol=1e-3)
    assert {(frame.mode, frame.size) for frame in film.frames} == {("RGB", (WIDE, HIGH))}
    assert film.notes == ()


@pytest.mark.parametrize("count", [1, 2, 29, 30])
def test_any_number_of_frames(tmp_path, count):
    found = [number_of(frame) for frame in open_video(write(tmp_path / "a.mp4"), count).frames]
    assert found == ([0] if count == 1 else even(30, count))


@pytest.mark.parametrize(
    ("name", "codec", "groups"),  # groups of 10 frames to decode for each that is wanted
    [
        ("a.mp4", "libx264", 1),
        ("a.mkv", "libx264", 1),
        ("a.webm", "libvpx-vp9", 1),
        ("a.ts", "libx264", 2),
        ("a.mpg", "mpeg2video", 3),
    ],
)
def test_a_long_clip_is_not_decoded_in_full(tmp_path, monkeypatch, name, codec, groups):
    path = write(tmp_path / name, codec, count=200, gop=10, rate=25)
    decoded, opened = [], films._opened

    @contextmanager
    def counting(path):
        class Counting:
            def __init__(self, container):
                self.container = container

            def __getattr__(self, name):
                return getattr(self.container, name)

            def decode(self, stream):
                for frame in self.container.decode(stream):
                    decoded.append(frame.pts)
                    yield frame

        with opened(path) as (container, stream):
            yield Counting(container), stream

    monkeypatch.setattr(films, "_opened", counting)
    found = [number_of(frame) for frame in open_video(path, 4).frames]
    assert found == even(200, 4)
    assert 4 <= len(decoded) <= 4 * 10 * groups


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_variable_rates(tmp_path, name):
    """Frames are counted; their times are the file's."""
    times = [0, 40, 80, 1200, 1240, 1300, 4000, 4040, 4500, 4600]
    film = open_video(write(tmp_path / name, count=10, times=times), 4)
    assert [number_of(frame) for frame in film.frames] == [0, 3, 6, 9]
    np.testing.assert_allclose(film.seconds, [0, 1.2, 4.0, 4.6], atol=1e-3)
    assert 4.6 <= film.duration <= 4.75  # some writers say how long the last frame stays, some do not
    np.testing.assert_allclose(film.fps, 10 / film.duration)


def corners(_number, size):
    """A picture without any symmetry."""
    image = np.zeros((size[1], size[0], 3), np.uint8)
    image[: size[1] // 2, : size[0] // 2] = (220, 30, 30)
    image[: size[1] // 2, size[0] // 2 :] = (30, 220, 30)
    image[size[1] // 2 :, : size[0] // 2] = (30, 30, 220)
    return image


def shown_by(matrix, image):
    """Slow: each pixel goes where ISO/IEC 14496-12 sends it, (x, y) -> (a x + c y, b x + d y), moved into view."""
    (a, b), (c, d) = matrix
    where = {(x, y): (a * x + c * y, b * x + d * y) for y in range(image.shape[0]) for x in range(image.shape[1])}
    left, top = (min(place[axis] for place in where.values()) for axis in (0, 1))
    right, bottom = (max(place[axis] for place in where.values()) for axis in (0, 1))
    out = np.zeros((bottom - top + 1, right - left + 1, 3), image.dtype)
    for (x, y), (to_x, to_y) in where.items():
        out[to_y - top, to_x - left] = image[y, x]
    return out


@pytest.mark.parametrize(
    "matrix",
    [((a, 0), (0, d)) for a in (1, -1) for d in (1, -1)] + [((0, b), (c, 0)) for b in (1, -1) for c in (1, -1)],
    ids=str,
)
def test_turned_and_mirrored(tmp_path, matrix):
    path = write(tmp_path / "a.mp4", count=2, image=corners)
    data = bytearray(path.read_bytes())
    place = data.index(b"tkhd") + 44  # behind the type, version, times, number, length, layer, group and volume
    (a, b), (c, d) = matrix
    fixed = [a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30]
    data[place : place + 36] = b"".join(value.to_bytes(4, "big", signed=True) for value in fixed)
    path.write_bytes(data)
    for frame in open_video(path, 2).frames:
        expected = shown_by(matrix, corners(0, (WIDE, HIGH)))
        assert frame.size == expected.shape[1::-1]
        assert np.abs(np.asarray(frame, float) - expected).mean() < 12


def test_pixels_that_are_not_square(tmp_path):
    def wide(stream):
        stream.codec_context.sample_aspect_ratio = Fraction(3, 2)

    film = open_video(write(tmp_path / "a.mp4", count=3, setup=wide), 3)
    assert [frame.size for frame in film.frames] == [(96, HIGH)] * 3
    assert [number_of(frame) for frame in film.frames] == [0, 1, 2]


def test_a_size_that_changes_midway(tmp_path):
    small = write(tmp_path / "small.h264", count=5, size=(32, 24))
    both = write(tmp_path / "a.h264", count=5).read_bytes() + small.read_bytes()
    (tmp_path / "both.h264").write_bytes(both)
    film = open_video(tmp_path / "both.h264", 4)
    assert [number_of(frame) for frame in film.frames] == [0, 3, 1, 4]
    assert {frame.size for frame in film.frames} == {(WIDE, HIGH)}


@pytest.mark.parametrize(("total", "said"), [(1, "only one frame, not 8"), (3, "only 3 frames, not 8")])
def test_short_clips(tmp_path, total, said):
    film = open_video(write(tmp_path / "a.mp4", count=total))
    assert [number_of(frame) for frame in film.frames] == list(range(total))
    assert film.notes == (f"a.mp4 holds {said}; all are used",)
    np.testing.assert_allclose((film.duration, film.fps), (total / RATE, RATE))


def test_a_recording_that_begins_between_key_frames(tmp_path):
    """The frames before the first key frame are lost; the others are spread as ever."""
    data = write(tmp_path / "a.ts", gop=6).read_bytes()
    (tmp_path / "late.ts").write_bytes(data[188 * 5 :])
    with av.open(str(tmp_path / "late.ts")) as file:
        there = [number_of(frame.to_image()) for frame in file.decode(video=0)]
    assert there == list(range(there[0], 30))
    assert there[0] > 0
    film = open_video(tmp_path / "late.ts", 4)
    assert [number_of(frame) for frame in film.frames] == [there[place] for place in even(len(there), 4)]
    assert film.seconds[0] == 0


def noise(number, size):
    return np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), np.uint8)


def test_a_download_that_broke_off(tmp_path):
    """Where the index is in front, what is there is used, and said; where it is lost, nothing can be."""
    whole = write(tmp_path / "a.mp4", count=40, gop=5, image=noise, container={"movflags": "faststart"}).read_bytes()
    (tmp_path / "half.mp4").write_bytes(whole[: len(whole) // 2])
    film = open_video(tmp_path / "half.mp4", 4)
    there = int(film.notes[0].split()[3])
    assert film.notes == (f"half.mp4 ends early: {there} of 40 frames can be read",)
    assert 15 < there < 25
    np.testing.assert_allclose(film.seconds, [number / RATE for number in even(there, 4)], atol=1e-6)
    whole = write(tmp_path / "b.mp4").read_bytes()
    (tmp_path / "no-index.mp4").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(foveate.InputError, match="damaged or no video"):
        open_video(tmp_path / "no-index.mp4")


def test_damaged_frames_are_named(tmp_path):
    """What was lost on the way of a broadcast is concealed by the decoder; which frames these are is said."""
    whole, seen = write(tmp_path / "a.ts", count=40, gop=5, image=noise).read_bytes(), 0
    for tenth in range(1, 10):
        place = len(whole) * tenth // 10
        (tmp_path / "lost.ts").write_bytes(whole[:place] + bytes(3000) + whole[place + 3000 :])
        with av.open(str(tmp_path / "lost.ts")) as file:
            hurt = [frame.is_corrupt for frame in file.decode(video=0)]
        film = open_video(tmp_path / "lost.ts", len(hurt))
        damaged = [time for time, bad in zip(film.seconds, hurt, strict=True) if bad]
        assert film.notes == tuple(f"the frame at {time:.2f} s is damaged" for time in damaged)
        seen += len(damaged)
    assert seen > 0


def test_names_and_titles_of_any_kind(tmp_path, monkeypatch):
    """A colon is no protocol, a percent sign no pattern, and titles need not be UTF-8."""
    data = write(tmp_path / "a.mkv", count=4, setup=lambda stream: stream.metadata.update(title="Wei?e N?chte")).read_bytes()
    path = tmp_path / "clip: 100%03d 'x'.mkv"
    path.write_bytes(data.replace(b"Wei?e N?chte", "Weiße Nächte".encode("latin-1")))
    assert b"Wei\xdfe" in path.read_bytes()
    monkeypatch.chdir(tmp_path)
    assert [number_of(frame) for frame in open_video(path.name, 4).frames] == [0, 1, 2, 3]


def no_video(folder):
    """Files without a moving picture, and what is said of each."""
    import wave

    with wave.open(str(folder / "sound.wav"), "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(8000)
        sound.writeframes(b"\0\0" * 800)
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(5000))
    (folder / "text.mp4").write_text("no video\n" * 100)
    (folder / "screen.ans").write_text("no video\n" * 100)  # which FFmpeg would draw
    data = write(folder / "a.mp4", count=3).read_bytes()
    (folder / "unknown.mp4").write_bytes(data.replace(b"avc1", b"zzz9"))
    write(folder / "tiny.mkv", "ffv1", count=2, size=(2, 2), pix_fmt="yuv444p", image=noise)
    return {
        "none.mp4": "there is no file",
        "": "is a folder; give one video",
        "empty.mp4": "damaged or no video",
        "noise.mp4": "damaged or no video",
        "text.mp4": "damaged or no video",
        "screen.ans": "no moving picture",
        "sound.wav": "no moving picture. It holds sound",
        "unknown.mp4": "a decoder that PyAV lacks",
        "tiny.mkv": "2 x 2 pixels; at least 4 x 4",
    }


def test_files_that_are_no_video(tmp_path):
    for name, message in no_video(tmp_path).items():
        with pytest.raises(foveate.InputError) as raised:
            open_video(tmp_path / name)
        assert message in str(raised.value), name


def test_streams_that_begin_in_the_middle(tmp_path, monkeypatch):
    """What PyAV may raise then depends on what its memory holds, so it is raised here."""

    def fail(path):
        raise IndexError("list index out of range")

    monkeypatch.setattr(films, "_scan", fail)
    with pytest.raises(foveate.InputError, match="changes midway"):
        open_video(write(tmp_path / "a.mp4", count=2))


def test_the_cover_of_a_song_is_no_video(tmp_path):
    path = tmp_path / "song.mp3"
    if "libmp3lame" not in av.codecs_available:
        pytest.skip("this PyAV has no libmp3lame")
    with av.open(str(path), "w") as file:
        sound, cover = file.add_stream("libmp3lame", rate=8000), file.add_stream("png", rate=1)
        cover.width, cover.height, cover.pix_fmt, cover.disposition = 32, 32, "rgb24", 0x400  # an attached picture
        file.start_encoding()
        file.mux([*cover.encode(av.VideoFrame.from_ndarray(noise(0, (32, 32)))), *cover.encode()])
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), format="s16", layout="mono")
        silence.rate = 8000
        file.mux([*sound.encode(silence), *sound.encode()])
    with av.open(str(path)) as file:
        assert file.streams.video  # FFmpeg gives covers as videos
    with pytest.raises(foveate.InputError, match="It holds sound"):
        open_video(path)


@pytest.mark.parametrize("frames", [0, -3, True, 2.5, "8"])
def test_numbers_of_frames_that_are_none(frames):
    with pytest.raises(foveate.InputError, match="is no number of frames"):
        open_video("a.mp4", frames)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts", "a.flv", "a.avi", "a.gif"])
def test_any_damage_is_named_or_harmless(tmp_path, name, capfd):
    """Bytes changed and cut at random: frames come back, or our own error, and nothing is written over the terminal."""
    if name.endswith("gif"):
        images = [Image.fromarray(coded(number)) for number in range(8)]
        images[0].save(tmp_path / name, save_all=True, append_images=images[1:])
        data = (tmp_path / name).read_bytes()
    else:
        data = write(tmp_path / name, gop=5).read_bytes()
    random, broken, refused = np.random.default_rng(0), tmp_path / f"broken.{name[2:]}", 0
    for trial in range(40):
        changed = bytearray(data)
        for place in random.integers(0, len(data), 30 if trial % 2 else 3):
            changed[place] = random.integers(256)
        broken.write_bytes(bytes(changed[: random.integers(len(data) // 2, len(data) + 1)]))
        try:
            film = open_video(broken, 4)
            assert 1 <= len(film.frames) == len(film.seconds) <= 4
        except foveate.InputError:
            refused += 1
    assert refused > 0
    assert capfd.readouterr().err == ""


def test_without_pyav(tmp_path, monkeypatch):
    """Films need the extra; moving pictures do not."""
    film = write(tmp_path / "a.mp4", count=3)
    images = [Image.fromarray(coded(number)) for number in range(3)]
    images[0].save(tmp_path / "a.gif", save_all=True, append_images=images[1:])
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(foveate.MissingExtraError, match=r"PyAV is not installed.*foveate\[video\]"):
        open_video(film)
    assert [number_of(frame) for frame in open_video(tmp_path / "a.gif", 3).frames] == [0, 1, 2]


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png"])
def test_moving_pictures(tmp_path, name):
    images, stays = [Image.fromarray(coded(number)) for number in range(10)], [100, 200, 300, 400, 500] * 2
    options = {"lossless": True} if name.endswith("webp") else {}
    images[0].save(tmp_path / name, save_all=True, append_images=images[1:], duration=stays, **options)
    film = open_video(tmp_path / name, 4)
    assert [number_of(frame) for frame in film.frames] == [0, 3, 6, 9]
    np.testing.assert_allclose(film.seconds, [0, 0.6, 1.6, 2.5])
    np.testing.assert_allclose((film.duration, film.fps), (3.0, 10 / 3))


def test_moving_pictures_with_clear_pixels(tmp_path):
    """On white, and where the file gives no times, a tenth of a second for each."""
    clear = [Image.new("RGBA", (16, 16), (0, 0, 255, 255 * number)) for number in range(2)]
    clear[0].save(tmp_path / "a.png", save_all=True, append_images=clear[1:])
    film = open_video(tmp_path / "a.png", 2)
    assert [frame.getpixel((3, 3)) for frame in film.frames] == [(255, 255, 255), (0, 0, 255)]
    assert film.seconds == (0.0, 0.1)
    Image.new("RGB", (16, 16)).save(tmp_path / "still.png")
    still = open_video(tmp_path / "still.png")
    assert (len(still.frames), still.fps, still.duration) == (1, 0.0, 0.0)
