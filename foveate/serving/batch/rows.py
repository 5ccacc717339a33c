"""Rows of an offline batch: a file of questions about pictures, as JSON lines."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ...chat import Prompt
from ...errors import FoveateError, InputError, shown
from ...fingerprint import digest
from ...images import check_regular, open_picture, picture_in
from ...jsonl import parsed
from ..encoding import pictures_of
from ..pictures import from_data_url
from .parsing import own_id, row_of

AGAIN = "Nothing was written of it. Run the same command again: what is answered stays, and the rest is asked."


@dataclass(frozen=True)
class AnswerSettings:
    """How a row is answered.

    Attributes
    ----------
    method : as listed by ``foveate methods``; "full" keeps all visual tokens.
    budget : visual tokens per picture, a count or a share; None = the method's own rule.
    config : all of the method, where it has other fields than its name says (``methods.saved.dumped``); no row may give it.
    max_new_tokens : of the answer.
    temperature : 0 takes the likeliest word each time.
    seed : of answers that are drawn; together with the id of the row, so that an answer does not depend on its batch.
    """

    method: str = "prumerge+"
    budget: int | float | None = None
    max_new_tokens: int = 64
    temperature: float = 0.0
    seed: int = 0
    config: str = ""


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
        return self.wanted.method, self.wanted.config, type(budget), budget, bool(pictures_of(self.messages))

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
        check_regular(self.path, "file of questions")
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
        nameless: list[int] = []
        broken: set[int] = set()  # those that have no row
        start, why = 0, ""
        with self.path.open("rb") as file:
            for number, data in enumerate(file, 1):
                if data.strip():
                    places.append((number, start, digest(data)))
                    try:
                        own = own_id(data)
                    except InputError as error:
                        own, why = None, str(error)
                        broken.add(number)
                    if own is None:
                        nameless.append(number)
                    else:
                        names[number] = own
                start += len(data)
        if not places:
            raise InputError(f"{self.path} holds no rows")
        if len(broken) == len(places):
            raise InputError(f"{self.path} is no file of JSON lines: none of its {len(places)} lines is a row; {why}")
        taken: dict[str | int, int] = {}
        for number, name in names.items():
            first = taken.setdefault(name, number)
            if first != number:
                raise InputError(f"lines {first} and {number} of {self.path} have the same id {shown(name)}. Each needs another.")
        for number in nameless:
            # what is no row may be wrong without disturbing others
            names[number] = f"line {number}" if number in broken and number in taken else number
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
        messages, asked = row_of(data, self.path.parent, wanted)
        return Row(line.id, messages, asked, _digest(data, messages))

    def digest(self, line: RowPlace) -> str:
        """Of a line and the contents of its pictures, also where it is no row.

        Raises
        ------
        ChangedError : it is not the line that was there when the file was first read.
        """
        data = self._data(line)
        try:
            return _digest(data, row_of(data, self.path.parent, AnswerSettings())[0])
        except InputError:
            return digest(data)

    def read_document(self, line: RowPlace, wanted: AnswerSettings) -> tuple[Row, dict[str, Any]]:
        """The row of a line, and all that the line says.

        Raises
        ------
        InputError, ChangedError : as of ``read``.
        """
        row = self.read(line, wanted)
        document: dict[str, Any] = parsed(self._data(line).decode("utf-8-sig"))
        return row, document

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


def _digest(data: bytes, messages: Sequence[dict[str, Any]]) -> str:
    """Of a line, and of the files of its pictures, which may change under the same name."""
    files = [picture for picture in map(str, pictures_of(messages)) if picture[:5].lower() != "data:"]
    return digest(data.strip(), *(contents(Path(file)) for file in files))


def contents(path: Path) -> bytes:
    """A digest of a file, nothing where there is none that can be read."""
    found = hashlib.sha256()
    try:
        if not path.is_file():
            return b""
        left = path.stat().st_size  # some files of /proc have no bytes, and are read without an end
        with path.open("rb") as file:
            while piece := file.read(min(left, 2**20)):
                found.update(piece)
                left -= len(piece)
    except OSError:
        return b""
    return found.digest()


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
        whole = "".join(part["text"] for part in message["content"] if part["type"] == "text")  # as templates write it
        held = next((word for word in reserved if word in whole), None)
        if held:
            raise InputError(f"a text holds {held!r}, which stands for a picture in the prompts of this model. Leave it out.")
        for part in message["content"]:
            if part["type"] == "image":
                images.append(_picture(part["image"], f"picture {len(images) + 1}"))
                parts.append({"type": "image", "image": images[-1]})
            else:
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
    return picture_in(data, name)
