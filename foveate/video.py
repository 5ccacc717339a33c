"""Opening videos as people have them: frames spread over the whole clip, upright, with their times."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from .errors import InputError
from .films import Bounds, Source, film, shape, spread
from .heads import opening
from .images import as_rgb, check_regular, check_size, reading

SUFFIXES = frozenset(".3gp .avi .flv .m2ts .m4v .mkv .mov .mp4 .mpeg .mpg .mts .ogv .ts .webm .wmv".split())
ANIMATED = ("GIF", "WEBP", "PNG")  # formats of moving pictures, which Pillow reads with their transparency
UNTIMED = 100  # milliseconds that a frame of an animation stays where the file does not say, as browsers show it


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
    return _read(Source(path), frames)


def video_in(data: bytes, name: str, frames: int, bounds: Bounds) -> Video:
    """The video that some bytes hold, as ``open_video`` opens files, in the usual formats; ``name`` is for messages.

    Raises
    ------
    InputError : as for ``open_video``, or it takes more than ``bounds``.
    MissingExtraError : PyAV is not installed.
    """
    return _read(Source(Path(name), data, bounds), frames)


def frame_size(data: bytes, name: str, bounds: Bounds) -> tuple[int, int]:
    """Width and height of the frames of a video, of which only the head is read.

    Raises
    ------
    InputError : as for ``video_in``.
    MissingExtraError : PyAV is not installed.
    """
    source = Source(Path(name), data, bounds)
    with reading(source.path, "video"), _moving_picture(source) as opened:
        if opened is not None:
            bounds.check_frame(source.path, *opened.size)
            return opened.size
    return shape(source)


def video_of(frames: Sequence[Image.Image], fps: float, name: str) -> Video:
    """A video of frames that come one by one, ``fps`` a second; others than the first are brought to its size."""
    times, path, shots = [number / fps for number in range(len(frames))], Path(name), list[Image.Image]()
    for frame in frames:
        shots.append(Bounds().alike(path, frame, shots, len(frames)))
    return _video(path, shots, times, len(frames), len(frames) / fps, len(frames))


def _read(source: Source, frames: int) -> Video:
    with reading(source.path, "video"), _moving_picture(source) as opened:
        if opened is not None:
            return _animation(source, opened, frames)
    images, times, duration, total, notes = film(source, frames)
    return _video(source.path, images, times, frames, duration, total, *notes)


def _video(
    path: Path, images: list[Image.Image], times: list[float], count: int, duration: float, total: int, *notes: str
) -> Video:
    """What was read from ``total`` frames, ``count`` of which were asked for."""
    check_size(path, images[0])
    if total < count:
        holds = "only one frame" if total == 1 else f"only {total} frames"
        notes = (f"{path.name} holds {holds}, not {count}; all are used", *notes)
    return Video(tuple(images), tuple(times), total / duration if duration > 0 else 0.0, duration, notes)


@contextmanager
def _moving_picture(source: Source) -> Iterator[Image.Image | None]:
    """What Pillow reads, None where it is something else."""
    with ExitStack() as stack:
        opened = None
        with suppress(UnidentifiedImageError):
            opened = stack.enter_context(opening(source.path if source.data is None else source.data, ANIMATED))
        yield opened


def _animation(source: Source, opened: Image.Image, count: int) -> Video:
    path, bounds = source.path, source.bounds
    bounds.check_frame(path, *opened.size)
    total = _total(source, opened)
    images: list[Image.Image] = []
    wanted, starts, now = set(spread(total, count)), [], 0.0
    for number in range(total):
        bounds.check(path, total)
        opened.seek(number)
        bounds.check_frame(path, *opened.size)  # frames of a GIF may be larger than its head said
        opened.load()  # of a WebP, durations are known then
        if number in wanted:
            images.append(bounds.alike(path, as_rgb(opened), images, len(wanted)))
            starts.append(now)
        now += (opened.info.get("duration") or UNTIMED) / 1000
    return _video(path, images, starts, count, now if total > 1 else 0.0, total)


def _total(source: Source, opened: Image.Image) -> int:
    """Frames of an animation; those of a stranger's GIF are counted one by one, which may take long."""
    if opened.format != "GIF" or source.data is None:
        return int(getattr(opened, "n_frames", 1))
    number = 0
    while True:
        source.bounds.check(source.path, number)
        try:
            opened.seek(number)
        except EOFError:
            return number
        source.bounds.check_frame(source.path, *opened.size)
        number += 1
