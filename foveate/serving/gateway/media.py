"""Gets the pictures and videos of a request, and measures them before they are opened."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..pictures import Loader, Unopened, from_data_url, is_data_url, measured
from ..videos import UnopenedVideo, measured_video
from .limits import Limits
from .messages import Medium

InThread = Callable[[Callable[[], Any]], Awaitable[Any]]


@dataclass(frozen=True)
class Contents:
    """What came of a picture or video.

    Attributes
    ----------
    medium : what was asked for.
    where : its name in messages.
    data : its contents; of a video that comes frame by frame, those of each.
    frames : that are taken of a video that is a file.
    """

    medium: Medium
    where: str
    data: tuple[bytes, ...]
    frames: int

    @property
    def identity(self) -> bytes | tuple[Any, ...]:
        """All that decides what is seen: the contents, and how a video is read."""
        if self.medium.kind == "image":
            return self.data[0]
        return ("file", self.frames, *self.data) if self.medium.fps is None else ("frames", self.medium.fps, *self.data)


async def contents_of(media: Sequence[Medium], frames: int, loader: Loader, in_thread: InThread) -> list[Contents]:
    """The contents of the pictures and videos of a request.

    Parameters
    ----------
    frames : that are taken of a video.
    loader : of what is not in the request itself.
    in_thread : runs what takes long.

    Raises
    ------
    RequestError : one cannot be loaded, or is damaged.
    """

    async def one(url: str, where: str, kinds: tuple[str, ...]) -> bytes:
        if is_data_url(url):
            found: bytes = await in_thread(lambda: from_data_url(url, where, kinds))
            return found
        return await loader.load(url, where)

    async def whole(medium: Medium, where: str) -> Contents:
        if medium.kind == "image" or medium.fps is not None:
            kinds: tuple[str, ...] = ("image",)
        else:
            kinds = ("video", "image")  # animations are both
        several = len(medium.urls) > 1
        names = [f"frame {number} of {where}" if several else where for number in range(1, len(medium.urls) + 1)]
        data = await asyncio.gather(*(one(url, name, kinds) for url, name in zip(medium.urls, names, strict=True)))
        return Contents(medium, where, tuple(data), frames)

    counts, named = {"image": 0, "video": 0}, []
    for medium in media:
        counts[medium.kind] += 1
        named.append(f"{'picture' if medium.kind == 'image' else 'video'} {counts[medium.kind]}")
    return [*await asyncio.gather(*map(whole, media, named))]


def measured_media(found: Sequence[Contents], processor: Any, limits: Limits) -> list[dict[str, Any]]:
    """Parts of messages with what was sent, of which only heads are read.

    Raises
    ------
    RequestError : something is no picture or video, or too large or small.
    """
    scalers = (getattr(processor, "image_processor", None), getattr(processor, "video_processor", None))
    several, parts = len(found) > 1, []
    for each in found:
        medium: Unopened | UnopenedVideo
        if each.medium.kind == "image":
            medium = measured(each.data[0], each.where, limits, scalers[0], several)
        else:
            frames, fps = (each.frames, 0.0) if each.medium.fps is None else (None, each.medium.fps)
            medium = measured_video(each.data, each.where, limits, scalers[1], frames, fps)
        parts.append({"type": each.medium.kind, each.medium.kind: medium})
    return parts
