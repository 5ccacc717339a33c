"""What requests may ask for, how they are refused, and budgets of bytes that all of them share."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

from ...errors import SHOWN, FoveateError, cut

LONGEST = 1000  # characters of a message, which may be that of a library or of the engine


@dataclass(frozen=True)
class Limits:
    """What one request may ask for, how many there may be, and what all of them may hold.

    Attributes
    ----------
    body_bytes, body_seconds : of the body of a request, and until all of it has come; the same of all its pictures that are loaded
        from hosts.
    pictures : of one request, videos included.
    pixels : of one picture, or of a frame.
    frames : of one video, that are taken.
    video_pixels : of all of these together.
    film : frames that a video may have, also those that are not taken.
    decoding : seconds until a video is read.
    waiting : requests that are being worked on or wait; one more is turned away.
    seconds : until an answer is complete, and has been taken.
    answers : ``n`` of one request.
    messages : of one request, parts of messages included.
    characters : of its texts, which are read beside the pictures of others.
    values : of the JSON of a body: commas and opening brackets, those in texts included.
    depth : of the JSON of a body.
    held : bytes of bodies, loaded pictures and embeddings of all requests; one more is turned away.
    decoded : bytes of the pictures that are decoded at a time, for all requests.
    """

    body_bytes: int = 32 * 2**20
    body_seconds: float = 30.0
    pictures: int = 8
    pixels: int = 25_000_000
    frames: int = 32
    video_pixels: int = 100_000_000
    film: int = 200_000
    decoding: float = 20.0
    waiting: int = 256
    seconds: float = 300.0
    answers: int = 8
    messages: int = 4096
    characters: int = 2**19
    values: int = 500_000
    depth: int = 64
    held: int = 2**31
    decoded: int = 2**30


class RequestError(FoveateError):
    """A request gets no answer: ``status`` of HTTP, ``kind`` and ``param`` as OpenAI's API names them."""

    def __init__(self, message: str, status: int = 400, kind: str = "invalid_request_error", param: str | None = None) -> None:
        super().__init__(cut(message, LONGEST))
        self.status, self.kind = status, kind
        self.param = None if param is None else cut(param, SHOWN)

    def body(self) -> dict[str, Any]:
        """As OpenAI's API writes an error."""
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.status}}


class BusyError(RequestError):
    """There is no memory for a request now."""

    def __init__(self, message: str) -> None:
        super().__init__(message, 503, "service_unavailable")


class Held:
    """Counts the bytes that requests hold.

    Parameters
    ----------
    size : from which on no more are taken.
    """

    def __init__(self, size: int) -> None:
        self.size, self.bytes = size, 0

    @contextlib.contextmanager
    def share(self) -> Iterator[Share]:
        """What one request holds; it is let go at the end."""
        share = Share(self)
        try:
            yield share
        finally:
            self.bytes -= share.bytes


class Share:
    """What one request holds of a ``Held``."""

    def __init__(self, held: Held) -> None:
        self.held, self.bytes = held, 0

    def add(self, number: int) -> None:
        """Hold more bytes.

        Raises
        ------
        BusyError : all requests together would hold too much.
        """
        if self.held.bytes + number > self.held.size:
            raise BusyError(f"requests hold {self.held.bytes} bytes already, of at most {self.held.size}. Try again later.")
        self.held.bytes += number
        self.bytes += number


class Budget:
    """Bytes of which everybody takes a part and gives it back; who comes first gets it first.

    Parameters
    ----------
    size : of all parts together; who needs more gets all of it, when nobody else has any.
    """

    def __init__(self, size: int) -> None:
        self.size, self.taken = size, 0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @contextlib.asynccontextmanager
    async def part(self, number: int) -> AsyncIterator[None]:
        """A part of so many bytes, as soon as there is one."""
        number = min(number, self.size)
        if self._waiting or self.taken + number > self.size:
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append((number, turn))
            try:
                await turn
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled():
                    self._give(number)  # it came in the same moment
                else:
                    self._waiting = deque(each for each in self._waiting if each[1] is not turn)
                    self._give(0)  # who is next may need less
                raise
        else:
            self.taken += number
        try:
            yield
        finally:
            self._give(number)

    def _give(self, number: int) -> None:
        self.taken -= number
        while self._waiting and self.taken + self._waiting[0][0] <= self.size:
            waits, turn = self._waiting.popleft()
            if not turn.done():
                self.taken += waits
                turn.set_result(None)
