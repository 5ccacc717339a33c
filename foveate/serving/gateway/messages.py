"""Reads the messages of requests: which fields they may have, and that no text makes a word that stands for pictures."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from ...errors import cut, first_line, shown
from ...jsonl import each_once
from ..template import source_template
from .limits import Limits, RequestError

ROLES = ("system", "developer", "user", "assistant", "tool")
FIELDS = frozenset(("role", "content", "name"))
FIELDS_OF = {"assistant": FIELDS | {"tool_calls"}, "tool": FIELDS | {"tool_call_id"}}
JPEGS = "data:video/jpeg;base64,"
FPS, FASTEST = 2.0, (0.01, 1000)  # of frames that do not say: what Qwen's processors take of a film
DETAILS = (None, "auto", "high")  # of a picture; its size is chosen by the model, and its tokens by "foveate"


@dataclass(frozen=True)
class Medium:
    """A picture or video of a request.

    Attributes
    ----------
    kind : "image" or "video".
    urls : where it is; of a video that is sent frame by frame, where each of them is.
    fps : of a video that is sent frame by frame, None where it is a file.
    """

    kind: str
    urls: tuple[str, ...]
    fps: float | None = None


@dataclass
class Conversation:
    """Messages that have been read.

    Attributes
    ----------
    messages : texts as lists of parts; a picture is ``{"type": "image", "number": its place in media}``, a video likewise.
    media : pictures and videos, in their order.
    texts : all that a chat template may write, in its order, and where it is.
    """

    messages: list[dict[str, Any]] = field(default_factory=list)
    media: list[Medium] = field(default_factory=list)
    texts: list[tuple[str, str]] = field(default_factory=list)


def read_messages(messages: Any, limits: Limits) -> Conversation:
    """Read the messages of a request.

    Raises
    ------
    RequestError : they are none, or too many, or say what is not known.
    """
    if not isinstance(messages, list) or not messages:
        raise RequestError("messages must be a list of at least one message", param="messages")
    contents = (message.get("content") for message in messages if isinstance(message, dict))
    number = len(messages) + sum(len(content) for content in contents if isinstance(content, list))
    if number > limits.messages:
        raise RequestError(f"{number} messages and parts of messages; at most {limits.messages} are allowed", 413, param="messages")
    found = Conversation()
    for place, message in enumerate(messages):
        found.messages.append(_message(message, f"messages[{place}]", found))
    if len(found.media) > limits.pictures:
        raise RequestError(f"{len(found.media)} pictures in one request; at most {limits.pictures} are allowed", param="messages")
    longest = max((len(medium.urls) for medium in found.media), default=0)
    if longest > limits.frames:
        raise RequestError(f"a video of {longest} frames; at most {limits.frames} are allowed", param="messages")
    return found


def _message(message: Any, where: str, found: Conversation) -> dict[str, Any]:
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        raise RequestError(f"{where} needs a role: {', '.join(ROLES)}", param=where)
    role = message["role"]
    message = known(message, FIELDS_OF.get(role, FIELDS), where)
    content = message.get("content")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    elif content is None and role == "assistant":
        content = []  # it called a tool
    if not isinstance(content, list):
        raise RequestError(f"{where}.content must be a text or a list of parts", param=where)
    parts = [_part(part, f"{where}.content[{i}]", role, found) for i, part in enumerate(content)]
    read: dict[str, Any] = {"role": role, "content": parts}
    for name in message.keys() & {"name", "tool_call_id"}:
        read[name] = _text(message[name], f"{where}.{name}", found)
    calls = message.get("tool_calls", [])
    if not isinstance(calls, list):
        raise RequestError(f"{where}.tool_calls must be a list", param=where)
    if calls:
        read["tool_calls"] = [_call(call, f"{where}.tool_calls[{i}]", found) for i, call in enumerate(calls)]
    return read


def known(sent: dict[str, Any], fields: frozenset[str], where: str) -> dict[str, Any]:
    """The fields that say something; unknown ones that are null, or an empty list, do not.

    Raises
    ------
    RequestError : one of them is none of ``fields``.
    """
    said = {name: value for name, value in sent.items() if value is not None and (value != [] or name in fields)}
    odd = sorted(said.keys() - fields)
    if odd:
        raise RequestError(f"{where} has an unknown field {shown(odd[0])}. Known: {', '.join(sorted(fields))}.", param=where)
    return said


def _text(value: Any, where: str, found: Conversation) -> str:
    if not isinstance(value, str):
        raise RequestError(f"{where} must be a text", param=where)
    found.texts.append((value, where))
    return value


def _call(call: Any, where: str, found: Conversation) -> dict[str, Any]:
    """The call of a tool; engines read its arguments before a template writes them."""
    if not isinstance(call, dict) or not isinstance(call.get("function"), dict) or call.get("type", "function") != "function":
        raise RequestError(f'{where} must be {{"id": ..., "type": "function", "function": {{...}}}}', param=where)
    call = known(call, frozenset(("id", "type", "function", "index")), where)
    function = known(call["function"], frozenset(("name", "arguments")), f"{where}.function")
    name = _text(function.get("name"), f"{where}.function.name", found)
    arguments = _text(function.get("arguments", "{}"), f"{where}.function.arguments", found)
    try:
        told = json.loads(arguments or "{}", object_pairs_hook=each_once)
    except (ValueError, RecursionError):
        told = None
    if not isinstance(told, dict) or too_deep(told, Limits.depth):
        raise RequestError(f"{where}.function.arguments must be a text that is a JSON object", param=where)
    check_characters(told)
    found.texts += [(text, where) for text in strings(told)]
    read = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return {"id": _text(call["id"], f"{where}.id", found), **read} if "id" in call else read


def _part(part: Any, where: str, role: str, found: Conversation) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text":
        part = known(part, frozenset(("type", "text", "cache_control")), where)
        return {"type": "text", "text": _text(part.get("text"), f"{where}.text", found)}
    if kind == "image_url":
        url = told = known(part, frozenset(("type", "image_url", "cache_control")), where).get("image_url")
        if isinstance(told, dict):
            url = known(told, frozenset(("url", "detail")), f"{where}.image_url").get("url")
            if told.get("detail") not in DETAILS:
                raise RequestError(
                    f"{where}.image_url.detail is {shown(told['detail'])}; 'auto' and 'high' are taken. For fewer visual tokens "
                    'say how many: "foveate": {"budget": 64}.',
                    param=where,
                )
        if not isinstance(url, str):
            raise RequestError(f"{where}.image_url.url must be a text", param=where)
        return _shown(Medium("image", (url,)), where, role, found)
    if kind in ("video_url", "video"):
        return _shown(_video_url(part, where) if kind == "video_url" else _frames(part, where), where, role, found)
    raise RequestError(f"{where} must be of type text or image_url, video_url or video, and is {shown(kind)}", param=where)


def _shown(medium: Medium, where: str, role: str, found: Conversation) -> dict[str, Any]:
    if role != "user":
        raise RequestError(f"{where}: pictures can only be in messages of the user", param=where)
    found.media.append(medium)
    return {"type": medium.kind, "number": len(found.media) - 1}


def _video_url(part: dict[str, Any], where: str) -> Medium:
    """A video by one URL. As vLLM has it, ``data:video/jpeg;base64,`` is followed by frames with commas between."""
    url = told = known(part, frozenset(("type", "video_url", "cache_control")), where).get("video_url")
    if isinstance(told, dict):
        url = known(told, frozenset(("url",)), f"{where}.video_url").get("url")
    if not isinstance(url, str):
        raise RequestError(f"{where}.video_url.url must be a text", param=where)
    if url[: len(JPEGS)].lower() == JPEGS:
        return Medium("video", tuple(f"data:image/jpeg;base64,{frame}" for frame in url[len(JPEGS) :].split(",")), FPS)
    return Medium("video", (url,))


def _frames(part: dict[str, Any], where: str) -> Medium:
    """A video frame by frame, as Qwen's messages have it."""
    part = known(part, frozenset(("type", "video", "fps", "cache_control")), where)
    urls, fps = part.get("video"), part.get("fps", FPS)
    if not isinstance(urls, list) or not urls or not all(isinstance(url, str) for url in urls):
        raise RequestError(
            f'{where}.video must be a list of URLs, one for each frame. A file is {{"type": "video_url"}}.', param=where
        )
    if not isinstance(fps, int | float) or isinstance(fps, bool) or not FASTEST[0] <= fps <= FASTEST[1]:
        raise RequestError(f"{where}.fps must be a number from {FASTEST[0]} to {FASTEST[1]}, frames per second", param=where)
    return Medium("video", tuple(urls), float(fps))


def check_characters(asked: Any) -> None:
    """Refuse escapes of half a character, which nothing after the gateway can write.

    Raises
    ------
    RequestError : there is one.
    """
    try:
        json.dumps(asked, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"{error.object[error.start]!a} is half a character of Unicode. Send both halves, or none.") from error


def strings(value: Any) -> Iterator[str]:
    """All texts in something of JSON, names of fields included, in their order."""
    waiting = [value]
    while waiting:
        each = waiting.pop()
        if isinstance(each, str):
            yield each
        elif isinstance(each, dict):
            waiting += [inner for pair in reversed(each.items()) for inner in reversed(pair)]
        elif isinstance(each, list):
            waiting += reversed(each)


def too_deep(value: Any, depth: int) -> bool:
    """Whether something of JSON has more levels than that."""
    level = [value]
    for _ in range(depth):
        inner = (each.values() if isinstance(each, dict) else each for each in level if isinstance(each, dict | list))
        level = [*chain.from_iterable(inner)]
        if not level:
            return False
    return True


def check_length(texts: Sequence[tuple[str, str]], limits: Limits) -> None:
    """Refuse more text than models read; encoders would be busy with it while others wait.

    Raises
    ------
    RequestError : it is too much.
    """
    number = sum(len(text) for text, _ in texts)
    if number > limits.characters:
        raise RequestError(f"the texts have {number} characters; at most {limits.characters} are allowed", 413, param="messages")


def check_words(texts: Sequence[tuple[str, str]], words: Sequence[str]) -> None:
    """Refuse words that stand for pictures in prompts, also in pieces that a template may join, with or without spaces around.

    Raises
    ------
    RequestError : there is one.
    """
    whole = "".join(text for text, _ in texts)
    bare = "".join(text.strip() for text, _ in texts)
    for word in words:
        if word in whole or word in bare:
            where = next((where for text, where in texts if word in text), "messages, in several parts,")
            raise RequestError(f"{where} holds {word!r}, which stands for pictures in prompts. Leave it out.", param=where)


class Rendering:
    """Writes conversations by the chat template, and counts in them the words that stand for pictures.

    Parameters
    ----------
    processor : whose template.
    words : to be counted.
    kinds : of media that it writes.
    """

    def __init__(self, processor: Any, words: Sequence[str], kinds: Sequence[str] = ("image",)) -> None:
        self.tokenizer, self.template, self.words = processor.tokenizer, source_template(processor), words
        self.per = {kind: self._counted(self.write([{"role": "user", "content": _example(kind)}])) for kind in kinds}

    def write(self, messages: list[dict[str, Any]], tools: Any = None) -> str:
        """The prompt of a conversation."""
        options = {"chat_template": self.template, "tools": tools, "tokenize": False, "add_generation_prompt": True}
        return str(self.tokenizer.apply_chat_template(messages, **options))

    def _counted(self, written: str) -> dict[str, int]:
        """How often words are in a prompt as written, or as the tokenizer reads it, for which capitals may be small letters."""
        normalizer = getattr(getattr(self.tokenizer, "backend_tokenizer", None), "normalizer", None)
        read = written if normalizer is None else normalizer.normalize_str(written)
        return {word: max(written.count(word), read.count(word)) for word in self.words}

    def check(self, messages: Sequence[dict[str, Any]], kinds: Sequence[str], tools: Any = None) -> None:
        """Refuse messages of which the template makes other words for pictures than its media, of these kinds, need.

        Raises
        ------
        RequestError : it does, or does not take the messages at all.
        """
        try:
            written = self.write([_as_engines_read(message) for message in messages], tools)
        except Exception as error:  # templates raise what their authors chose
            raise RequestError(f"the chat template of the model does not take the messages: {cut(first_line(error))}") from error
        for word, number in self._counted(written).items():
            if number != sum(self.per[kind][word] for kind in kinds):
                raise RequestError(
                    f"in the prompt {word!r} is written {number} times for {len(kinds)} pictures. The texts make this "
                    "word, which stands for pictures, or the chat template leaves pictures out.",
                    param="messages",
                )


def _example(kind: str) -> list[dict[str, Any]]:
    return [{"type": kind}, {"type": "text", "text": "a"}]


def _as_engines_read(message: dict[str, Any]) -> dict[str, Any]:
    if "tool_calls" not in message:
        return message
    calls = [
        {**call, "function": {**call["function"], "arguments": json.loads(call["function"]["arguments"] or "{}")}}
        for call in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}
