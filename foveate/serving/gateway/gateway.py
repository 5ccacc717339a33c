"""The gateway: it takes OpenAI's chat API, encodes and reduces pictures, and asks vLLM."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hmac
import json
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any, TypeVar

from ...chat import media_words
from ...errors import FoveateError, InputError, UnsupportedModelError
from ..encoding import EncodedPrompt, PictureEncoder, method_of
from ..pictures import Loader, no_memory, refused
from ..placing import Places
from .batcher import Batcher, EncodingError
from .limits import Budget, Held, Limits, RequestError, Share
from .media import contents_of, measured_media
from .memory import Memory, RememberedPicture
from .messages import Rendering
from .metrics import Metrics
from .requests import ChatRequest, RequestReader
from .upstream import Events, UnavailableError, Upstream, check_url, failure

log = logging.getLogger("foveate.serving")
T = TypeVar("T")
BROKEN_OFF = ("abort", "error")  # what vLLM says of an answer that it did not complete
THREADS = 4  # that read bodies and open pictures
CHECKED = 256  # settings of methods that are known to fit the model
IDLE = 2.0  # seconds; vLLM closes connections after 5, and a request on one that it is closing would be lost


@dataclass(frozen=True)
class GatewaySettings:
    """How a gateway serves.

    Attributes
    ----------
    name : of the model, for clients.
    method, budget, config : for requests that ask for none (``methods.saved.named``).
    vllm_url, vllm_key : where vLLM is.
    api_key : that clients must give; None = none, and anybody may ask.
    hosts : from which pictures may be loaded.
    batch : pictures that an encoder takes at once.
    memory : bytes of encoded pictures that are remembered.
    """

    name: str
    vllm_url: str
    method: str = "prumerge+"
    budget: float | None = None
    config: str = ""
    vllm_key: str | None = None
    api_key: str | None = None
    hosts: Collection[str] = ()
    batch: int = 16
    memory: int = 256 * 2**20
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True)
class Prepared:
    """A request as vLLM gets it.

    Attributes
    ----------
    body : for vLLM.
    usage : what clients are told of its pictures.
    tokens : of its prompt, where pictures were encoded for it and it has no tools.
    counts : whether a stream ends with the numbers of tokens.
    """

    body: dict[str, Any]
    usage: dict[str, Any]
    tokens: int | None
    counts: bool


class Gateway:
    """What the endpoints share.

    Parameters
    ----------
    settings : how it serves.
    encoders : of the model's pictures.

    Raises
    ------
    InputError : there is no such method, it needs a budget, pictures are not one span, the engine's address is none, or
        a key is empty.
    UnsupportedModelError : the model lacks what the method needs.
    """

    def __init__(self, settings: GatewaySettings, encoders: Sequence[PictureEncoder]) -> None:
        self.settings, self.limits, self.metrics = settings, settings.limits, Metrics()
        check_url(settings.vllm_url)
        check_key(settings.api_key, "--api-key (FOVEATE_API_KEY)")
        check_key(settings.vllm_key, "--vllm-key (FOVEATE_VLLM_KEY)")
        self.encoder = encoders[0]
        self.encoder.check(method_of(settings.method, settings.budget, settings.config))
        self.handover, processor = self.encoder.handover, self.encoder.loaded.processor
        self.handover.check_processor(processor)
        reserved = tuple(dict.fromkeys((*self.handover.words, *media_words(processor))))
        self.reader = RequestReader(settings.name, settings.method, settings.budget, settings.config, self.limits, reserved)
        self.videos = self.handover.takes_videos(processor)
        self.rendering = Rendering(processor, reserved, ("image", "video") if self.videos else ("image",))
        self.held, self.opened = Held(self.limits.held), Budget(self.limits.decoded)
        self.threads = ThreadPoolExecutor(THREADS, thread_name_prefix="pictures")
        self.batcher = Batcher(encoders, self.opened, self.threads, settings.batch, self.metrics.observe_batch, self.limits)
        self.memory = Memory(settings.memory, self.encoder.encodes_apart)
        self.metrics.queue.set_function(lambda: self.batcher.waiting)
        self.metrics.held.set_function(lambda: self.held.bytes)
        self.metrics.opened.set_function(lambda: self.opened.taken)
        self.running = 0
        self.created = int(time.time())
        self.check = functools.lru_cache(CHECKED, typed=True)(self._check)  # 1 is a count, 1.0 a share
        self._asking: asyncio.Task[bool] | None = None

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        """Encoders and connections, as long as the gateway serves."""
        import httpx

        timeout = httpx.Timeout(None, connect=5.0)  # whole requests have a limit of their own
        bounds = httpx.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=IDLE)
        options: dict[str, Any] = {"timeout": timeout, "limits": bounds}
        # the engine gets the key and all embeddings: no proxy that some variable names may see them
        async with (
            httpx.AsyncClient(trust_env=False, cookies=no_cookies(), **options) as engine,
            httpx.AsyncClient(cookies=no_cookies(), **options) as self.hosts,
            self.batcher,
        ):
            self.upstream = Upstream(self.settings.vllm_url, self.settings.vllm_key, engine, self.handover)
            if self.handover.probe() is not None:
                await self._greet()
            yield
        self.threads.shutdown(wait=False, cancel_futures=True)

    async def _greet(self) -> None:
        """Say in the log what is wrong with an engine that is there; one that is not may come later."""
        try:
            await self.upstream.model()
        except UnavailableError:
            pass
        except RequestError as error:
            log.error("%s", error)

    async def alive(self) -> bool:
        """Whether the engine answers; it is asked once at a time, however many want to know."""
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self.upstream.alive())
        found = await asyncio.shield(self._asking)
        self.metrics.engine.set(found)
        return found

    def authorised(self, header: str | None) -> bool:
        """Whether a client may ask."""
        key = self.settings.api_key
        return key is None or hmac.compare_digest((header or "").encode(), f"Bearer {key}".encode())

    def check_free(self) -> None:
        """Raise ``RequestError`` where there are too many requests for one more."""
        if self.running >= self.limits.waiting:
            raise RequestError(f"{self.running} requests are being worked on already. Try again later.", 429, "rate_limit_error")

    @contextlib.contextmanager
    def counted(self) -> Any:
        """Within this a request counts.

        Raises
        ------
        RequestError : there are too many.
        """
        self.check_free()
        self.running += 1
        self.metrics.running.set(self.running)
        try:
            yield
        finally:
            self.running -= 1
            self.metrics.running.set(self.running)

    async def prepare(self, body: bytearray, share: Share) -> Prepared:
        """Read a request, encode its pictures, and write it for vLLM.

        Parameters
        ----------
        body : of the request, which is emptied.
        share : of the bytes that requests hold.

        Raises
        ------
        RequestError : it cannot be answered.
        """
        asked = await self._in_thread(functools.partial(self._read, body))  # bodies are large
        body.clear()
        self.check(asked.name, asked.budget, asked.config)
        pictures, tokens = await self._pictures(asked, share) if asked.media else ([], None)
        body_of = {**asked.options, "messages": asked.filled([each.part for each in pictures]), "stream": asked.stream}
        if asked.stream:
            body_of["stream_options"] = {"include_usage": True}
        before, after = [each.before for each in pictures], [each.after for each in pictures]
        if pictures:
            self.metrics.observe_reduction(asked.name, before, after)
        usage: dict[str, Any] = {
            "method": asked.name,
            "budget": asked.budget,
            "visual_tokens": sum(after),
            "visual_tokens_before": sum(before),
            "pictures": [each.usage() for each in pictures if each.frames is None],
        }
        if any(each.frames is not None for each in pictures):
            usage["videos"] = [each.usage() for each in pictures if each.frames is not None]
        return Prepared(body_of, usage, None if "tools" in asked.options else tokens, asked.usage)

    def _read(self, body: bytearray) -> ChatRequest:
        asked = self.reader.read(body)
        kinds = [medium.kind for medium in asked.media]
        if "video" in kinds and not self.videos:
            raise RequestError(
                f"{self.settings.name} is served without videos: send frames as pictures, or serve Qwen2-VL or Qwen2.5-VL.",
                param="messages",
            )
        self.rendering.check(asked.messages, kinds, asked.options.get("tools"))
        return asked

    async def _pictures(self, asked: ChatRequest, share: Share) -> tuple[list[RememberedPicture], int | None]:
        """The pictures of a request, encoded or remembered; and the tokens of its prompt, where it was made for that."""
        await self.upstream.model()  # raises where the engine is not there: no picture is encoded for nothing
        loader = Loader(self.settings.hosts, self.limits, self.hosts, share.add)
        data = await contents_of(asked.media, asked.frames, loader, self._in_thread)
        keys = await self._in_thread(functools.partial(self.memory.keys, [each.identity for each in data], asked.method))
        pictures = self.memory.get(keys)
        if pictures is not None:
            self.metrics.remembered.inc(len(pictures))
            share.add(sum(each.bytes for each in pictures))
            return pictures, None
        processor = self.encoder.loaded.processor
        conversation = asked.filled(await self._in_thread(functools.partial(measured_media, data, processor, self.limits)))
        kept = [{"role": message["role"], "content": message["content"]} for message in conversation]
        found = await self.batcher.encode(kept, asked.method)
        parts = await self._in_thread(functools.partial(self._parts, found))
        frames: Sequence[list[int] | None] = found.frames or [None] * len(parts)
        pictures = [RememberedPicture(*each) for each in zip(parts, found.before, found.after, frames, strict=True)]
        if keys:
            self.memory.add(keys, pictures)
        share.add(sum(each.bytes for each in pictures))
        return pictures, len(found.ids)

    def _parts(self, found: EncodedPrompt) -> list[dict[str, Any]]:
        places: Sequence[Places | None] = found.places or [None] * len(found.embeds)
        return [self.handover.part(*each) for each in zip(found.embeds, places, strict=True)]

    def _check(self, name: str, budget: float | None, config: str) -> None:
        try:
            self.encoder.check(method_of(name, budget, config))
        except (InputError, UnsupportedModelError) as error:
            raise RequestError(str(error), param="foveate") from error

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self.threads, work)

    def finished(self, answer: dict[str, Any], prepared: Prepared) -> dict[str, Any]:
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

    async def pieces(self, stream: Events, prepared: Prepared, began: float) -> AsyncGenerator[str]:
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
                if not prepared.counts:
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
    if no_memory(error):
        log.error("there is no memory for a request", exc_info=error)
        return refused(error)
    if isinstance(error, TimeoutError | asyncio.TimeoutError):
        return RequestError("the answer took too long", 504, "timeout")
    if isinstance(error, EncodingError):
        log.error("%s", error, exc_info=error.__cause__)
        return RequestError(str(error), 500, "server_error")
    if isinstance(error, FoveateError):
        return RequestError(str(error))
    log.error("a request failed", exc_info=error)
    return RequestError("the gateway failed; its log says why", 500, "server_error")


def check_key(key: str | None, what: str) -> None:
    """Refuse a key that no header can carry; an empty one would let everybody in.

    Raises
    ------
    InputError : it is empty, or has spaces or other characters than those of ASCII.
    """
    if key is not None and (not key or not all("!" <= each <= "~" for each in key)):
        what_is = "is empty" if not key.strip() else "has spaces or characters that are not ASCII"
        raise InputError(f"the key of {what} {what_is}. Give one of printable ASCII characters, or leave it out altogether.")


def no_cookies() -> CookieJar:
    """A jar that takes none: what one host sets would go to others with the requests of other clients."""
    return CookieJar(DefaultCookiePolicy(allowed_domains=[]))


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
