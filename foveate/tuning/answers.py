"""Answers of one model to one set of examples with any setting of a method; what was answered once is not asked again."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..fingerprint import digest
from ..lab.own import Example, OwnQuestions
from ..lab.scoring import Score
from ..lab.store import Store, key_of
from ..loading import Loaded
from ..methods.base import KeepAll, Method
from .bounds import Losses


@dataclass(frozen=True)
class Answered:
    """What was answered with one setting.

    Attributes
    ----------
    texts : of the examples asked for, in their order.
    scores : how right each is, in [0, 1].
    tokens : visual tokens on average over decoder layers, of all these examples.
    before : the same without reduction.
    """

    texts: list[str]
    scores: NDArray[np.float64]
    tokens: float
    before: float

    @property
    def share(self) -> float:
        """Of the visual tokens, that decoder layers run."""
        return self.tokens / self.before


class AnswerBook:
    """All answers so far.

    Parameters
    ----------
    loaded : the model.
    examples : in the order in which they are asked.
    score : how right an answer is. Where examples say nothing of that, the answers with all tokens are right.
    store : file of answers; None = none.
    chunk : prompts at a time.
    longest : new tokens of an answer.
    """

    def __init__(
        self, loaded: Loaded, examples: Sequence[Example], score: Score, store: Path | None, chunk: int = 8, longest: int = 32
    ) -> None:
        from .. import __version__

        self.loaded, self.examples = loaded, [*examples]
        self.questions = OwnQuestions(loaded, self.examples, score, chunk, longest)
        setting = {"tuning": 1, "foveate": __version__, "weights": loaded.weights, "longest": longest}
        self.store = Store(store, setting)
        self.own = bool(self.examples and self.examples[0].answers)
        self.groups = self.questions.groups

    @property
    def chunks(self) -> list[tuple[int, ...]]:
        """Examples that are asked together."""
        return self.questions.prompts.parts

    def ask(self, method: Method | None, numbers: Sequence[int]) -> Answered:
        """The answers to some examples; None keeps all tokens.

        Raises
        ------
        InputError, UnsupportedModelError : the method cannot do that.
        """
        if method is not None and not self.own:  # what is right has to be known first
            self.ask(None, numbers)
        key = _name(method)
        names = {number: f"{key}/{self.examples[number].digest}" for number in numbers}
        missing = {number for number in numbers if self.store.get(names[number]) is None}
        parts = [part for part in self.chunks if missing & set(part)]
        for part in self.questions.prompts.answers(method or KeepAll(), parts) if parts else ():
            cost = {"before": part.before / len(part.texts), "tokens": statistics.fmean(part.layers) / len(part.texts)}
            found = {
                f"{key}/{self.examples[number].digest}": {"text": text, **cost}
                for number, text in zip(part.numbers, part.texts, strict=True)
            }
            self.store.put_all(found)
        results = [self._held(names[number]) for number in numbers]
        texts = [str(result["text"]) for result in results]
        scores = np.array([self._judged(number, text) for number, text in zip(numbers, texts, strict=True)])
        tokens, before = (float(np.mean([result[name] for result in results])) for name in ("tokens", "before"))
        return Answered(texts, scores, tokens, before)

    def losses(self, method: Method, numbers: Sequence[int]) -> tuple[Losses, Answered]:
        """What a setting loses on some examples, beside all tokens."""
        found = self.ask(method, numbers)
        full = self.ask(None, numbers)
        return Losses(full.scores - found.scores, self.groups[list(numbers)]), found

    def _held(self, name: str) -> dict[str, Any]:
        found = self.store.get(name)
        if found is None:
            raise KeyError(name)  # nobody asked for it: a fault of ours, and never a wrong score
        return found

    def _judged(self, number: int, text: str) -> float:
        if self.own:
            return self.questions.judged(number, text)
        right = str(self._held(f"{_name(None)}/{self.examples[number].digest}")["text"])
        if right == text:  # also where nothing was said
            return 1.0
        return self.questions.score(text, (right,), self.examples[number].document) if right else 0.0


def _name(method: Method | None) -> str:
    return digest(key_of(method or KeepAll()))
