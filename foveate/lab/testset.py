"""Test sets of the pocket world: scenes with their questions, a function of a seed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..pocket.questions import PocketQuestion, exam
from ..pocket.scenes import LEVELS, Scene, draw_scene

SEED = 2403


@dataclass(frozen=True)
class TestSet:
    """Scenes of one split with their questions; a function of (number, seed, split)."""

    __test__ = False  # for pytest

    scenes: list[Scene]
    questions: list[list[PocketQuestion]]

    @classmethod
    def draw(cls, number: int, seed: int = SEED, split: str = "test") -> TestSet:
        """``number`` scenes, a third of them plain, medium and crowded."""
        scenes, questions = [], []
        for i in range(number):
            random = Random(f"{split}/{seed}/{i}")
            scenes.append(draw_scene(random, split=split, level=i % len(LEVELS)))
            questions.append(exam(scenes[-1], random))
        return cls(scenes, questions)

    def chunks(self, size: int) -> Iterator[slice]:
        for start in range(0, len(self.scenes), size):
            yield slice(start, min(start + size, len(self.scenes)))

    def column(self, pick: Callable[[int, PocketQuestion], Any]) -> NDArray[Any]:
        """One value per question, scene by scene."""
        return np.array([pick(i, q) for i, asked in enumerate(self.questions) for q in asked])

    def picked(self, each: int, seed: int) -> TestSet:
        """The same scenes with ``each`` of their questions, at most, chosen at random."""
        random = Random(f"ask/{seed}")
        some = [sorted(random.sample(range(len(asked)), min(each, len(asked)))) for asked in self.questions]
        return TestSet(self.scenes, [[asked[i] for i in chosen] for asked, chosen in zip(self.questions, some, strict=True)])

    @property
    def asked(self) -> list[tuple[int, PocketQuestion]]:
        """Scene and question, one by one."""
        return [(number, question) for number, asked in enumerate(self.questions) for question in asked]
