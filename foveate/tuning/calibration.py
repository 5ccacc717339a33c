"""A calibration set for a model: what searches measure accuracy on."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..chat import make_inputs
from ..errors import InputError
from ..images import check_regular, open_picture
from ..jsonl import parsed
from ..lab.exam import WORDS, Asker, said
from ..lab.testset import TestSet
from ..loading import Loaded
from ..methods.base import Method
from ..pictures import Pictures

SEED = 77  # of the validation scenes
EACH = 2  # questions about each of them


@dataclass(frozen=True)
class Example:
    """One line of a calibration file."""

    image: Path
    question: str
    answer: str


def read_examples(path: Path) -> list[Example]:
    """Examples of a JSON-lines file with ``image``, ``question`` and ``answer``; pictures relative to the file.

    Raises
    ------
    InputError : the file cannot be read, or a line is not such an example.
    """
    check_regular(path, "file of examples")
    try:
        lines = [line for line in path.read_text().splitlines() if line.strip()]
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{path} is no file of JSON lines: {error}") from error
    found = []
    for number, line in enumerate(lines, 1):
        try:
            entry = parsed(line)
            if not re.search(r"\w", str(entry["answer"])):
                raise ValueError("the answer is empty")
            found.append(Example(path.parent / entry["image"], str(entry["question"]), str(entry["answer"])))
        except (ValueError, KeyError, TypeError) as error:
            wanted = '{"image": "a.jpg", "question": "...", "answer": "..."}'
            raise InputError(
                f"line {number} of {path} is no example ({type(error).__name__}: {error}); expected {wanted}"
            ) from error
    if not found:
        raise InputError(f"{path} holds no examples")
    return found


class Calibration:
    """Questions with answers, for a model. Pictures are encoded once.

    Parameters
    ----------
    loaded : the model.
    examples : the user's own; None = validation scenes of the pocket world.
    number : of them, at most.
    name : of the set, for the plan.
    """

    def __init__(self, loaded: Loaded, examples: list[Example] | None, number: int, name: str) -> None:
        self.loaded, self.name = loaded, name
        self.layers = int(loaded.model.config.get_text_config().num_hidden_layers)
        self._asker: Asker | None = None
        self._prompts: list[dict[str, Any]] = []
        if examples is None:
            scenes = TestSet.draw(-(-number // EACH), SEED, "validation").picked(EACH, SEED)
            self._asker = Asker(loaded, scenes)
            self._asker.asked = self._asker.asked[:number]
            return
        self._examples = examples[:number]
        for example in self._examples:
            inputs, _ = make_inputs(loaded.processor, loaded.model, open_picture(example.image).image, example.question)
            self._prompts.append(Pictures(loaded.model, **inputs).inputs)

    def accuracy(self, method: Method) -> float:
        """Share of the answers that are right with a method attached, in [0, 1]."""
        if self._asker is not None:
            return float(self._asker.run(method).right.mean())
        right, model, processor = 0, self.loaded.model, self.loaded.processor
        with method(model):
            for inputs, example in zip(self._prompts, self._examples, strict=True):
                out = model.generate(**inputs, do_sample=False, max_new_tokens=WORDS)
                text = processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
                right += said(text, example.answer)
        return right / len(self._prompts)

    def prompts(self) -> Iterator[dict[str, Any]]:
        """Each prompt on its own."""
        if self._asker is None:
            yield from self._prompts
        else:
            yield from (self._asker.inputs([each]) for each in self._asker.asked)
