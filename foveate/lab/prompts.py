"""Prompts that one method after another answers; their pictures are encoded once, as far as memory for them is set aside."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..chat import Prompt, collate
from ..loading import Loaded
from ..methods.base import Method
from ..pictures import Pictures

WINDOW = 8  # chunks, within which prompts of one shape are put together
HELD = 2**30  # bytes of encoded pictures that are kept for the next method


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
        self._encoded: dict[tuple[int, ...], dict[str, Any]] = {}
        self._size = 0

    def inputs(self, numbers: Iterable[int]) -> dict[str, Any]:
        """Of ``generate``, with pixels, padded on the left."""
        return collate(self.loaded, [self.prompt(number) for number in numbers])

    def encoded(self, numbers: tuple[int, ...]) -> dict[str, Any]:
        """Of ``generate``, with encoded pictures in place of pixels if there is room to keep them."""
        if numbers not in self._encoded:
            inputs = self.inputs(numbers)
            if self._size >= HELD or not any(name.startswith("pixel") for name in inputs):
                return inputs
            pictures = Pictures(self.loaded.model, **inputs)
            self._size += 3 * sum(each.nbytes for each in pictures.embeds)  # features, and what is after the projector
            self._encoded[numbers] = pictures.inputs
        return self._encoded[numbers]

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
                texts = [text.strip() for text in processor.batch_decode(out, skip_special_tokens=True)]
                yield Part(numbers, texts, sum(session.report.before), session.report.layers)


def _parts(shapes: Sequence[tuple[bool, bool]], chunk: int) -> Iterator[tuple[int, ...]]:
    """Numbers of prompts that run together: at most ``chunk`` of one shape, which are not far from each other."""
    for begin in range(0, len(shapes), WINDOW * chunk):
        alike: dict[tuple[bool, bool], list[int]] = defaultdict(list)
        for number in range(begin, min(begin + WINDOW * chunk, len(shapes))):
            alike[shapes[number]].append(number)
        for numbers in alike.values():
            for first in range(0, len(numbers), chunk):
                yield tuple(numbers[first : first + chunk])
