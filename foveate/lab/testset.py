"""Test sets of the pocket worlds: scenes with their questions, a function of a seed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..pocket.native import questions as native
from ..pocket.native.clips import Clip, draw_clip, draw_clip_shape
from ..pocket.native.pictures import Picture, draw_picture, draw_size
from ..pocket.questions import PocketQuestion, exam
from ..pocket.scenes import LEVELS, Scene, draw_scene

SEED = 2403
CLIPS = 3 / 8  # of the scenes of the second world
Shown = Scene | Picture | Clip
S = TypeVar("S", bound=Shown)


@dataclass(frozen=True)
class TestSet(Generic[S]):
    """Scenes of one split with their questions; a function of (number, seed, split)."""

    __test__ = False  # for pytest

    scenes: list[S]
    questions: list[list[PocketQuestion]]

    @staticmethod
    def draw(number: int, seed: int = SEED, split: str = "test") -> TestSet[Scene]:
        """``number`` scenes of the first world, a third of them plain, medium and crowded."""
        scenes, questions = [], []
        for i in range(number):
            random = Random(f"{split}/{seed}/{i}")
            scenes.append(draw_scene(random, split=split, level=i % len(LEVELS)))
            questions.append(exam(scenes[-1], random))
        return TestSet(scenes, questions)

    @staticmethod
    def draw_native(number: int, seed: int = SEED, split: str = "test") -> TestSet[Picture | Clip]:
        """``number`` scenes of the second world: five pictures, which come first, for three clips."""
        scenes: list[Picture | Clip] = []
        questions = []
        for i in range(number):
            random = Random(f"native/{split}/{seed}/{i}")
            if i < number - round(CLIPS * number):
                scenes.append(draw_picture(random, draw_size(random), split=split))
            else:
                scenes.append(draw_clip(random, draw_clip_shape(random), split=split))
            questions.append(native.exam(scenes[-1], random))
        return TestSet(scenes, questions)

    def wrong(self) -> TestSet[S]:
        """The same questions, each about another scene of its kind: what can be guessed."""
        kinds = [isinstance(scene, Clip) for scene in self.scenes]
        first = [number for number, clip in enumerate(kinds) if not clip]
        last = [number for number, clip in enumerate(kinds) if clip]
        turned = [*first[1:], *first[:1], *last[1:], *last[:1]]
        return TestSet([self.scenes[number] for number in turned], self.questions)

    def chunks(self, size: int) -> Iterator[slice]:
        for start in range(0, len(self.scenes), size):
            yield slice(start, min(start + size, len(self.scenes)))

    def column(self, pick: Callable[[int, PocketQuestion], Any]) -> NDArray[Any]:
        """One value per question, scene by scene."""
        return np.array([pick(i, q) for i, asked in enumerate(self.questions) for q in asked])

    def picked(self, each: int, seed: int) -> TestSet[S]:
        """The same scenes with ``each`` of their questions, at most, chosen at random."""
        random = Random(f"ask/{seed}")
        some = [sorted(random.sample(range(len(asked)), min(each, len(asked)))) for asked in self.questions]
        return TestSet(self.scenes, [[asked[i] for i in chosen] for asked, chosen in zip(self.questions, some, strict=True)])

    @property
    def asked(self) -> list[tuple[int, PocketQuestion]]:
        """Scene and question, one by one."""
        return [(number, question) for number, asked in enumerate(self.questions) for question in asked]
