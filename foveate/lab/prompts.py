"""Prompts that one method after another answers; their pictures are encoded once, as far as memory for them is set aside."""

from __future__ import annotations

import functools
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..chat import Prompt, collate
from ..loading import Loaded
from ..methods.base import Method
from ..pictures import Pictures

WINDOW = 8  # chunks, within which prompts of one shape are put together
HELD = 2**30  # bytes of encoded pictures that are kept for the next method, where nobody tells how much memory is free
SHARE = 4  # of the free memory, what part of it may be kept


@dataclass(frozen=True)
class Part:
    """What was answered of prompts that ran together.

    Attributes
    ----------
    numbers : of the prompts.
    texts : the answers.
    before : visual tokens of these prompts without reduction.
    layers : visual tokens of these prompts in each decoder layer.
    """

    numbers: tuple[int, ...]
    texts: list[str]
    before: int
    layers: list[int]


class Prompts:
    """Prompts by number.

    Parameters
    ----------
    loaded : any supported model.
    shapes : of each prompt, as ``Prompt.shape``; only prompts of one shape run together.
    prompt : makes one.
    chunk : prompts at a time.
    longest : new tokens of an answer.
    """

    def __init__(
        self,
        loaded: Loaded,
        shapes: Sequence[tuple[bool, bool]],
        prompt: Callable[[int], Prompt],
        chunk: int = 16,
        longest: int = 32,
    ) -> None:
        self.loaded, self.prompt, self.longest = loaded, prompt, longest
        self.parts = [*_parts(shapes, chunk)]
        self._kept: dict[tuple[int, ...], tuple[Pictures, dict[str, Any]]] = {}
        self._sizes: dict[tuple[int, ...], int] = {}
        self._full = False

    @functools.cached_property
    def room(self) -> int:
        """Bytes that encoded pictures may take."""
        return room(self.loaded.model.device)

    def inputs(self, numbers: Iterable[int]) -> dict[str, Any]:
        """Of ``generate``, with pixels, padded on the left."""
        return collate(self.loaded, [self.prompt(number) for number in numbers])

    def encoded(self, numbers: tuple[int, ...]) -> dict[str, Any]:
        """Of ``generate``, with encoded pictures in place of pixels if there is room to keep them."""
        if numbers not in self._kept:
            inputs = self.inputs(numbers)
            if self._full or not any(name.startswith("pixel") for name in inputs):
                return inputs
            pictures = Pictures(self.loaded.model, **inputs)
            self._kept[numbers] = pictures, pictures.inputs
        return self._kept[numbers][1]

    def _weigh(self, numbers: tuple[int, ...]) -> None:
        """Look how much is kept of prompts that a method has read, which records more of them; what is too much goes."""
        if numbers in self._kept:
            self._sizes[numbers] = self._kept[numbers][0].nbytes
            while sum(self._sizes.values()) > self.room:
                self._full = True
                last, _ = self._sizes.popitem()
                del self._kept[last]

    def answers(self, method: Method, parts: Iterable[tuple[int, ...]] | None = None) -> Iterator[Part]:
        """Answer everything, or some of ``parts``, with a method attached.

        Raises
        ------
        InputError, UnsupportedModelError : the method cannot do that.
        """
        model, processor = self.loaded.model, self.loaded.processor
        with method(model) as session:
            for numbers in self.parts if parts is None else parts:
                inputs = self.encoded(numbers)
                out = model.generate(**inputs, max_new_tokens=self.longest, do_sample=False)[:, inputs["input_ids"].shape[1] :]
                self._weigh(numbers)
                texts = [text.strip() for text in processor.batch_decode(out, skip_special_tokens=True)]
                yield Part(numbers, texts, sum(session.report.before), session.report.layers)


def room(device: torch.device) -> int:
    """Bytes that encoded pictures may take on a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0]) // SHARE
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") // SHARE
    except (AttributeError, OSError, ValueError):  # not on this system
        return HELD


def _parts(shapes: Sequence[tuple[bool, bool]], chunk: int) -> Iterator[tuple[int, ...]]:
    """Numbers of prompts that run together: at most ``chunk`` of one shape, which are not far from each other."""
    for begin in range(0, len(shapes), WINDOW * chunk):
        alike: dict[tuple[bool, bool], list[int]] = defaultdict(list)
        for number in range(begin, min(begin + WINDOW * chunk, len(shapes))):
            alike[shapes[number]].append(number)
        for numbers in alike.values():
            for first in range(0, len(numbers), chunk):
                yield tuple(numbers[first : first + chunk])
