"""Files of training data: conversations about pictures, in the formats of LLaVA and TRL, and lines of one question each."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import InputError, cut, first_line
from ..images import check_regular
from ..jsonl import parsed

PLACEHOLDER = "<image>"  # of LLaVA's format, where a picture stands in the text
ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}
FORMATS = (
    'LLaVA\'s {"image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\n..."}, {"from": "gpt", "value": "..."}]}, '
    'TRL\'s {"images": ["a.jpg"], "messages": [{"role": "user", "content": "..."}, ...]}, or '
    '{"image": "a.jpg", "question": "...", "answer": "..."}'
)
Message = dict[str, Any]


@dataclass(frozen=True)
class Conversation:
    """A conversation about some pictures.

    Attributes
    ----------
    messages : for a chat template: each has a role and, as content, parts of type "image" and "text".
    pictures : files, in the order of the image parts.
    where : the line it comes from, for messages.
    """

    messages: tuple[Message, ...]
    pictures: tuple[Path, ...]
    where: str

    @property
    def answered(self) -> bool:
        """Whether the last word is the assistant's."""
        return bool(self.messages[-1]["role"] == "assistant")

    def with_answer(self, answer: str) -> Conversation:
        """The same with an answer to the question at its end."""
        return replace(self, messages=(*self.messages, _message("assistant", [_text(answer)])))

    def single_turns(self) -> list[Conversation]:
        """Each question and its answer as a conversation of its own, about all pictures."""
        system = [message for message in self.messages if message["role"] == "system"]
        turns = [message for message in self.messages if message["role"] != "system"]
        shown = [{"type": "image"} for _ in self.pictures]
        found = []
        for start in range(0, len(turns), 2):
            asked = [part for part in turns[start]["content"] if part["type"] == "text"]
            messages = [*system, _message("user", [*shown, *asked]), *turns[start + 1 : start + 2]]
            found.append(Conversation(tuple(messages), self.pictures, self.where))
        return found


def read_conversations(
    path: Path, images: Path | None = None, *, answers: bool = True, skip_broken: bool = False
) -> tuple[list[Conversation], list[str]]:
    """All conversations of a file, checked before anything is done with one.

    Parameters
    ----------
    path : a JSON list, or JSON lines.
    images : folder that paths of pictures are relative to; None = that of the file.
    answers : whether each conversation has to end with an answer.
    skip_broken : leave out what is broken, instead of raising.

    Returns
    -------
    The conversations, and what was wrong with each one that was left out.

    Raises
    ------
    InputError : the file cannot be read, holds no conversation, or one is broken; the message names file and line.
    """
    folder = path.parent if images is None else images
    found, broken = [], []
    for where, entry in _entries(path):
        try:
            if isinstance(entry, Exception):
                raise entry
            found.append(_conversation(entry, folder, where, answers))
        except (InputError, ValueError, KeyError, TypeError, AttributeError) as error:
            what = f"{where}: {_said(error)}"
            if not skip_broken:
                raise InputError(f"{what}. Nothing was trained; mend it, or leave such entries out with --skip-broken.") from error
            broken.append(what)
    if not found:
        raise InputError(f"{path} holds no conversation. Expected {FORMATS}.")
    return found, broken


def _said(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"{error.args[0]!r} is missing"
    return first_line(error).rstrip(".")


def _entries(path: Path) -> Iterator[tuple[str, Any]]:
    """Where each entry is, and the entry, or the error that reading it led to."""
    check_regular(path, "file of conversations")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is no text in UTF-8"
        raise InputError(f"the file of conversations {path} cannot be read: {why}") from error
    if text.lstrip().startswith("["):
        try:
            entries = parsed(text)
        except ValueError as error:
            raise InputError(f"{path} is no JSON list: {first_line(error)}") from error
        yield from ((f"entry {number} of {path}", entry) for number, entry in enumerate(entries, 1))
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                entry: Any = parsed(line)
            except ValueError as error:
                entry = ValueError(f"it is no JSON: {first_line(error)}")
            yield f"line {number} of {path}", entry


def _conversation(entry: Any, folder: Path, where: str, answers: bool) -> Conversation:
    if not isinstance(entry, dict):
        raise ValueError(f"expected {FORMATS}")
    named = entry.get("images", entry.get("image"))
    names = [] if named is None else [named] if isinstance(named, str) else list(named)
    if not all(isinstance(name, str) and name for name in names):
        raise ValueError("a picture is no path")
    if "conversations" in entry:
        messages = [_of_llava(turn) for turn in entry["conversations"]]
    elif "messages" in entry:
        messages = [_of_trl(turn) for turn in entry["messages"]]
    elif "question" in entry:
        said = [("user", entry["question"])] + ([("assistant", entry["answer"])] if "answer" in entry else [])
        messages = [_message(role, [_text(text)]) for role, text in said]
    else:
        raise ValueError(f"expected {FORMATS}")
    _check_turns(messages, answers)
    places = sum(part["type"] == "image" for message in messages for part in message["content"])
    if names and not places:  # pictures that the text does not place come first
        first = next(message for message in messages if message["role"] == "user")
        first["content"] = [{"type": "image"} for _ in names] + first["content"]
    elif places != len(names):
        raise ValueError(f"it has {len(names)} pictures, and its text places for {places}")
    pictures = [folder / name for name in names]
    missing = next((picture for picture in pictures if not picture.is_file()), None)
    if missing is not None:
        raise ValueError(f"there is no picture {missing}")
    return Conversation(tuple(messages), tuple(pictures), where)


def _check_turns(messages: list[Message], answers: bool) -> None:
    """Raise ``ValueError`` unless user and assistant take turns, beginning with the user."""
    roles = [message["role"] for message in messages]
    roles = roles[1:] if roles[:1] == ["system"] else roles
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2) + ["user"] * (len(roles) % 2):
        raise ValueError("user and assistant have to take turns, the user first")
    if answers and roles[-1] != "assistant":
        raise ValueError("it ends with a question; an answer is needed to train on")
    for message in messages:
        if message["role"] == "assistant":
            if any(part["type"] == "image" for part in message["content"]):
                raise ValueError("a picture is in an answer")
            if not any(part["text"].strip() for part in message["content"]):
                raise ValueError("an answer is empty")


def _of_llava(turn: Any) -> Message:
    role, text = ROLES.get(turn["from"]), turn["value"]
    if role is None or not isinstance(text, str):
        raise ValueError(f"a turn is from {cut(repr(turn['from']))}; expected human or gpt, and a text as its value")
    parts: list[dict[str, str]] = []
    for piece in re.split(f"({PLACEHOLDER})", text):
        if piece == PLACEHOLDER:
            parts.append({"type": "image"})
        elif piece.strip():
            parts.append(_text(piece.strip()))
    return _message(role, parts)


def _of_trl(turn: Any) -> Message:
    role, content = ROLES.get(turn["role"]), turn["content"]
    if role is None:
        raise ValueError(f"a message has the role {cut(repr(turn['role']))}; expected user, assistant or system")
    if isinstance(content, str):
        return _message(role, [_text(content)])
    parts = []
    for part in content:
        if part["type"] not in ("image", "text"):
            raise ValueError(f"a part of type {cut(repr(part['type']))}; expected image or text")
        parts.append(_text(part["text"]) if part["type"] == "text" else {"type": "image"})
    return _message(role, parts)


def _message(role: str, parts: list[Any]) -> Message:
    return {"role": role, "content": parts}


def _text(text: Any) -> dict[str, str]:
    if not isinstance(text, str):
        raise ValueError(f"{cut(repr(text))} is no text")
    return {"type": "text", "text": text}
