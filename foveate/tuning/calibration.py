"""A calibration set for a model: what searches measure accuracy on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..lab.exam import Asker
from ..lab.own import OwnQuestions, read_examples
from ..lab.scoring import score_of
from ..lab.testset import TestSet
from ..loading import Loaded
from ..methods.base import Method

SEED = 77  # of the validation scenes
EACH = 2  # questions about each of them


@dataclass(frozen=True)
class Calibration:
    """Questions with answers, for a model. Pictures are encoded once.

    Attributes
    ----------
    loaded : the model.
    questions : that it is asked.
    name : of the set, for the plan.
    """

    loaded: Loaded
    questions: Asker | OwnQuestions
    name: str

    @classmethod
    def of_scenes(cls, loaded: Loaded, number: int) -> Calibration:
        """``number`` questions about validation scenes of the first pocket world."""
        scenes = TestSet.draw(-(-number // EACH), SEED, "validation").picked(EACH, SEED)
        scenes.questions[-1][:] = scenes.questions[-1][: EACH - len(scenes.asked) + number]
        return cls(loaded, Asker(loaded, scenes), "validation scenes of the pocket world")

    @classmethod
    def of_file(cls, loaded: Loaded, path: Path, number: int) -> Calibration:
        """At most ``number`` examples of a file; an answer is right that begins with the words of the one that is given.

        Raises
        ------
        InputError : the file cannot be read, a row cannot be used, or has no answer.
        """
        examples = read_examples(path, loaded, limit=number)
        if examples.skipped:
            line, why = next(iter(examples.skipped.items()))
            raise InputError(f"line {line} of {path} is no example: {why}")
        if not examples.answered:
            raise InputError(f"the rows of {path} have no answers, and a search needs what is right")
        return cls(loaded, OwnQuestions(loaded, examples.items, score_of("begins")), str(path))

    @property
    def layers(self) -> int:
        """Decoder layers."""
        return int(self.loaded.model.config.get_text_config().num_hidden_layers)

    def accuracy(self, method: Method) -> float:
        """Share of the answers that are right with a method attached, in [0, 1]."""
        return float(self.questions.run(method).right.mean())

    def prompts(self) -> Iterator[dict[str, Any]]:
        """Each prompt on its own."""
        prompts = self.questions.prompts
        yield from (prompts.inputs([number]) for part in prompts.parts for number in part)
