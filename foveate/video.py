"""Opening videos as people have them: frames spread over the whole clip, upright, with their times."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from .errors import InputError, MissingExtraError, first_line
from .images import as_rgb, check_regular, check_size, named, reading

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.packet import Packet
    from av.video import VideoFrame, VideoStream

SUFFIXES = frozenset(".3gp .avi .flv .m2ts .m4v .mkv .mov .mp4 .mpeg .mpg .mts .ogv .ts .webm .wmv".split())
ANIMATED = ("GIF", "WEBP", "PNG")  # formats of moving pictures, which Pillow reads with their transparency
FRAME = 50_000_000  # pixels of a frame, which is more than 8K has: several are in memory at once
UNTIMED = 100  # milliseconds that a frame of an animation stays where the file does not say, as browsers show it

# by the signs of a, b, c, d in the matrix (x, y) -> (a x + c y, b x + d y) that shows a frame upright
TURNS = {
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
}


@dataclass(frozen=True)
class Video:
    """Frames of a video, in order.

    Attributes
    ----------
    frames : RGB, upright.
    seconds : of each frame, counted from the first one of the file.
    fps : frames per second of the file on average; 0 for a single picture.
    duration : of the file, in seconds.
    notes : what its user should know about it.
    """

    frames: tuple[Image.Image, ...]
    seconds: tuple[float, ...]
    fps: float
    duration: float
    notes: tuple[str, ...]


def open_video(path: str | Path, frames: int = 8) -> Video:
    """Open frames of a video, evenly spread from its first to its last one as for Video-LLaVA (https://arxiv.org/abs/2311.10122).

    Takes any file that FFmpeg reads (extra ``video``), and moving GIF, WebP and PNG. Frames are counted, not timed: where they come
    at a variable rate, more are taken where there are more. They are turned as the file says.

    Parameters
    ----------
    path : the file.
    frames : how many; a shorter video gives all it has, and a note.

    Raises
    ------
    InputError : there is no such file, it holds no moving picture, is damaged, or its frames are smaller than 4 pixels.
    MissingExtraError : PyAV is not installed.
    """
    path = Path(path)
    if isinstance(frames, bool) or not isinstance(frames, int) or frames < 1:
        raise InputError(f"frames={frames!r} is no number of frames. Use a whole number from 1 on.")
    with reading(path, "video"):
        check_regular(path, "video")
        opened = _moving_picture(path)
        if opened is not None:
            with opened:
                return _animation(path, opened, frames)
    return _film(path, frames)


def spread(total: int, count: int) -> list[int]:
    """Numbers of ``count`` of ``total`` frames, evenly from the first to the last; all where there are no more.

    >>> spread(10, 4)
    [0, 3, 6, 9]
    """
    return list(range(total)) if total <= count else [int(place) for place in np.linspace(0, total - 1, count)]


def _video(
    path: Path, images: list[Image.Image], times: list[float], count: int, duration: float, total: int, *notes: str
) -> Video:
    """What was read from ``total`` frames, ``count`` of which were asked for."""
    check_size(path, images[0])
    images = [image if image.size == images[0].size else image.resize(images[0].size) for image in images]
    if total < count:
        holds = "only one frame" if total == 1 else f"only {total} frames"
        notes = (f"{path.name} holds {holds}, not {count}; all are used", *notes)
    return Video(tuple(images), tuple(times), total / duration if duration > 0 else 0.0, duration, notes)


def _moving_picture(path: Path) -> Image.Image | None:
    try:
        return Image.open(path, formats=ANIMATED)
    except UnidentifiedImageError:
        return None


def _check_frame(path: Path, width: int, height: int) -> None:
    if width * height > FRAME:
        raise InputError(f"a frame of {named(path)} is {width} x {height} pixels; at most {FRAME} are read. Scale it down first.")


def _animation(path: Path, opened: Image.Image, count: int) -> Video:
    total = getattr(opened, "n_frames", 1)
    _check_frame(path, *opened.size)
    wanted, images, starts, now = set(spread(total, count)), [], [], 0.0
    for number in range(total):
        opened.seek(number)
        opened.load()  # of a WebP, durations are known then
        if number in wanted:
            images.append(as_rgb(opened))
            starts.append(now)
        now += (opened.info.get("duration") or UNTIMED) / 1000
    return _video(path, images, starts, count, now if total > 1 else 0.0, total)


# -- films, by FFmpeg


class _Packet(NamedTuple):
    """What a packet says of its frame; ``hidden`` ones are cut off by an edit of the file."""

    pts: int | None
    dts: int | None
    duration: int
    size: int
    key: bool
    hidden: bool

    @classmethod
    def of(cls, packet: Packet) -> _Packet:
        return cls(packet.pts, packet.dts, packet.duration or 0, packet.size, packet.is_keyframe, packet.is_discard)


class _Shot(NamedTuple):
    """A frame that was decoded."""

    image: Image.Image
    damaged: bool


@dataclass(frozen=True)
class _Track:
    """The frames of a film as its packets announce them.

    Attributes
    ----------
    times : presentation times in units of ``unit`` seconds, ascending; empty where the file does not hold them.
    keys : time of each frame that can be decoded by itself, and where to seek for it.
    unit : seconds.
    end : when the last frame ends.
    rate : frames per second that the file promises, 0 if it does not.
    whole : how many frames there were before the file was cut off; 0 = it was not.
    """

    times: list[int]
    keys: list[tuple[int, int]]
    unit: Fraction
    end: int
    rate: float
    whole: int


def _film(path: Path, count: int) -> Video:
    with _refusing(path):
        track = _scan(path)
        wanted = [track.times[number] for number in spread(len(track.times), count)]
        shots = _sought(path, track, wanted)
        if shots is None:
            shots, times, duration, total = _counted(path, track, count)
        else:
            times = [float((time - track.times[0]) * track.unit) for time in wanted]
            duration, total = float((track.end - track.times[0]) * track.unit), len(track.times)
    notes = [f"the frame at {time:.2f} s is damaged" for time, shot in zip(times, shots, strict=True) if shot.damaged]
    if track.whole:
        notes.insert(0, f"{path.name} ends early: {total} of {track.whole} frames can be read")
    return _video(path, [shot.image for shot in shots], times, count, duration, total, *notes)


@contextmanager
def _refusing(path: Path) -> Iterator[None]:
    """Errors of FFmpeg as errors of ours."""
    try:
        import av
    except ImportError as error:
        raise MissingExtraError("PyAV", "video") from error
    try:
        yield
    except av.FFmpegError as error:
        reason = error.strerror or first_line(error)
        raise InputError(f"{path} is damaged or no video: {reason}. Convert it to MP4 (H.264), or use another copy.") from error
    except IndexError as error:  # what PyAV may raise at the end where a stream began in the middle
        raise InputError(f"{path} is damaged or changes midway. Convert it to MP4 (H.264), or use another copy.") from error


@contextmanager
def _opened(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The file, at its beginning, and its moving picture."""
    import av
    from av.stream import Disposition

    # "file:", so that a colon in a name is no protocol; titles may be in any encoding
    with av.open(f"file:{path}", metadata_errors="replace") as container:
        films = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
        if not films or container.format.name == "tty":  # text as an old terminal would show it
            sound = " It holds sound." if container.streams.audio else ""
            raise InputError(f"{path} holds no moving picture.{sound} Give a video.")
        stream = films[0]
        if stream.codec_context is None:
            raise InputError(f"{path} needs a decoder that PyAV lacks. Convert it to MP4 (H.264).")
        _check_frame(path, round(stream.codec_context.width * _stretch(stream)), stream.codec_context.height)
        stream.thread_type = "AUTO"
        yield container, stream


def _scan(path: Path) -> _Track:
    """Read all packets without decoding them."""
    with _opened(path) as (container, stream):
        # AVI numbers packets as they come, which is not how frames are shown if some depend on later ones
        timed = not (container.format.name == "avi" and stream.codec_context.has_b_frames)
        # these seek by when frames are shown, others by when they are decoded
        shown = {"mov", "matroska"} & set(container.format.name.split(","))
        everything = [packet for packet in map(_Packet.of, container.demux(stream)) if packet.size]
        rate, unit, promised = float(stream.guessed_rate or 0), stream.time_base or Fraction(0), stream.frames
    packets = [packet for packet in everything if not packet.hidden]
    if not packets:
        raise InputError(f"{path} holds no frame. Use another copy.")
    whole = promised if len(everything) < promised else 0
    known = [(packet.pts, packet) for packet in packets if packet.pts is not None]
    times = sorted({pts for pts, _ in known})
    if not timed or len(times) < len(packets):
        return _Track([], [], unit, 0, rate, whole)
    keys = sorted((pts, pts if shown or packet.dts is None else packet.dts) for pts, packet in known if packet.key)
    last = next(packet for pts, packet in known if pts == times[-1])
    return _Track(times, keys, unit, times[-1] + last.duration, rate, whole)


def _decoded(container: InputContainer, stream: VideoStream, track: _Track) -> Iterator[VideoFrame]:
    """Frames from where the file stands; where it was cut off, up to what is left of its last one."""
    import av

    try:
        yield from container.decode(stream)
    except av.InvalidDataError:
        if not track.whole:
            raise


def _sought(path: Path, track: _Track, wanted: list[int]) -> list[_Shot] | None:
    """The frames with the ``wanted`` times, by seeking; None where the file does not hold what its packets announce."""
    if not wanted or not track.keys:
        return None
    shots: list[_Shot] = []
    now: float = -math.inf
    frames: Iterator[VideoFrame] = iter(())
    with _opened(path) as (container, stream):
        for time in wanted:
            key, place = track.keys[max(0, bisect.bisect_right(track.keys, (time, math.inf)) - 1)]
            if key > now:  # nothing between here and there is needed
                container.seek(place, stream=stream)
                frames, now = _decoded(container, stream, track), -math.inf
            for frame in frames:
                if frame.pts is None:
                    return None
                now = frame.pts
                if now >= time:
                    break
            if now != time:
                return None
            shots.append(_upright(frame, stream))
    return shots


def _counted(path: Path, track: _Track, count: int) -> tuple[list[_Shot], list[float], float, int]:
    """Frames by their number, for files that do not say when a frame is shown, when that is, how long the film is, and how many
    frames it has. Decodes all, twice.
    """
    with _opened(path) as (container, stream):
        times = [frame.pts for frame in _decoded(container, stream, track)]
    if not times:
        raise InputError(f"{path} holds no frame that can be decoded. Use another copy.")
    rate = track.rate or 25.0
    seconds = [number / rate for number in range(len(times))]
    known = [time for time in times if time is not None]
    if len(known) == len(times) and all(a < b for a, b in itertools.pairwise(known)):
        seconds = [float((time - known[0]) * track.unit) for time in known]
    wanted = set(spread(len(times), count))
    with _opened(path) as (container, stream):
        frames = enumerate(_decoded(container, stream, track))
        shots = [_upright(frame, stream) for number, frame in frames if number in wanted]
    return shots, [seconds[number] for number in sorted(wanted)], seconds[-1] + 1 / rate, len(times)


def _stretch(stream: VideoStream) -> Fraction:
    """How many times wider than high the pixels of a film are."""
    pixel = stream.sample_aspect_ratio
    return pixel if pixel and 0.1 < pixel < 10 else Fraction(1)  # others come from damage


def _upright(frame: VideoFrame, stream: VideoStream) -> _Shot:
    """A frame as players show it: with square pixels, turned by right angles and mirrored as the file says."""
    image: Image.Image = frame.to_image()
    stretch = _stretch(stream)
    if stretch != 1:
        image = image.resize((max(1, round(image.width * stretch)), image.height), Image.Resampling.BICUBIC)
    matrix: Any = frame.side_data.get("DISPLAYMATRIX")
    if matrix is not None:
        a, b, _, c, d = (int(sign) for sign in np.sign(np.frombuffer(bytes(matrix), np.int32))[:5])
        turn = TURNS.get((a, b, c, d))
        image = image if turn is None else image.transpose(turn)
    return _Shot(image, frame.is_corrupt)
