"""Reading films by FFmpeg: which frames there are, and those that are wanted."""

from __future__ import annotations

import bisect
import io
import itertools
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image

from .errors import InputError, MissingExtraError, first_line
from .images import named

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.packet import Packet
    from av.video import VideoFrame, VideoStream

FRAME = 50_000_000  # pixels of a frame, which is more than 8K has: several are in memory at once
# what is read of strangers: some of FFmpeg's other formats open further files or addresses
CONTAINERS = "mov matroska webm avi mpegts mpeg flv asf ogg".split()
CODECS = frozenset(
    "h264 hevc av1 libdav1d vp8 libvpx vp9 libvpx-vp9 mpeg4 mpeg1video mpeg2video mjpeg theora wmv1 wmv2 wmv3 vc1 flv h263".split()
)

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
class Bounds:
    """What reading one video may take.

    Attributes
    ----------
    pixels : of a frame.
    frames : of the whole video, also those that are not taken.
    seconds : counted from when this is made.
    together : pixels of the frames that are taken.
    """

    pixels: int = field(default_factory=lambda: FRAME)
    frames: float = math.inf
    seconds: float = math.inf
    began: float = field(default_factory=time.monotonic)
    together: float = math.inf

    def check(self, path: Path, frames: int = 0) -> None:
        """Raise ``InputError`` where the time is over, or a video has more frames."""
        if time.monotonic() - self.began > self.seconds:
            raise InputError(f"{named(path)} takes longer than {self.seconds:g} s to read. Make it shorter or smaller.")
        if frames > self.frames:
            raise InputError(f"{named(path)} has more than {self.frames} frames. Make it shorter.")

    def check_frame(self, path: Path, width: int, height: int) -> None:
        """Raise ``InputError`` where a frame is larger."""
        if width * height > self.pixels:
            raise InputError(
                f"a frame of {named(path)} is {width} x {height} pixels; at most {self.pixels} are read. Scale it down first."
            )

    def alike(self, path: Path, image: Image.Image, earlier: Sequence[Image.Image], count: int) -> Image.Image:
        """One of ``count`` frames that are taken, in the size of the first: others never lie in memory together as they came.

        Raises
        ------
        InputError : it is the first, and so many of its size are too many pixels.
        """
        if earlier:
            return image if image.size == earlier[0].size else image.resize(earlier[0].size)
        if image.width * image.height * count > self.together:
            raise InputError(f"{named(path)} has larger frames than its head says. Convert it to MP4 (H.264), or use another copy.")
        return image


@dataclass(frozen=True)
class Source:
    """A video: the file at ``path``, or ``data`` of a stranger, of which ``path`` is the name in messages."""

    path: Path
    data: bytes | None = None
    bounds: Bounds = field(default_factory=Bounds)


def spread(total: int, count: int) -> list[int]:
    """Numbers of ``count`` of ``total`` frames, evenly from the first to the last; all where there are no more.

    >>> spread(10, 4)
    [0, 3, 6, 9]
    """
    return list(range(total)) if total <= count else [int(place) for place in np.linspace(0, total - 1, count)]


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


def film(source: Source, count: int) -> tuple[list[Image.Image], list[float], float, int, list[str]]:
    """Frames of a film, the seconds of each, how long the film is, how many frames it has, and what its user should know.

    Raises
    ------
    InputError : it is damaged, or takes more than its bounds.
    MissingExtraError : PyAV is not installed.
    """
    path = source.path
    with refusing(path):
        track = _scan(source)
        wanted = [track.times[number] for number in spread(len(track.times), count)]
        shots = _sought(source, track, wanted)
        if shots is None:
            shots, times, duration, total = _counted(source, track, count)
        else:
            times = [float((time - track.times[0]) * track.unit) for time in wanted]
            duration, total = float((track.end - track.times[0]) * track.unit), len(track.times)
    notes = [f"the frame at {time:.2f} s is damaged" for time, shot in zip(times, shots, strict=True) if shot.damaged]
    if track.whole:
        notes.insert(0, f"{path.name} ends early: {total} of {track.whole} frames can be read")
    return [shot.image for shot in shots], times, duration, total, notes


def shape(source: Source) -> tuple[int, int]:
    """Width and height of the frames of a film, of which only the head is read.

    Raises
    ------
    InputError, MissingExtraError : as for ``film``.
    """
    with refusing(source.path), _opened(source) as (_, stream):
        return round(stream.codec_context.width * _stretch(stream)), stream.codec_context.height


@contextmanager
def refusing(path: Path) -> Iterator[None]:
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
def _opened(source: Source) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The file, at its beginning, and its moving picture."""
    import av
    from av.stream import Disposition

    path = source.path
    # "file:", so that a colon in a name is no protocol; titles may be in any encoding
    place: Any = f"file:{path}" if source.data is None else io.BytesIO(source.data)
    options = {} if source.data is None else {"format_whitelist": ",".join(CONTAINERS), "protocol_whitelist": "none"}
    with av.open(place, metadata_errors="replace", options=options) as container:
        films = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
        if not films or container.format.name == "tty":  # text as an old terminal would show it
            sound = " It holds sound." if container.streams.audio else ""
            raise InputError(f"{path} holds no moving picture.{sound} Give a video.")
        stream = films[0]
        if stream.codec_context is None:
            raise InputError(f"{path} needs a decoder that PyAV lacks. Convert it to MP4 (H.264).")
        if source.data is not None and stream.codec_context.name not in CODECS:
            raise InputError(f"{path} is coded as {stream.codec_context.name}, which is not read here. Convert it to MP4 (H.264).")
        source.bounds.check_frame(path, round(stream.codec_context.width * _stretch(stream)), stream.codec_context.height)
        stream.thread_type = "AUTO"
        yield container, stream


def _scan(source: Source) -> _Track:
    """Read all packets without decoding them."""
    path = source.path
    everything: list[_Packet] = []
    with _opened(source) as (container, stream):
        # AVI numbers packets as they come, which is not how frames are shown if some depend on later ones
        timed = not (container.format.name == "avi" and stream.codec_context.has_b_frames)
        # these seek by when frames are shown, others by when they are decoded
        shown = {"mov", "matroska"} & set(container.format.name.split(","))
        for packet in map(_Packet.of, container.demux(stream)):
            source.bounds.check(path, len(everything))
            if packet.size:
                everything.append(packet)
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


def _decoded(source: Source, container: InputContainer, stream: VideoStream, track: _Track) -> Iterator[VideoFrame]:
    """Frames from where the file stands; where it was cut off, up to what is left of its last one."""
    import av

    try:
        for frame in container.decode(stream):
            source.bounds.check(source.path)
            source.bounds.check_frame(source.path, frame.width, frame.height)  # it may be larger than the file said
            yield frame
    except av.InvalidDataError:
        if not track.whole:
            raise


def _sought(source: Source, track: _Track, wanted: list[int]) -> list[_Shot] | None:
    """The frames with the ``wanted`` times, by seeking; None where the file does not hold what its packets announce."""
    if not wanted or not track.keys:
        return None
    shots: list[_Shot] = []
    now: float = -math.inf
    frames: Iterator[VideoFrame] = iter(())
    with _opened(source) as (container, stream):
        for time in wanted:
            key, place = track.keys[max(0, bisect.bisect_right(track.keys, (time, math.inf)) - 1)]
            if key > now:  # nothing between here and there is needed
                container.seek(place, stream=stream)
                frames, now = _decoded(source, container, stream, track), -math.inf
            for frame in frames:
                if frame.pts is None:
                    return None
                now = frame.pts
                if now >= time:
                    break
            if now != time:
                return None
            shots.append(_shot(source, frame, stream, shots, len(wanted)))
    return shots


def _counted(source: Source, track: _Track, count: int) -> tuple[list[_Shot], list[float], float, int]:
    """Frames by their number, for files that do not say when a frame is shown, when that is, how long the film is, and how many
    frames it has. Decodes all, twice.
    """
    with _opened(source) as (container, stream):
        times = [frame.pts for frame in _decoded(source, container, stream, track)]
    if not times:
        raise InputError(f"{source.path} holds no frame that can be decoded. Use another copy.")
    rate = track.rate or 25.0
    seconds = [number / rate for number in range(len(times))]
    known = [time for time in times if time is not None]
    if len(known) == len(times) and all(a < b for a, b in itertools.pairwise(known)):
        seconds = [float((time - known[0]) * track.unit) for time in known]
    wanted = set(spread(len(times), count))
    shots: list[_Shot] = []
    with _opened(source) as (container, stream):
        for number, frame in enumerate(_decoded(source, container, stream, track)):
            if number in wanted:
                shots.append(_shot(source, frame, stream, shots, len(wanted)))
    return shots, [seconds[number] for number in sorted(wanted)], seconds[-1] + 1 / rate, len(times)


def _stretch(stream: VideoStream) -> Fraction:
    """How many times wider than high the pixels of a film are."""
    pixel = stream.sample_aspect_ratio
    return pixel if pixel and 0.1 < pixel < 10 else Fraction(1)  # others come from damage


def _shot(source: Source, frame: VideoFrame, stream: VideoStream, earlier: list[_Shot], count: int) -> _Shot:
    """One of ``count`` frames that are taken, after ``earlier`` ones."""
    before = [shot.image for shot in earlier[:1]]
    return _Shot(source.bounds.alike(source.path, _upright(frame, stream), before, count), frame.is_corrupt)


def _upright(frame: VideoFrame, stream: VideoStream) -> Image.Image:
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
    return image
