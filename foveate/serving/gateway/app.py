"""The endpoints of the gateway."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.requests import ClientDisconnect

from ..encoding import PictureEncoder
from .gateway import ClientGoneError, Gateway, GatewaySettings, as_request_error, unless_gone
from .limits import RequestError, Share
from .upstream import Events

log = logging.getLogger("foveate.serving")
RETRY = {"Retry-After": "5"}
GRACE = 1.0  # seconds beyond an answer's time in which a client can still take what is said of that


def create_app(settings: GatewaySettings, encoders: Sequence[PictureEncoder], engine: Any = None) -> FastAPI:
    """The gateway as an application of FastAPI.

    Parameters
    ----------
    settings : how it serves.
    encoders : each works in a thread of its own; with weights of its own.
    engine : an async context manager that runs as long as the application does, such as a vLLM that was started for it.

    Raises
    ------
    UnsupportedModelError : the method of the settings does not work on the model.
    """
    gateway = Gateway(settings, encoders)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with engine or contextlib.nullcontext(), gateway.serving():
            yield

    app = FastAPI(title="foveate", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    app.state.gateway = gateway
    limits = settings.limits
    app.add_middleware(OneLength)
    app.add_middleware(Deadline, seconds=limits.body_seconds + limits.seconds + 2 * GRACE)

    @app.get("/health")
    async def health() -> Response:
        alive = await gateway.alive()
        told = {"status": "ok" if alive else "the engine is not there", "model": settings.name}
        return JSONResponse(told, 200 if alive else 503)

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        if not gateway.authorised(request.headers.get("authorization")):
            return _refusal(gateway, _unauthorised())  # they tell what others ask
        await gateway.alive()
        return Response(generate_latest(gateway.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        if not gateway.authorised(request.headers.get("authorization")):
            return _refusal(gateway, _unauthorised())
        told = {"method": settings.method, "budget": settings.budget}
        card = {"id": settings.name, "object": "model", "created": gateway.created, "owned_by": "foveate", "foveate": told}
        return JSONResponse({"object": "list", "data": [card]})

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        began = time.perf_counter()
        try:
            if not gateway.authorised(request.headers.get("authorization")):
                raise _unauthorised()
            return await _answer(gateway, request, began)
        except ClientGoneError:
            gateway.metrics.requests.labels("499").inc()
            return Response(status_code=499)
        except Exception as error:  # every request is answered, and disturbs no other
            return _refusal(gateway, as_request_error(error))

    return app


async def _answer(gateway: Gateway, request: Request, began: float) -> Response:
    """The answer to one request.

    Raises
    ------
    RequestError : there is none.
    ClientGoneError : nobody waits for it any more.
    """
    gateway.check_free()  # before a body is taken that would be for nothing
    counted = contextlib.ExitStack()
    with counted:
        share = counted.enter_context(gateway.held.share())
        body = await read_body(request, gateway, share)
        counted.enter_context(gateway.counted())

        async def work() -> Any:
            prepared = await gateway.prepare(body, share)
            if prepared.body["stream"]:
                return prepared, await gateway.upstream.stream(prepared.body)
            return prepared, gateway.finished(await gateway.upstream.answer(prepared.body), prepared)

        prepared, answer = await asyncio.wait_for(unless_gone(work(), request.receive), gateway.limits.seconds)
        headers = {"X-Foveate-Visual-Tokens": str(prepared.usage["visual_tokens"])}
        if not prepared.body["stream"]:
            gateway.metrics.whole.observe(time.perf_counter() - began)
            gateway.metrics.requests.labels("200").inc()
            return JSONResponse(answer, headers=headers)
        stays = counted.pop_all()  # until the stream ends

    until = began + gateway.limits.seconds + GRACE
    return _Stream(gateway.pieces(answer, prepared, began), headers, answer, stays, until)


class _Stream(StreamingResponse):
    """An answer, piece by piece; what it holds is let go also where the client leaves before the first piece, or takes none.

    Parameters
    ----------
    events : of the engine, which is left at the end.
    held : what is let go at the end.
    until : the time by which the client must have taken all of it.
    """

    media_type = "text/event-stream"

    def __init__(
        self, pieces: AsyncGenerator[str], headers: dict[str, str], events: Events, held: contextlib.ExitStack, until: float
    ) -> None:
        super().__init__(pieces, headers={**headers, "Cache-Control": "no-cache"})
        self.pieces, self.events, self.held, self.until = pieces, events, held, until

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        left = max(self.until - time.perf_counter(), GRACE)
        try:
            with self.held:
                await asyncio.wait_for(super().__call__(scope, receive, send), left)
        except (TimeoutError, asyncio.TimeoutError):
            log.warning("a client did not take its answer in time; its connection is closed")
        finally:
            await asyncio.shield(self._left())

    async def _left(self) -> None:
        await self.pieces.aclose()
        await self.events.aclose()


class Deadline:
    """Ends what takes longer than any answer may, such as an answer that nobody reads.

    Parameters
    ----------
    app : an application of ASGI.
    seconds : that it has for each request.
    """

    def __init__(self, app: Any, seconds: float) -> None:
        self.app, self.seconds = app, seconds

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            await asyncio.wait_for(self.app(scope, receive, send), self.seconds)
        except (TimeoutError, asyncio.TimeoutError):
            log.warning("a client did not take what it was sent in time; its connection is closed")


class OneLength:
    """Refuses requests that tell their length in two ways: a proxy in front may take the other one, and mix up answers.

    Parameters
    ----------
    app : an application of ASGI.
    """

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and {b"content-length", b"transfer-encoding"} <= {name for name, _ in scope["headers"]}:
            error = RequestError("the request has both Content-Length and Transfer-Encoding. Send one of them.")
            await JSONResponse(error.body(), error.status, {"Connection": "close"})(scope, receive, send)
        else:
            await self.app(scope, receive, send)


async def read_body(request: Request, gateway: Gateway, share: Share) -> bytearray:
    """The body of a request.

    Raises
    ------
    RequestError : it is too large, takes too long to come, or there is no memory for it now.
    ClientGoneError : the rest of it will not come.
    """
    limits, told = gateway.limits, request.headers.get("content-length", "0")
    too_large = RequestError(f"the body is larger than {limits.body_bytes} bytes. Scale the pictures down.", 413)
    if told.isdecimal() and int(told) > limits.body_bytes:
        raise too_large
    body = bytearray()

    async def read() -> None:
        async for chunk in request.stream():
            if len(body) + len(chunk) > limits.body_bytes:
                raise too_large
            share.add(len(chunk))
            body.extend(chunk)

    try:
        await asyncio.wait_for(read(), limits.body_seconds)
    except (TimeoutError, asyncio.TimeoutError) as error:
        raise RequestError(f"the body did not come within {limits.body_seconds:g} s", 408, "timeout") from error
    except ClientDisconnect as error:
        raise ClientGoneError from error
    return body


def _unauthorised() -> RequestError:
    return RequestError("the API key is missing or wrong: send it as 'Authorization: Bearer KEY'", 401, "authentication_error")


def _refusal(gateway: Gateway, error: RequestError) -> Response:
    gateway.metrics.requests.labels(str(error.status)).inc()
    headers = RETRY if error.status in (429, 503) else None
    return Response(json.dumps(error.body()), error.status, headers, "application/json")
