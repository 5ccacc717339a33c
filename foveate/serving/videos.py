"""Videos of requests: read in bounds, from films, animations or lists of frames."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ..errors import InputError, MissingExtraError
from ..films import Bounds
from ..images import check_scaled
from ..video import Video, frame_size, video_in, video_of
from .gateway.limits import Limits, RequestError
from .pictures import PLAIN, Unopened, decoded, measured, refused


@dataclass(frozen=True)
class UnopenedVideo:
    """A video as it came.

    Attributes
    ----------
    data : the contents of a file; None where frames came one by one.
    shots : these frames.
    where : its name in messages.
    bytes : that it takes while it is opened.
    frames : how many are taken of a file.
    fps : frames per second, of frames that came one by one.
    """

    data: bytes | None
    shots: tuple[Unopened, ...]
    where: str
    bytes: int
    frames: int
    fps: float


def measured_video(data: Sequence[bytes], where: str, limits: Limits, scaler: Any, frames: int | None, fps: float) -> UnopenedVideo:
    """A video of which only the head is read.

    Parameters
    ----------
    data : of one file, or of each frame.
    scaler : the processor of videos, which may make frames larger.
    frames : how many are taken of a file; None = these are frames.
    fps : of frames.

    Raises
    ------
    RequestError : it is no video, or too large or small.
    """
    if frames is None:
        shots = tuple(measured(each, f"frame {number} of {where}", limits, None, True) for number, each in enumerate(data, 1))
        room = max(sum(shot.bytes for shot in shots), shots[0].bytes * len(shots))  # all are brought to the size of the first
        _check_pixels(room // PLAIN, where, limits)
        return UnopenedVideo(None, shots, where, room, len(shots), fps)
    (contents,) = data
    with _refusing():
        size = frame_size(contents, where, Bounds(limits.pixels, limits.film, limits.decoding))
        check_scaled(size, f"a frame of {where}", scaler)
    _check_pixels(size[0] * size[1] * frames, where, limits)
    return UnopenedVideo(contents, (), where, size[0] * size[1] * frames * PLAIN, frames, fps)


def _check_pixels(pixels: int, where: str, limits: Limits) -> None:
    if pixels > limits.video_pixels:
        raise RequestError(
            f"the frames of {where} that are taken have {pixels} pixels together; at most {limits.video_pixels} are allowed. "
            'Scale it down, or ask for fewer frames: "foveate": {"frames": 8}.'
        )


def decoded_video(video: UnopenedVideo, limits: Limits) -> Video:
    """A video with its frames.

    Raises
    ------
    RequestError : it is damaged, or takes too long.
    """
    if video.data is None:
        shots = [decoded(shot) for shot in video.shots]
        with _refusing():
            return video_of(shots, video.fps, video.where)
    with _refusing():
        bounds = Bounds(limits.pixels, limits.film, limits.decoding, together=video.bytes // PLAIN)
        found = video_in(video.data, video.where, video.frames, bounds)
        if found.fps <= 0:
            raise InputError(f"{video.where} is a single picture. Send it as one.")
        return found


@contextmanager
def _refusing() -> Iterator[None]:
    """Errors about videos as those of the gateway."""
    try:
        yield
    except MissingExtraError as error:
        what = "this server reads no films: PyAV is not installed (extra 'video'). Animations and lists of frames are taken."
        raise RequestError(what, 501, "server_error") from error
    except (InputError, MemoryError) as error:
        raise refused(error) from error
