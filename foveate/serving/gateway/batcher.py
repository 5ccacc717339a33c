"""Encodes the pictures of several requests at once: what has come while an encoder was busy is its next batch."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from ...errors import FoveateError
from ...methods.base import Method
from ...video import Video
from ..encoding import EncodedPrompt, PictureEncoder, pictures_of, videos_of
from ..pictures import Unopened, decoded
from ..scaling import scaled
from ..videos import UnopenedVideo, decoded_video
from .limits import Budget, Limits


@dataclass(eq=False)
class _Job:
    conversation: list[dict[str, Any]]
    method: Method
    pictures: int
    kinds: frozenset[str]
    bytes: int
    done: asyncio.Future[EncodedPrompt]
    came: float = field(default_factory=time.perf_counter)


class Batcher:
    """Opens the pictures of requests, and hands them to encoders, each in a thread of its own.

    Where a processor only scales them down, that is done as soon as a picture is open, and only pictures that are being opened take
    a part of the budget; else all pictures of a batch do until it is encoded.

    Parameters
    ----------
    encoders : each works on one batch at a time.
    opened : bytes of pictures that are open at a time.
    openers : threads in which pictures are opened.
    pictures : of one batch, at most, each frame of a video counted; a request with more is a batch of its own.
    limits : of reading videos.
    observe : told of each batch: its pictures, the seconds that it took, and those that its requests waited.
    """

    def __init__(
        self,
        encoders: Sequence[PictureEncoder],
        opened: Budget,
        openers: Executor,
        pictures: int = 16,
        observe: Any = None,
        limits: Limits | None = None,
    ) -> None:
        self.encoders, self.pictures, self.observe = list(encoders), pictures, observe
        self.opened, self.openers, self.limits = opened, openers, limits or Limits()
        self.scales = encoders[0].scales_first
        self._waiting: deque[_Job] = deque()
        self._came = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._threads: list[ThreadPoolExecutor] = []

    async def __aenter__(self) -> Batcher:
        self._came = asyncio.Event()
        self._threads = [ThreadPoolExecutor(1, thread_name_prefix=f"encoder-{i}") for i in range(len(self.encoders))]
        self._tasks = [
            asyncio.create_task(self._work(encoder, thread)) for encoder, thread in zip(self.encoders, self._threads, strict=True)
        ]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        for task in self._tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task
        for job in self._waiting:
            job.done.cancel()
        for thread in self._threads:
            thread.shutdown(wait=True, cancel_futures=True)

    async def encode(self, conversation: list[dict[str, Any]], method: Method) -> EncodedPrompt:
        """Encode the unopened pictures and videos of one conversation; the result is the same in whatever batch it is.

        Raises
        ------
        FoveateError : the conversation or its pictures cannot be used.
        """
        pictures, videos = pictures_of(conversation), videos_of(conversation)
        size = sum(medium.bytes for medium in (*pictures, *videos))
        number = len(pictures) + sum(video.frames for video in videos)
        kinds = frozenset(["image"] * bool(pictures) + ["video"] * bool(videos))
        job = _Job(conversation, method, number, kinds, size, asyncio.get_running_loop().create_future())
        self._waiting.append(job)
        self._came.set()
        return await job.done

    @property
    def waiting(self) -> int:
        """Requests that no encoder has begun."""
        return len(self._waiting)

    def _next(self) -> list[_Job]:
        """The jobs that go together with the one that has waited longest; those that nobody waits for any more are left out."""
        batch: list[_Job] = []
        others: deque[_Job] = deque()
        pictures = size = 0
        while self._waiting:
            job = self._waiting.popleft()
            if job.done.done():
                continue
            few = pictures + job.pictures <= self.pictures and (self.scales or size + job.bytes <= self.opened.size)
            if not batch or (job.method is batch[0].method and job.kinds == batch[0].kinds and few):
                batch.append(job)
                pictures += job.pictures
                size += job.bytes
            else:
                others.append(job)
        self._waiting = others
        return batch

    async def _work(self, encoder: PictureEncoder, thread: ThreadPoolExecutor) -> None:
        while True:
            await self._came.wait()
            batch = self._next()
            if not batch:
                self._came.clear()
                continue
            begin = time.perf_counter()
            for job, found in zip(batch, await self._encoded(encoder, thread, batch), strict=True):
                if job.done.done():
                    continue
                if isinstance(found, EncodedPrompt):
                    job.done.set_result(found)
                else:
                    job.done.set_exception(found)
            if self.observe is not None:
                self.observe(sum(job.pictures for job in batch), time.perf_counter() - begin, [begin - job.came for job in batch])

    async def _encoded(self, encoder: PictureEncoder, thread: Executor, batch: list[_Job]) -> list[EncodedPrompt | Exception]:
        """Results of a batch; what cannot be opened disturbs no other."""
        size = sum(job.bytes for job in batch)
        async with contextlib.nullcontext() if self.scales else self.opened.part(size):
            opened = await asyncio.gather(*(self._opened(job.conversation) for job in batch))
            good = [conversation for conversation in opened if not isinstance(conversation, Exception)]
            results = iter(await self._run(encoder, thread, good, batch[0].method)) if good else iter([])
            return [each if isinstance(each, Exception) else next(results) for each in opened]

    async def _opened(self, conversation: list[dict[str, Any]]) -> list[dict[str, Any]] | Exception:
        """A conversation with its pictures opened, or why they cannot be."""
        try:
            contents = [await asyncio.gather(*map(self._part, message["content"])) for message in conversation]
            return [{**message, "content": content} for message, content in zip(conversation, contents, strict=True)]
        except Exception as error:  # of whatever the pictures made of Pillow
            return error if isinstance(error, FoveateError) else EncodingError(error)

    async def _part(self, part: dict[str, Any]) -> dict[str, Any]:
        kind = part["type"]
        if kind not in ("image", "video"):
            return part
        medium = part[kind]
        async with self.opened.part(medium.bytes) if self.scales else contextlib.nullcontext():
            opened = await asyncio.get_running_loop().run_in_executor(self.openers, self._open, medium)
        return {"type": kind, kind: opened}

    def _open(self, medium: Unopened | UnopenedVideo) -> Image.Image | Video:
        if isinstance(medium, UnopenedVideo):
            return decoded_video(medium, self.limits)
        image = decoded(medium)
        return scaled(self.encoders[0].loaded.processor, image) if self.scales else image

    async def _run(
        self, encoder: PictureEncoder, thread: Executor, conversations: list[list[dict[str, Any]]], method: Method
    ) -> list[EncodedPrompt | Exception]:
        """Results of a batch; where it fails, each conversation is tried alone, so that one disturbs no other."""
        try:
            return [*await asyncio.get_running_loop().run_in_executor(thread, encoder.encode, conversations, method)]
        except Exception as error:  # of whatever the pictures made of the processor or the encoder
            if len(conversations) == 1:
                return [error if isinstance(error, FoveateError) else EncodingError(error)]
        return [result for each in conversations for result in await self._run(encoder, thread, [each], method)]


class EncodingError(FoveateError):
    """An encoder failed for a reason that is not the request's."""

    def __init__(self, error: Exception) -> None:
        super().__init__(f"the vision encoder failed: {type(error).__name__}: {error}")
        self.__cause__ = error
