"""Encodes the pictures of several requests at once: what has come while an encoder was busy is its next batch."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from ...errors import FoveateError
from ...methods.base import Method
from ..encoding import EncodedPrompt, PictureEncoder, pictures_of


@dataclass(eq=False)
class _Job:
    conversation: list[dict[str, Any]]
    method: Method
    pictures: int
    done: asyncio.Future[EncodedPrompt]
    came: float = field(default_factory=time.perf_counter)


class Batcher:
    """Hands the pictures of requests to encoders, each in a thread of its own.

    Parameters
    ----------
    encoders : each works on one batch at a time.
    pictures : of one batch, at most; a request with more is a batch of its own.
    observe : told of each batch: its pictures, the seconds that it took, and those that its requests waited.
    """

    def __init__(self, encoders: Sequence[PictureEncoder], pictures: int = 16, observe: Any = None) -> None:
        self.encoders, self.pictures, self.observe = list(encoders), pictures, observe
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
        """Encode the pictures of one conversation; the result is the same in whatever batch it is.

        Raises
        ------
        FoveateError : the conversation or its pictures cannot be used.
        """
        job = _Job(conversation, method, len(pictures_of(conversation)), asyncio.get_running_loop().create_future())
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
        pictures = 0
        while self._waiting:
            job = self._waiting.popleft()
            if job.done.done():
                continue
            fits = not batch or (job.method is batch[0].method and pictures + job.pictures <= self.pictures)
            if fits:
                batch.append(job)
                pictures += job.pictures
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
            for job, found in zip(batch, await self._run(encoder, thread, batch), strict=True):
                if job.done.done():
                    continue
                if isinstance(found, EncodedPrompt):
                    job.done.set_result(found)
                else:
                    job.done.set_exception(found)
            if self.observe is not None:
                self.observe(sum(job.pictures for job in batch), time.perf_counter() - begin, [begin - job.came for job in batch])

    async def _run(self, encoder: PictureEncoder, thread: ThreadPoolExecutor, batch: list[_Job]) -> list[EncodedPrompt | Exception]:
        """Results of a batch; where it fails, each job is tried alone, so that one disturbs no other."""
        try:
            conversations = [job.conversation for job in batch]
            return [*await asyncio.get_running_loop().run_in_executor(thread, encoder.encode, conversations, batch[0].method)]
        except Exception as error:  # of whatever the pictures made of the processor or the encoder
            if len(batch) == 1:
                return [error if isinstance(error, FoveateError) else EncodingError(error)]
        return [result for job in batch for result in await self._run(encoder, thread, [job])]


class EncodingError(FoveateError):
    """An encoder failed for a reason that is not the request's."""

    def __init__(self, error: Exception) -> None:
        super().__init__(f"the vision encoder failed: {type(error).__name__}: {error}")
