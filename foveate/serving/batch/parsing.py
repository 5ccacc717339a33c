"""What a line of a batch says: rows of our own kind, and of OpenAI's batch API."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from ...errors import InputError, cut, shown
from ...images import is_base64
from ...jsonl import parsed

if TYPE_CHECKING:
    from .rows import AnswerSettings

ROLES = ("system", "developer", "user", "assistant")
WANTED = 'Expected {"image": "a.jpg", "question": "..."} or {"custom_id": "...", "body": {"messages": [...]}}.'
BODY = ("messages", "max_tokens", "max_completion_tokens", "temperature", "seed", "foveate")
# what asks for nothing, and what concerns neither model nor answer
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (None, 1),
    "stream": (None, False),
    "top_p": (None, 1),
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "stop": (None, []),
}
IGNORED = ("model", "user", "metadata", "store")
LONGEST = 2**31 - 1  # tokens of an answer, which engines count in 32 bits
HERE = ("", "localhost")  # hosts of file: URLs, of which other ones name other machines


def row_of(data: bytes, folder: Path, wanted: AnswerSettings) -> tuple[list[dict[str, Any]], AnswerSettings]:
    """Messages of a line, with paths and data URLs in place of pictures, and how they are answered.

    Parameters
    ----------
    folder : of the file, to which paths are relative.
    wanted : what the line does not say.

    Raises
    ------
    InputError : it is no row.
    """
    document = _document(data)
    return (_of_openai if "body" in document else _of_ours)(document, folder, wanted)


def own_id(data: bytes) -> str | int | None:
    """The id that a line gives its row, None where it gives none.

    Raises
    ------
    InputError : it is no line that has a row.
    """
    return _id(_document(data))


def _document(data: bytes) -> dict[str, Any]:
    try:
        document = parsed(data.decode("utf-8-sig"))  # others would be guessed line by line
    except ValueError as error:
        raise InputError(f"the line is no JSON: {error}. {WANTED}") from error
    if not isinstance(document, dict):
        raise InputError(f"the line is no JSON object. {WANTED}")
    _id(document)
    return document


def _id(document: dict[str, Any]) -> str | int | None:
    found = document.get("custom_id", document.get("id"))
    if found is not None and (not isinstance(found, str | int) or isinstance(found, bool)):
        raise InputError(f"the id {shown(found)} is neither a text nor a whole number")
    return found


def _of_ours(document: dict[str, Any], folder: Path, wanted: AnswerSettings) -> tuple[list[dict[str, Any]], AnswerSettings]:
    places, question = document.get("images"), document.get("question")
    if places is None:
        places = [document["image"]] if document.get("image") is not None else []
    elif document.get("image") is not None:
        raise InputError("the row has both 'image' and 'images'. Give one of them.")
    if not isinstance(question, str) or not question.strip():
        raise InputError(f"the row has no question. {WANTED}")
    if not isinstance(places, list) or not all(isinstance(place, str) for place in places):
        raise InputError("'image' is the path of a picture or a data URL, and 'images' a list of them")
    parts: list[dict[str, Any]] = [{"type": "image", "image": _place(place, folder)} for place in places]
    parts.append({"type": "text", "text": question})
    return [{"role": "user", "content": parts}], _asked(wanted, document, document.get("max_new_tokens"))


def _of_openai(document: dict[str, Any], folder: Path, wanted: AnswerSettings) -> tuple[list[dict[str, Any]], AnswerSettings]:
    body, url = document["body"], document.get("url")
    if not isinstance(body, dict):
        raise InputError(f"'body' is no JSON object. {WANTED}")
    if url is not None and (not isinstance(url, str) or not url.rstrip("/").endswith("/chat/completions")):
        raise InputError(f"the row is for {shown(url)}, and chat completions are answered: '/v1/chat/completions'")
    for name, value in body.items():
        if name in NEUTRAL and value not in NEUTRAL[name]:
            raise InputError(f"the row asks for {name}={shown(value)}, which a batch does not do. Leave it out.")
        if name not in (*BODY, *NEUTRAL, *IGNORED):
            raise InputError(f"the row asks for {shown(name)}, which a batch does not know. Known: {', '.join(BODY)}.")
    messages, ours = body.get("messages"), {} if body.get("foveate") is None else body["foveate"]
    if not isinstance(messages, list) or not messages:
        raise InputError("'messages' is a list of at least one message")
    if not isinstance(ours, dict) or ours.keys() - {"method", "budget"}:
        raise InputError('\'foveate\' is an object such as {"method": "prumerge+", "budget": 144}')
    longest = body.get("max_completion_tokens")
    asked = _asked(wanted, ours, body.get("max_tokens") if longest is None else longest)
    if body.get("temperature") is not None:
        asked = replace(asked, temperature=_number(body["temperature"], "temperature"))
    if body.get("seed") is not None:
        asked = replace(asked, seed=_whole(body["seed"], "seed"))
    return [_message(message, folder) for message in messages], asked


def _message(message: Any, folder: Path) -> dict[str, Any]:
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        raise InputError(f"each message needs a role: {', '.join(ROLES)}")
    content = message.get("content")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise InputError("the content of a message is a text or a list of parts")
    return {"role": message["role"], "content": [_part(part, folder) for part in content]}


def _part(part: Any, folder: Path) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind == "image_url":
        url = part.get("image_url")
        url = url.get("url") if isinstance(url, dict) else url
        if isinstance(url, str):
            return {"type": "image", "image": _place(url, folder)}
    raise InputError('a part of a message is {"type": "text", "text": "..."} or {"type": "image_url", "image_url": {"url": "..."}}')


def _place(place: str, folder: Path) -> str:
    """A data URL, or the whole path of a picture."""
    scheme = place[:10].partition(":")[0].lower()
    if scheme == "data":
        return place
    if scheme in ("http", "https"):
        raise InputError(f"{shown(place)} is not loaded: a batch reads files and data URLs. Download the picture first.")
    if is_base64(place) and not os.path.isfile(folder / place):
        raise InputError(
            f"{shown(place)} is no file. If it is the picture itself, make it a data URL: data:image/png;base64, comes in front."
        )
    if scheme != "file":
        return str(folder / place)
    try:
        url = urlsplit(place)
    except ValueError as error:
        raise InputError(f"{shown(place)} is no URL of a file ({error})") from error
    if url.netloc.lower() not in HERE:
        raise InputError(f"{shown(place)} is a file of another machine, {cut(url.netloc)}. Copy it here, and write file:///PATH.")
    return str(folder / url2pathname(url.path))


def _asked(wanted: AnswerSettings, document: dict[str, Any], longest: Any) -> AnswerSettings:
    """How a row is answered that may name a method, a budget, or both; a method comes without the budget of another."""
    method, budget = document.get("method"), document.get("budget")
    if not isinstance(method, str | None) or not isinstance(budget, int | float | None) or isinstance(budget, bool):
        raise InputError("'method' is a name and 'budget' a number")
    if method is not None:
        wanted = replace(wanted, method=method, budget=budget, config="")
    elif budget is not None:
        wanted = replace(wanted, budget=budget)
    if longest is None:
        return wanted
    if not 1 <= _whole(longest, "the longest answer") <= LONGEST:
        raise InputError(f"the longest answer has {shown(longest)} tokens; expected 1 or more, and at most {LONGEST}")
    return replace(wanted, max_new_tokens=longest)


def _whole(value: Any, what: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise InputError(f"{what}: {shown(value)} is no whole number")
    return value


def _number(value: Any, what: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value) or value < 0:
        raise InputError(f"{what}={shown(value)} is no number from 0 on")
    return float(value)
