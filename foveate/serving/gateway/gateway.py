"""The gateway: it takes OpenAI's chat API, encodes and reduces pictures, and asks vLLM."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hmac
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ...chat import media_words
from ...errors import FoveateError, InputError, UnsupportedModelError
from ...methods.base import Method
from ..encoding import PictureEncoder, method_of
from ..pictures import decoded, fetched
from ..template import PLACEHOLDER, around
from .batcher import Batcher, EncodingError
from .memory import Memory, RememberedPicture
from .metrics import Metrics
from .requests import ChatRequest, Limits, RequestError, RequestReader
from .upstream import Events, UnavailableError, Upstream, check_url, embeds_part, failure

log = logging.getLogger("foveate.serving")
T = TypeVar("T")
BROKEN_OFF = ("abort", "error")  # what vLLM says of an answer that it did not complete
DECODERS = 4  # threads that open pictures
IDLE = 2.0  # seconds; vLLM closes connections after 5, and a request on one that it is closing would be lost


@dataclass(frozen=True)
class GatewaySettings:
    """How a gateway serves.

    Attributes
    ----------
    name : of the model, for clients.
    method, budget : for requests that ask for none.
    vllm_url, vllm_key : where vLLM is.
    api_key : that clients must give; None = none.
    hosts : from which pictures may be loaded.
    batch : pictures that an encoder takes at once.
    memory : bytes of encoded pictures that are remembered.
    """

    name: str
    vllm_url: str
    method: str = "prumerge+"
    budget: float | None = None
    vllm_key: str | None = None
    api_key: str | None = None
    hosts: Collection[str] = ()
    batch: int = 16
    memory: int = 256 * 2**20
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True)
class _Prepared:
    """A request as vLLM gets it; ``tokens`` of its prompt are known where pictures were encoded for it, and it has no tools."""

    body: dict[str, Any]
    usage: dict[str, Any]
    tokens: int | None


class Gateway:
    """What the endpoints share.

    Parameters
    ----------
    settings : how it serves.
    encoders : of the model's pictures.

    Raises
    ------
    InputError : there is no such method, it needs a budget, pictures are not one span, or the engine's address is none.
    UnsupportedModelError : the model lacks what the method needs.
    """

    def __init__(self, settings: GatewaySettings, encoders: Sequence[PictureEncoder]) -> None:
        self.settings, self.limits, self.metrics = settings, settings.limits, Metrics()
        check_url(settings.vllm_url)
        self.encoder = encoders[0]
        self.encoder.check(method_of(settings.method, settings.budget))
        around(self.encoder.loaded.processor)
        reserved = (PLACEHOLDER, *media_words(self.encoder.loaded.processor))
        self.reader = RequestReader(settings.name, settings.method, settings.budget, self.limits, reserved)
        self.batcher = Batcher(encoders, settings.batch, self.metrics.observe_batch)
        self.memory = Memory(settings.memory)
        self.metrics.queue.set_function(lambda: self.batcher.waiting)
        self.running = 0
        self.created = int(time.time())
        self.threads = ThreadPoolExecutor(DECODERS, thread_name_prefix="pictures")
        self._checked: dict[int, Method] = {}

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        """Encoders and connections, as long as the gateway serves."""
        import httpx

        timeout = httpx.Timeout(None, connect=5.0)  # whole requests have a limit of their own
        bounds = httpx.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=IDLE)
        async with httpx.AsyncClient(timeout=timeout, limits=bounds) as client, self.batcher:
            self.client = client
            self.upstream = Upstream(self.settings.vllm_url, self.settings.vllm_key, client)
            yield
        self.threads.shutdown(wait=False, cancel_futures=True)

    def authorised(self, header: str | None) -> bool:
        """Whether a client may ask."""
        key = self.settings.api_key
        return key is None or hmac.compare_digest((header or "").encode(), f"Bearer {key}".encode())

    @contextlib.contextmanager
    def counted(self) -> Any:
        """Within this a request counts.

        Raises
        ------
        RequestError : there are too many.
        """
        if self.running >= self.limits.waiting:
            raise RequestError(f"{self.running} requests are being worked on already. Try again later.", 429, "rate_limit_error")
        self.running += 1
        self.metrics.running.set(self.running)
        try:
            yield
        finally:
            self.running -= 1
            self.metrics.running.set(self.running)

    async def prepare(self, body: bytes) -> tuple[ChatRequest, _Prepared]:
        """Read a request, encode its pictures, and write it for vLLM.

        Raises
        ------
        RequestError : it cannot be answered.
        """
        asked = await self._in_thread(functools.partial(self.reader.read, body))  # bodies are large
        self._check(asked.method)
        pictures, tokens = await self._pictures(asked) if asked.urls else ([], None)
        body_of = {**asked.options, "messages": asked.filled([each.part for each in pictures]), "stream": asked.stream}
        if asked.stream:
            body_of["stream_options"] = {"include_usage": True}
        before, after = [each.before for each in pictures], [each.after for each in pictures]
        if pictures:
            self.metrics.observe_reduction(asked.name, before, after)
        usage = {
            "method": asked.name,
            "budget": asked.budget,
            "visual_tokens": sum(after),
            "visual_tokens_before": sum(before),
            "pictures": [{"visual_tokens": kept, "visual_tokens_before": all_} for kept, all_ in zip(after, before, strict=True)],
        }
        return asked, _Prepared(body_of, usage, None if "tools" in asked.options else tokens)

    async def _pictures(self, asked: ChatRequest) -> tuple[list[RememberedPicture], int | None]:
        """The pictures of a request, encoded or remembered; and the tokens of its prompt, where it was made for that."""
        await self.upstream.model()  # raises where the engine is not there: no picture is encoded for nothing
        places = [(url, f"picture {number + 1}") for number, url in enumerate(asked.urls)]
        data = await asyncio.gather(*(fetched(url, where, self.settings.hosts, self.limits, self.client) for url, where in places))
        keys = await self._in_thread(functools.partial(self.memory.keys, data, asked.method))
        remembered = self.memory.get(keys)
        if remembered is not None:
            self.metrics.remembered.inc(len(remembered))
            return remembered, None
        opened = (functools.partial(decoded, each, where, self.limits) for each, (_, where) in zip(data, places, strict=True))
        images = await asyncio.gather(*map(self._in_thread, opened))
        conversation = asked.filled([{"type": "image", "image": image} for image in images])
        kept = [{"role": message["role"], "content": message["content"]} for message in conversation]
        found = await self.batcher.encode(kept, asked.method)
        parts = await self._in_thread(lambda: [embeds_part(embeds) for embeds in found.embeds])
        pictures = [RememberedPicture(*each) for each in zip(parts, found.before, found.after, strict=True)]
        if keys:
            self.memory.add(keys, pictures)
        return pictures, len(found.ids)

    def _check(self, method: Method) -> None:
        if id(method) not in self._checked:
            try:
                self.encoder.check(method)
            except (InputError, UnsupportedModelError) as error:
                raise RequestError(str(error), param="foveate") from error
            self._checked[id(method)] = method  # which keeps it, and its id

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self.threads, work)

    def finished(self, answer: dict[str, Any], prepared: _Prepared) -> dict[str, Any]:
        """An answer of vLLM, or a piece of one, as a client gets it.

        Raises
        ------
        UnavailableError : it was broken off.
        """
        if any(choice.get("finish_reason") in BROKEN_OFF for choice in answer.get("choices") or ()):
            raise UnavailableError("the engine broke the answer off. Send the request again.")
        answer["model"] = self.settings.name
        usage = answer.get("usage")
        if usage:
            counted = usage.get("prompt_tokens", 0)
            self.metrics.prompt.inc(counted)
            self.metrics.written.inc(usage.get("completion_tokens") or 0)
            if prepared.tokens not in (None, counted):
                self.metrics.mismatches.inc()
                log.warning(
                    "the engine counts %s tokens in a prompt that has %s here: does it serve the export of this model?",
                    counted,
                    prepared.tokens,
                )
            usage["foveate"] = prepared.usage
        return answer

    async def pieces(self, stream: Events, wanted: bool, prepared: _Prepared, began: float) -> AsyncIterator[str]:
        """An answer as server-sent events; one that fails on the way says so and ends without [DONE]."""
        status, first = "200", True
        try:
            while True:
                left = began + self.limits.seconds - time.perf_counter()
                try:
                    piece = await asyncio.wait_for(anext(stream), max(left, 0.001))
                except StopAsyncIteration:
                    break
                if "error" in piece:
                    raise failure(piece)
                if first:
                    self.metrics.first.observe(time.perf_counter() - began)
                    first = False
                piece = self.finished(piece, prepared)
                if not wanted:
                    if not piece.get("choices"):
                        continue  # only tokens are counted in it
                    piece.pop("usage", None)
                yield f"data: {json.dumps(piece)}\n\n"
            yield "data: [DONE]\n\n"
            self.metrics.whole.observe(time.perf_counter() - began)
        except Exception as error:
            told = as_request_error(error)
            status = str(told.status)
            yield f"data: {json.dumps(told.body())}\n\n"
        except BaseException:
            status = "499"  # the client went away
            raise
        finally:
            self.metrics.requests.labels(status).inc()


def as_request_error(error: BaseException) -> RequestError:
    """What a client is told of an error."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, TimeoutError | asyncio.TimeoutError):
        return RequestError("the answer took too long", 504, "timeout")
    if isinstance(error, EncodingError):
        log.error("%s", error, exc_info=error.__cause__)
        return RequestError(str(error), 500, "server_error")
    if isinstance(error, FoveateError):
        return RequestError(str(error))
    log.error("a request failed", exc_info=error)
    return RequestError("the gateway failed; its log says why", 500, "server_error")


async def unless_gone(work: Awaitable[T], receive: Callable[[], Awaitable[Any]]) -> T:
    """The result of some work, which is dropped when the client goes away.

    Raises
    ------
    ClientGoneError : it did.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGoneError
    finally:
        for each in (task, gone):
            each.cancel()


async def _gone(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class ClientGoneError(Exception):
    """Nobody waits for the answer any more."""
