"""Remembers encoded pictures: every turn of a conversation brings those of the turns before it again."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...methods.base import Method


@dataclass(frozen=True)
class RememberedPicture:
    """An encoded picture or video.

    Attributes
    ----------
    part : of a message, that vLLM gets.
    before, after : visual tokens.
    frames : of a video, those of each frame that stay.
    """

    part: dict[str, Any]
    before: int
    after: int
    frames: list[int] | None = None

    def usage(self) -> dict[str, Any]:
        """What clients are told of it."""
        told: dict[str, Any] = {"visual_tokens": self.after, "visual_tokens_before": self.before}
        return told if self.frames is None else {**told, "frames": self.frames}

    @property
    def bytes(self) -> int:
        """On the wire."""
        return _length(self.part)


class Memory:
    """Pictures that were encoded lately, by their contents and the method; the one that was not asked for longest goes first.

    Parameters
    ----------
    size : bytes that they may take; 0 remembers none.
    apart : whether a picture is encoded alone as it is with others; where it is not, pictures are known as they came together.
    """

    def __init__(self, size: int, apart: bool = True) -> None:
        self.size, self.apart, self.held = size, apart, 0
        self._found: OrderedDict[str, RememberedPicture] = OrderedDict()

    def keys(self, pictures: Sequence[bytes | Sequence[Any]], method: Method) -> list[str]:
        """By what pictures are known; none where their tokens also depend on the question.

        A picture is its contents; of a video, all contents and all that says how it is read.
        """
        if not self.size or method.before_decoder().reads_question:
            return []
        # by what it is: two methods of one name have other settings
        told = repr(sorted(method.settings().items()))
        contents = [_digest(data) for data in pictures]
        if self.apart:
            return [_key(told, each) for each in contents]
        return [_key(told, *contents, str(place)) for place in range(len(contents))]

    def get(self, keys: Sequence[str]) -> list[RememberedPicture] | None:
        """The pictures, if all of them are known."""
        if not keys or any(key not in self._found for key in keys):
            return None
        for key in keys:
            self._found.move_to_end(key)
        return [self._found[key] for key in keys]

    def add(self, keys: Sequence[str], pictures: Sequence[RememberedPicture]) -> None:
        """Remember pictures, in place of older ones."""
        for key, picture in zip(keys, pictures, strict=True):
            if key in self._found:
                self.held -= self._found.pop(key).bytes
            self._found[key] = picture
            self.held += picture.bytes
        while self.held > self.size:
            self.held -= self._found.popitem(last=False)[1].bytes


def _digest(value: Any) -> str:
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()
    # named, so that no picture is known as a video: its contents may be any bytes, also those that a video is known by
    return "video " + _key(*(_digest(each) if isinstance(each, bytes) else repr(each) for each in value))


def _key(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _length(value: Any) -> int:
    """Characters of the texts in a part of a message, which are embeddings but for a few."""
    return sum(map(_length, value.values())) if isinstance(value, dict) else len(value)
