"""Talks to vLLM: chat completions with embeddings in the prompt, whole or word by word."""

from __future__ import annotations

import asyncio
import json
import shlex
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlsplit

from ...errors import InputError
from ..handover import Handover
from .limits import BusyError, RequestError

TOLD = 500  # characters of what the engine says of an error


class UnavailableError(BusyError):
    """The engine cannot be reached, or went away; the request can be sent again."""


def check_url(url: str) -> None:
    """Refuse what is no address of a server.

    Raises
    ------
    InputError : it is none.
    """
    try:
        found = urlsplit(url)
        fits = found.scheme in ("http", "https") and bool(found.hostname) and found.port != 0
    except ValueError:
        fits = False
    if not fits:
        raise InputError(f"{url!r} is no address of a vLLM. Give one such as http://127.0.0.1:8001.")


class Upstream:
    """One vLLM server.

    Parameters
    ----------
    url : with or without /v1 at its end.
    key : its API key.
    client : of httpx.
    handover : how it gets visual tokens.
    """

    def __init__(self, url: str, key: str | None, client: Any, handover: Handover) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self.client = client
        self.headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        self.handover = handover
        self._model: str | None = None

    async def alive(self) -> bool:
        """Whether it answers."""
        import httpx

        try:
            response = await self.client.get(f"{self.url}/health", headers=self.headers, timeout=5.0)
        except httpx.HTTPError:
            return False
        return bool(response.status_code == 200)

    async def model(self) -> str:
        """The name of its model, once it is known to take visual tokens as they are handed over.

        Raises
        ------
        UnavailableError : it does not answer.
        RequestError : it does not take visual tokens so.
        """
        if self._model is None:
            response = await self._send("GET", "/v1/models", None)
            try:
                found = str(json.loads(await _whole(response))["data"][0]["id"])
            except (ValueError, KeyError, IndexError, TypeError) as error:
                raise UnavailableError("the engine does not say which model it serves") from error
            finally:
                await response.aclose()
            await self._probe(found)
            self._model = found
        return self._model

    async def _probe(self, model: str) -> None:
        """Raise ``RequestError`` where the engine takes what it must refuse: it would put visual tokens in wrong places."""
        part = self.handover.probe()
        if part is None:
            return
        content = [part, {"type": "text", "text": "a"}]
        asked = {"model": model, "messages": [{"role": "user", "content": content}], "max_tokens": 1}
        try:
            await (await self._send("POST", "/v1/chat/completions", asked)).aclose()
            told = "it answers where the plugin refuses"
        except UnavailableError:
            raise
        except RequestError as error:
            told = str(error)
        if self.handover.refusal not in told:
            options = shlex.join(self.handover.arguments)
            raise RequestError(
                f"the engine cannot be told where visual tokens of this model stand ({told}). Install foveate in its environment, "
                f"where vLLM finds the plugin by itself, and start vLLM with {options}.",
                502,
                "engine_error",
            )

    async def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        """A whole answer.

        Raises
        ------
        UnavailableError : the engine cannot be reached, or goes away.
        RequestError : it does not take the request, or fails.
        """
        response = await self._send("POST", "/v1/chat/completions", {**body, "model": await self.model()})
        try:
            found: dict[str, Any] = json.loads(await _whole(response))
        except ValueError as error:
            raise UnavailableError("the engine gave an answer that is no JSON") from error
        finally:
            await response.aclose()
        return found

    async def stream(self, body: dict[str, Any]) -> Events:
        """The pieces of an answer, as soon as the engine has taken the request.

        Raises
        ------
        UnavailableError : the engine cannot be reached.
        RequestError : it does not take the request, or fails.
        """
        response = await self._send("POST", "/v1/chat/completions", {**body, "model": await self.model()})
        return Events(response)

    async def _send(self, verb: str, path: str, body: dict[str, Any] | None) -> Any:
        import httpx

        content = None if body is None else await asyncio.to_thread(_written, body)  # it is large
        headers = self.headers if body is None else {**self.headers, "Content-Type": "application/json"}
        request = self.client.build_request(verb, self.url + path, content=content, headers=headers)
        try:
            response = await self.client.send(request, stream=True)
        except httpx.HTTPError as error:
            self._model = None  # what is started in its place may serve another name
            raise UnavailableError(f"the engine is not there ({type(error).__name__}). Try again later.") from error
        if response.status_code == 200:
            return response
        try:
            text = (await _whole(response)).decode(errors="replace")
        finally:
            await response.aclose()
        try:
            told = json.loads(text)
        except ValueError:
            told = None
        if response.status_code in (401, 403):
            raise RequestError("the engine does not take the gateway's key (--vllm-key)", 502, "engine_error")
        if response.status_code == 404 and body is not None:
            self._model = None
        told = told if isinstance(told, dict) else {"error": text}
        raise failure(
            told, response.status_code if body is not None else 502
        )  # what it has against its own list is no client's fault


def _written(body: dict[str, Any]) -> bytes:
    return json.dumps(body, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()


async def _whole(response: Any) -> bytes:
    import httpx

    try:
        return bytes(await response.aread())
    except httpx.HTTPError as error:
        raise UnavailableError(f"the engine went away ({type(error).__name__}). Send the request again.") from error


class Events:
    """The objects of server-sent events until [DONE]; to be closed, also where none was read.

    Raises
    ------
    UnavailableError : while iterating, the engine went away.
    """

    def __init__(self, response: Any) -> None:
        self._response, self._pieces = response, self._read()

    def __aiter__(self) -> Events:
        return self

    async def __anext__(self) -> dict[str, Any]:
        return await anext(self._pieces)

    async def aclose(self) -> None:
        """Leave the engine, which stops writing."""
        await self._response.aclose()

    async def _read(self) -> AsyncIterator[dict[str, Any]]:
        import httpx

        try:
            async for line in self._response.aiter_lines():
                data = line.removeprefix("data:").strip() if line.startswith("data:") else ""
                if data == "[DONE]":
                    return
                if data:
                    yield json.loads(data)
            raise UnavailableError("the engine went away before the answer was complete. Send the request again.")
        except (httpx.HTTPError, ValueError) as error:
            raise UnavailableError(f"the engine went away ({type(error).__name__}). Send the request again.") from error


def failure(told: dict[str, Any], status: int = 502) -> RequestError:
    """An error that the engine tells, as one of ours."""
    inner = told.get("error")
    message = inner.get("message") if isinstance(inner, dict) else inner or told.get("message") or told.get("detail")
    if status >= 500:
        return RequestError(f"the engine failed: {str(message)[:TOLD]}", 502, "engine_error")
    return RequestError(str(message)[:TOLD], status)
