"""Rows of an offline batch: questions about pictures as JSON lines, ours or those of OpenAI's batch API."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from PIL import Image

from ...chat import Prompt
from ...errors import FoveateError, InputError
from ...fingerprint import digest
from ...images import as_rgb, check_size, open_picture, reading
from ..encoding import pictures_of
from ..pictures import from_data_url

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
AGAIN = "Nothing was written of it. Run the same command again: what is answered stays, and the rest is asked."
IGNORED = ("model", "user", "metadata", "store")


@dataclass(frozen=True)
class AnswerSettings:
    """How a row is answered.

    Attributes
    ----------
    method : as listed by ``foveate methods``; "full" keeps all visual tokens.
    budget : visual tokens per picture, a count or a share; None = the method's own rule.
    max_new_tokens : of the answer.
    temperature : 0 takes the likeliest word each time.
    seed : of answers that are drawn; together with the id of the row, so that an answer does not depend on its batch.
    """

    method: str = "prumerge+"
    budget: int | float | None = None
    max_new_tokens: int = 64
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class RowPlace:
    """Where a row is: the number of its line from 1 on, the byte at which that begins, and a digest of it; and its id."""

    number: int
    id: str | int
    start: int
    line: str = ""


@dataclass(frozen=True)
class Row:
    """A row that has been read.

    Attributes
    ----------
    id : its own, or the number of its line.
    messages : of transformers' chat templates, with the place of a picture, a path or data URL, instead of the picture.
    wanted : how it is answered.
    digest : of the line and the contents of its pictures: another row under the same id has another one.
    """

    id: str | int
    messages: list[dict[str, Any]]
    wanted: AnswerSettings
    digest: str = ""

    @property
    def batch(self) -> tuple[Any, ...]:
        """Rows of one batch have the same."""
        budget = self.wanted.budget
        return self.wanted.method, type(budget), budget, bool(pictures_of(self.messages))

    @property
    def seed(self) -> int:
        """Of the answer."""
        return int(digest(str(self.wanted.seed), json.dumps(self.id))[:15], 16)


class ChangedError(FoveateError):
    """The questions are no longer those that the run began with."""


class Source:
    """A file of rows, JSON lines; paths of pictures are relative to its folder. Only ids and places are kept in memory.

    Raises
    ------
    InputError : it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path).absolute()
        try:
            self.path.open("rb").close()
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}") from error

    def lines(self) -> list[RowPlace]:
        """Where its rows are, with the ids that they have or get.

        Raises
        ------
        InputError : there are none, or two have the same id.
        """
        places: list[tuple[int, int, str]] = []
        names: dict[int, str | int] = {}  # by number of the line
        nameless: list[tuple[int, bool]] = []
        start = 0
        with self.path.open("rb") as file:
            for number, data in enumerate(file, 1):
                if data.strip():
                    places.append((number, start, digest(data)))
                    own, broken = _own_id(data)
                    if own is None:
                        nameless.append((number, broken))
                    else:
                        names[number] = own
                start += len(data)
        if not places:
            raise InputError(f"{self.path} holds no rows")
        taken: dict[str | int, int] = {}
        for number, name in names.items():
            first = taken.setdefault(name, number)
            if first != number:
                raise InputError(f"lines {first} and {number} of {self.path} have the same id {name!r}. Each needs another.")
        for number, broken in nameless:
            # what is no row may be wrong without disturbing others
            names[number] = f"line {number}" if broken and number in taken else number
            if names[number] in taken:
                raise InputError(
                    f"line {number} of {self.path} has no id, so that its number is taken, which is the id of line "
                    f"{taken[names[number]]}. Give all rows an id, or none."
                )
        return [RowPlace(number, names[number], start, line) for number, start, line in places]

    def read(self, line: RowPlace, wanted: AnswerSettings) -> Row:
        """The row of a line; what it does not say of how it is answered is as ``wanted``.

        Raises
        ------
        InputError : it is no row.
        ChangedError : it is not the line that was there when the file was first read.
        """
        data = self._data(line)
        messages, asked = self._parsed(data, wanted)
        return Row(line.id, messages, asked, _digest(data, messages))

    def digest(self, line: RowPlace) -> str:
        """Of a line and the contents of its pictures, also where it is no row.

        Raises
        ------
        ChangedError : it is not the line that was there when the file was first read.
        """
        data = self._data(line)
        try:
            return _digest(data, self._parsed(data, AnswerSettings())[0])
        except InputError:
            return digest(data)

    def _data(self, line: RowPlace) -> bytes:
        try:
            with self.path.open("rb") as file:
                file.seek(line.start)
                data = file.readline()
        except OSError as error:
            raise ChangedError(f"{self.path} can no longer be read: {error.strerror}. {AGAIN}") from error
        if digest(data) != line.line:
            raise ChangedError(f"{self.path} has changed: line {line.number} is another one than at the beginning. {AGAIN}")
        return data

    def _parsed(self, data: bytes, wanted: AnswerSettings) -> tuple[list[dict[str, Any]], AnswerSettings]:
        document = _document(data)
        return (_of_openai if "body" in document else _of_ours)(document, self.path.parent, wanted)


def _digest(data: bytes, messages: Sequence[dict[str, Any]]) -> str:
    """Of a line, and of the files of its pictures, which may change under the same name."""
    parts = [data.strip()]
    for picture in map(str, pictures_of(messages)):
        if picture[:5].lower() != "data:":
            try:
                parts.append(Path(picture).read_bytes() if Path(picture).is_file() else b"")
            except OSError:
                parts.append(b"")
    return digest(*parts)


def opened(row: Row, reserved: Sequence[str]) -> Prompt:
    """The row as a prompt, with its pictures.

    Parameters
    ----------
    reserved : words that stand for pictures in prompts, which no text may hold.

    Raises
    ------
    InputError : a picture cannot be read, or a text holds such a word.
    """
    messages: list[dict[str, Any]] = []
    images: list[Image.Image] = []
    for message in row.messages:
        parts = []
        for part in message["content"]:
            if part["type"] == "image":
                images.append(_picture(part["image"], f"picture {len(images) + 1}"))
                parts.append({"type": "image", "image": images[-1]})
            else:
                held = next((word for word in reserved if word in part["text"]), None)
                if held:
                    raise InputError(
                        f"a text holds {held!r}, which stands for a picture in the prompts of this model. Leave it out."
                    )
                parts.append(part)
        messages.append({"role": message["role"], "content": parts})
    texts = [part["text"] for message in messages for part in message["content"] if part["type"] == "text"]
    return Prompt(messages, "\n".join(texts), images, [], "")


def _picture(place: str, name: str) -> Image.Image:
    if place[:5].lower() != "data:":
        return open_picture(place).image
    try:
        data = from_data_url(place, name)
    except Exception as error:
        raise InputError(str(error)) from error
    with reading(Path(name)), Image.open(BytesIO(data)) as opened:
        image = as_rgb(opened)
        check_size(Path(name), image)
    return image


def _own_id(data: bytes) -> tuple[str | int | None, bool]:
    """The id that a line gives its row, and whether the line is none that has a row."""
    try:
        document = _document(data)
        return _id(document), False
    except InputError:
        return None, True


def _document(data: bytes) -> dict[str, Any]:
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InputError(f"the line is no JSON: {error}. {WANTED}") from error
    if not isinstance(document, dict):
        raise InputError(f"the line is no JSON object. {WANTED}")
    _id(document)
    return document


def _id(document: dict[str, Any]) -> str | int | None:
    found = document.get("custom_id", document.get("id"))
    if found is not None and (not isinstance(found, str | int) or isinstance(found, bool)):
        raise InputError(f"the id {found!r} is neither a text nor a whole number")
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
        raise InputError(f"the row is for {url!r}, and chat completions are answered: '/v1/chat/completions'")
    for name, value in body.items():
        if name in NEUTRAL and value not in NEUTRAL[name]:
            raise InputError(f"the row asks for {name}={value!r}, which a batch does not do. Leave it out.")
        if name not in (*BODY, *NEUTRAL, *IGNORED):
            raise InputError(f"the row asks for {name!r}, which a batch does not know. Known: {', '.join(BODY)}.")
    messages, ours = body.get("messages"), body.get("foveate") or {}
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
    scheme = place.partition(":")[0].lower()
    if scheme == "data":
        return place
    if scheme in ("http", "https"):
        raise InputError(f"{place[:80]!r} is not loaded: a batch reads files and data URLs. Download the picture first.")
    return str(folder / (url2pathname(urlsplit(place).path) if scheme == "file" else place))


def _asked(wanted: AnswerSettings, document: dict[str, Any], longest: Any) -> AnswerSettings:
    """How a row is answered that may name a method, a budget, or both; a method comes without the budget of another."""
    method, budget = document.get("method"), document.get("budget")
    if not isinstance(method or "", str) or not isinstance(budget, int | float | None) or isinstance(budget, bool):
        raise InputError("'method' is a name and 'budget' a number")
    if method is not None:
        wanted = replace(wanted, method=method, budget=budget)
    elif budget is not None:
        wanted = replace(wanted, budget=budget)
    if longest is None:
        return wanted
    if _whole(longest, "the longest answer") < 1:
        raise InputError(f"the longest answer has {longest} tokens; expected 1 or more")
    return replace(wanted, max_new_tokens=longest)


def _whole(value: Any, what: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise InputError(f"{what}: {value!r} is no whole number")
    return value


def _number(value: Any, what: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value) or value < 0:
        raise InputError(f"{what}={value!r} is no number from 0 on")
    return float(value)
