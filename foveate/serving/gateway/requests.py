"""Reads requests of OpenAI's chat API: what is allowed in them, and what is told to a client whose request is not."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from ...errors import FoveateError, InputError, UnsupportedModelError
from ...methods.base import Method
from ..encoding import method_of
from ..template import PLACEHOLDER

# what goes on to the engine: it knows others, which would let a client change templates, caches or other clients' turns
FORWARDED = frozenset(
    "temperature top_p top_k min_p n seed stop stop_token_ids max_tokens max_completion_tokens min_tokens ignore_eos "
    "presence_penalty frequency_penalty repetition_penalty logit_bias logprobs top_logprobs response_format tools tool_choice "
    "parallel_tool_calls reasoning_effort skip_special_tokens user metadata".split()
)
OURS = frozenset(("model", "messages", "stream", "stream_options", "foveate"))
ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True)
class Limits:
    """What one request may ask for, and how many there may be.

    Attributes
    ----------
    body_bytes, body_seconds : of the body of a request, and until all of it has come.
    pictures : of one request.
    pixels : of one picture.
    waiting : requests that are being worked on or wait; one more is turned away.
    seconds : until an answer is complete.
    answers : ``n`` of one request.
    """

    body_bytes: int = 32 * 2**20
    body_seconds: float = 30.0
    pictures: int = 8
    pixels: int = 25_000_000
    waiting: int = 256
    seconds: float = 300.0
    answers: int = 8


class RequestError(FoveateError):
    """A request gets no answer: ``status`` of HTTP, ``kind`` and ``param`` as OpenAI's API names them."""

    def __init__(self, message: str, status: int = 400, kind: str = "invalid_request_error", param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.kind, self.param = status, kind, param

    def body(self) -> dict[str, Any]:
        """As OpenAI's API writes an error."""
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.status}}


@dataclass(frozen=True)
class ChatRequest:
    """One request, read.

    Attributes
    ----------
    messages : texts as lists of parts; a picture is ``{"type": "image", "number": its place in urls}``.
    urls : of the pictures, in their order.
    method : what reduces them.
    name, budget : by which it was asked for.
    options : for the engine.
    stream : whether the answer is sent word by word.
    usage : whether a stream ends with the numbers of tokens.
    """

    messages: list[dict[str, Any]]
    urls: list[str]
    method: Method
    name: str
    budget: float | None
    options: dict[str, Any]
    stream: bool
    usage: bool

    def filled(self, pictures: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The messages with something in place of each picture."""
        return [
            {
                **message,
                "content": [pictures[part["number"]] if part["type"] == "image" else part for part in message["content"]],
            }
            for message in self.messages
        ]


@dataclass(frozen=True)
class RequestReader:
    """Reads the bodies of requests.

    Parameters
    ----------
    model : the name under which the model is served.
    method, budget : for requests that ask for none.
    reserved : words that stand for pictures in prompts, which no text may hold.
    """

    model: str
    method: str
    budget: float | None = None
    limits: Limits = field(default_factory=Limits)
    reserved: tuple[str, ...] = (PLACEHOLDER,)

    def read(self, body: bytes) -> ChatRequest:
        """Read one body.

        Raises
        ------
        RequestError : it is no request that can be answered; the message says why.
        """
        try:
            text = body.decode()
            asked = json.loads(text, parse_constant=_no_constant, parse_float=_finite)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"the body is no JSON: {error}") from error
        if "\\ud" in text or "\\uD" in text:
            _check_characters(asked)
        if not isinstance(asked, dict):
            raise RequestError("the body is no JSON object")
        odd = sorted(asked.keys() - FORWARDED - OURS)
        if odd:
            raise RequestError(f"unknown argument {odd[0]!r}. Known: {', '.join(sorted(FORWARDED | OURS))}.", param=odd[0])
        if asked.get("model", self.model) != self.model:
            raise RequestError(f"there is no model {asked['model']!r} here; {self.model!r} is served.", 404, param="model")
        if not _within(asked.get("n"), 1, self.limits.answers):
            raise RequestError(f"n must be a whole number from 1 to {self.limits.answers}", param="n")
        for name in ("stream", "logprobs"):
            if not isinstance(asked.get(name) or False, bool):
                raise RequestError(f"{name} must be true or false", param=name)
        messages, urls = self._messages(asked.get("messages"))
        options = {name: asked[name] for name in FORWARDED & asked.keys() if asked[name] is not None}
        told = asked.get("stream_options") or {}
        if not isinstance(told, dict):
            raise RequestError("stream_options must be an object", param="stream_options")
        method, stream = self._method(asked.get("foveate")), bool(asked.get("stream"))
        return ChatRequest(messages, urls, *method, options, stream, bool(told.get("include_usage")))

    def _method(self, asked: Any) -> tuple[Method, str, float | None]:
        if asked is None:
            return method_of(self.method, self.budget), self.method, self.budget
        if not isinstance(asked, dict) or asked.keys() - {"method", "budget"}:
            raise RequestError('foveate must be an object such as {"method": "prumerge+", "budget": 144}', param="foveate")
        name, budget = asked.get("method"), asked.get("budget")
        if not isinstance(name or "", str) or not isinstance(budget, int | float | None) or isinstance(budget, bool):
            raise RequestError("foveate.method must be a name and foveate.budget a number", param="foveate")
        try:
            return method_of(name or self.method, budget), name or self.method, budget
        except (InputError, UnsupportedModelError) as error:
            raise RequestError(str(error), param="foveate") from error

    def _messages(self, messages: Any) -> tuple[list[dict[str, Any]], list[str]]:
        if not isinstance(messages, list) or not messages:
            raise RequestError("messages must be a list of at least one message", param="messages")
        found: list[dict[str, Any]] = []
        urls: list[str] = []
        for number, message in enumerate(messages):
            where = f"messages[{number}]"
            if not isinstance(message, dict) or message.get("role") not in ROLES:
                raise RequestError(f"{where} needs a role: {', '.join(ROLES)}", param=where)
            content = message.get("content")
            if isinstance(content, str):
                content = [{"type": "text", "text": content}]
            elif content is None and message["role"] == "assistant":
                content = []  # it called a tool
            if not isinstance(content, list):
                raise RequestError(f"{where}.content must be a text or a list of parts", param=where)
            parts = [self._part(part, f"{where}.content[{i}]", message["role"], urls) for i, part in enumerate(content)]
            found.append({**message, "content": parts})
        if len(urls) > self.limits.pictures:
            raise RequestError(f"{len(urls)} pictures in one request; at most {self.limits.pictures} are allowed", param="messages")
        return found, urls

    def _part(self, part: Any, where: str, role: str, urls: list[str]) -> dict[str, Any]:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text":
            text = part.get("text")
            if not isinstance(text, str):
                raise RequestError(f"{where}.text must be a text", param=where)
            held = next((word for word in self.reserved if word in text), None)
            if held:
                raise RequestError(f"{where} holds {held!r}, which stands for pictures in prompts. Leave it out.", param=where)
            return {"type": "text", "text": text}
        if kind == "image_url":
            url = part.get("image_url")
            url = url.get("url") if isinstance(url, dict) else url
            if not isinstance(url, str):
                raise RequestError(f"{where}.image_url.url must be a text", param=where)
            if role != "user":
                raise RequestError(f"{where}: pictures can only be in messages of the user", param=where)
            urls.append(url)
            return {"type": "image", "number": len(urls) - 1}
        raise RequestError(f"{where} must be of type text or image_url, and is {kind!r}", param=where)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _finite(digits: str) -> float:
    found = float(digits)
    if not math.isfinite(found):
        raise ValueError(f"{digits[:20]} is too large a number")
    return found


def _check_characters(asked: Any) -> None:
    """Refuse escapes of half a character, which nothing after the gateway can write."""
    try:
        json.dumps(asked, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"{error.object[error.start]!a} is half a character of Unicode. Send both halves, or none.") from error


def _within(value: Any, low: int, high: int) -> bool:
    return value is None or (isinstance(value, int) and not isinstance(value, bool) and low <= value <= high)
