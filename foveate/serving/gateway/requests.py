"""Reads requests of OpenAI's chat API: what is allowed in them, and what is told to a client whose request is not."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from ...errors import SHOWN, InputError, UnsupportedModelError, shown
from ...jsonl import each_once
from ...methods.base import Method
from ..encoding import method_of
from ..template import PLACEHOLDER
from .limits import Limits as Limits
from .limits import RequestError as RequestError
from .messages import Medium, check_characters, check_length, check_words, read_messages, strings, too_deep

# what goes on to the engine: it knows others, which would let a client change templates, caches or other clients' turns
FORWARDED = frozenset(
    "temperature top_p top_k min_p n seed stop stop_token_ids max_tokens max_completion_tokens min_tokens ignore_eos "
    "presence_penalty frequency_penalty repetition_penalty logit_bias logprobs top_logprobs response_format tools tool_choice "
    "parallel_tool_calls reasoning_effort skip_special_tokens".split()
)
OURS = frozenset(("model", "messages", "stream", "stream_options", "foveate"))
# what changes no answer: bookkeeping of OpenAI's, which is taken and forgotten
HARMLESS = frozenset(
    "user metadata store service_tier prompt_cache_key prompt_cache_retention safety_identifier prediction".split()
)
NEUTRAL: dict[str, Any] = {"modalities": ["text"], "verbosity": "medium"}  # what may be asked for, since it is done anyway
IN_NO_PROMPT = frozenset(("stop",))  # texts that no template writes
FRAMES = 16  # of a video, where a request does not say
LARGEST_BUDGET = 10**6  # visual tokens


@dataclass(frozen=True)
class ChatRequest:
    """One request, read.

    Attributes
    ----------
    messages : texts as lists of parts; a picture is ``{"type": "image", "number": its place in media}``, a video likewise.
    media : pictures and videos, in their order.
    frames : that are taken of a video.
    method : what reduces them.
    name, budget, config : by which it was asked for.
    options : for the engine.
    stream : whether the answer is sent word by word.
    usage : whether a stream ends with the numbers of tokens.
    """

    messages: list[dict[str, Any]]
    media: list[Medium]
    frames: int
    method: Method
    name: str
    budget: float | None
    config: str
    options: dict[str, Any]
    stream: bool
    usage: bool

    def filled(self, media: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The messages with something in place of each picture and video."""
        return [
            {
                **message,
                "content": [media[part["number"]] if "number" in part else part for part in message["content"]],
            }
            for message in self.messages
        ]


@dataclass(frozen=True)
class RequestReader:
    """Reads the bodies of requests.

    Parameters
    ----------
    model : the name under which the model is served.
    method, budget, config : for requests that ask for none; a request may give another budget or another name.
    reserved : words that stand for pictures in prompts, which no text may hold.
    """

    model: str
    method: str
    budget: float | None = None
    config: str = ""
    limits: Limits = field(default_factory=Limits)
    reserved: tuple[str, ...] = (PLACEHOLDER,)

    def read(self, body: bytes | bytearray) -> ChatRequest:
        """Read one body.

        Raises
        ------
        RequestError : it is no request that can be answered; the message says why.
        """
        asked = self._parsed(body)
        odd = sorted(name for name in asked.keys() - FORWARDED - OURS - HARMLESS if asked[name] not in (None, NEUTRAL.get(name)))
        if odd:
            known = ", ".join(sorted(FORWARDED | OURS | HARMLESS))
            unknown = f"unknown argument {shown(odd[0])}"
            said = f"{shown(odd[0])}: only {NEUTRAL[odd[0]]!r} is answered here" if odd[0] in NEUTRAL else unknown
            raise RequestError(f"{said}. Known: {known}.", param=odd[0])
        if asked.get("model") not in (None, self.model):
            raise RequestError(f"there is no model {shown(asked['model'])} here; {self.model!r} is served.", 404, param="model")
        if not _within(asked.get("n"), 1, self.limits.answers):
            raise RequestError(f"n must be a whole number from 1 to {self.limits.answers}", param="n")
        for name in ("stream", "logprobs"):
            if not isinstance(asked.get(name), bool | None):
                raise RequestError(f"{name} must be true or false", param=name)
        found = read_messages(asked.get("messages"), self.limits)
        options = {name: asked[name] for name in FORWARDED & asked.keys() if asked[name] is not None}
        written = [(text, name) for name in sorted(options.keys() - IN_NO_PROMPT) for text in strings(options[name])]
        texts = [*found.texts, *written]
        check_length(texts, self.limits)
        check_words(texts, self.reserved)
        method, stream = self._method(asked.get("foveate")), bool(asked.get("stream"))
        frames = self._frames(asked.get("foveate"))
        return ChatRequest(found.messages, found.media, frames, *method, options, stream, _usage(asked.get("stream_options")))

    def _parsed(self, body: bytes | bytearray) -> dict[str, Any]:
        """A body as JSON that is not too much to look at."""
        values = sum(map(body.count, (b",", b"[", b"{")))
        if values > self.limits.values:
            raise RequestError(f"the body has {values} commas and opening brackets; at most {self.limits.values} are allowed", 413)
        try:
            text = body.decode()
            asked = json.loads(text, parse_constant=_no_constant, parse_float=_finite, object_pairs_hook=each_once)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"the body is no JSON: {error}") from error
        if too_deep(asked, self.limits.depth):
            raise RequestError(f"the body is nested too deep; at most {self.limits.depth} levels are allowed")
        if "\\ud" in text or "\\uD" in text:
            check_characters(asked)
        if not isinstance(asked, dict):
            raise RequestError("the body is no JSON object")
        return asked

    def _method(self, asked: Any) -> tuple[Method, str, float | None, str]:
        asked = {} if asked is None else asked
        if not isinstance(asked, dict) or asked.keys() - {"method", "budget", "frames"}:
            raise RequestError('foveate must be an object such as {"method": "prumerge+", "budget": 144}', param="foveate")
        name, budget = asked.get("method"), asked.get("budget")
        if not isinstance(name, str | None) or not isinstance(budget, int | float | None) or isinstance(budget, bool):
            raise RequestError("foveate.method must be a name and foveate.budget a number", param="foveate")
        if not name and budget is None:  # it says nothing of the method, as {"frames": 8}
            return method_of(self.method, self.budget, self.config), self.method, self.budget, self.config
        if len(name or "") > SHOWN:
            raise RequestError(f"foveate.method is {shown(name)}, which is no method; see 'foveate methods'", param="foveate")
        if budget is not None and abs(budget) > LARGEST_BUDGET:
            raise RequestError(f"foveate.budget must be at most {LARGEST_BUDGET}", param="foveate")
        try:
            config = "" if name else self.config
            return method_of(name or self.method, budget, config), name or self.method, budget, config
        except (InputError, UnsupportedModelError) as error:
            raise RequestError(str(error), param="foveate") from error

    def _frames(self, asked: Any) -> int:
        frames = None if asked is None else asked.get("frames")
        if not _within(frames, 1, self.limits.frames):
            raise RequestError(f"foveate.frames must be a whole number from 1 to {self.limits.frames}", param="foveate")
        return min(FRAMES, self.limits.frames) if frames is None else frames


# the others change no answer; the last is of vLLM, and asked for by clients that measure: numbers come at the end of a stream
STREAM_OPTIONS = ("include_usage", "include_obfuscation", "continuous_usage_stats")


def _usage(asked: Any) -> bool:
    """Whether a stream ends with the numbers of tokens."""
    asked = {} if asked is None else asked
    if not isinstance(asked, dict):
        raise RequestError("stream_options must be an object", param="stream_options")
    odd = sorted(name for name in asked if asked[name] is not None and name not in STREAM_OPTIONS)
    if odd:
        raise RequestError(f"unknown argument {shown(odd[0])} of stream_options. Known: include_usage.", param="stream_options")
    return bool(asked.get("include_usage"))


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _finite(digits: str) -> float:
    found = float(digits)
    if not math.isfinite(found):
        raise ValueError(f"{digits[:20]} is too large a number")
    return found


def _within(value: Any, low: int, high: int) -> bool:
    return value is None or (isinstance(value, int) and not isinstance(value, bool) and low <= value <= high)
