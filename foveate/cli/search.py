"""``foveate search``: plans for methods that need a calibration set."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..chat import make_inputs
from ..errors import InputError
from ..images import open_picture
from ..loading import load_model
from ..methods.base import Method
from ..tuning.search import Plan, g_search, head_mask, p_sigmoid_search
from ..viz.overlay import make_folder


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
    try:
        lines = [line for line in path.read_text().splitlines() if line.strip()]
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    found = []
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
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


def said(text: str, answer: str) -> bool:
    """Whether a text is the answer or begins with its words, whatever the case."""
    found, wanted = (re.findall(r"\w+", each.lower()) for each in (text, answer))
    return found[: len(wanted)] == wanted


def check_search(method: str, out: Path, share: float) -> None:
    """Raise ``InputError`` before anything is loaded where a search cannot begin or its plan cannot be written."""
    if method not in ("g-search", "p-sigmoid", "yopo"):
        raise InputError(f"there is no search for {method!r}; choose g-search, p-sigmoid or yopo")
    if share <= 0:
        raise InputError(f"share={share}; expected a share of the heads above 0")
    if out.is_dir():
        raise InputError(f"{out} is a folder; give the name of a file")
    make_folder(out.parent)


class Calibration:
    """A calibration set for a model: examples of a file, or questions about validation scenes of the pocket world."""

    def __init__(self, model: str | None, data: Path | None, number: int) -> None:
        if data is None and model is not None:
            raise InputError("a model of your own is searched on data of your own: give --data, a JSON-lines file of examples")
        examples = read_examples(data)[:number] if data is not None else None
        self.model, self.processor = load_model(model)
        self.name = "validation scenes of the pocket world" if data is None else str(data)
        self.accuracy: Callable[[Method], float]
        if examples is None:
            from ..lab.exam import Asker
            from ..lab.testset import TestSet

            asker = Asker(self.model, TestSet.draw(-(-number // 2), 77, "validation"), 2, 77)
            asker.asked = asker.asked[:number]
            self._inputs: Callable[[], Iterator[dict[str, Any]]] = lambda: (asker.inputs([each]) for each in asker.asked)
            self.accuracy = lambda method: sum(asker.run(method)["right"]) / len(asker.asked)
            return
        prompts = [make_inputs(self.processor, self.model, open_picture(e.image).image, e.question)[0] for e in examples]
        self._inputs = lambda: iter(prompts)
        self.accuracy = lambda method: self._answered(method, prompts, [e.answer for e in examples])

    def _answered(self, method: Method, prompts: list[dict[str, Any]], answers: list[str]) -> float:
        """Share of the answers that begin with the expected one, whatever the case."""
        right = 0
        with method(self.model):
            for inputs, answer in zip(prompts, answers, strict=True):
                out = self.model.generate(**inputs, do_sample=False, max_new_tokens=32)
                text = self.processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
                right += said(text, answer)
        return right / len(prompts)

    def inputs(self) -> Iterator[dict[str, Any]]:
        """Each prompt on its own."""
        return self._inputs()


def run_search(method: str, calibration: Calibration, out: Path, options: dict[str, Any], progress: Callable[[str], None]) -> str:
    """Search, write the plan, and say in one line what was found.

    ``check_search`` has to have passed.
    """
    layers = int(calibration.model.config.get_text_config().num_hidden_layers)
    plan: Plan
    if method == "yopo":
        mask = head_mask(calibration.model, calibration.inputs(), options["share"])
        out.write_text(json.dumps({"method": method, "data": calibration.name, "heads": mask}, indent=1) + "\n")
        kept = sum(map(sum, mask)) / sum(map(len, mask))
        return f"{kept:.0%} of the heads take part in visual tokens"
    if method == "g-search":
        plan = g_search(calibration.accuracy, layers, epsilon=options["epsilon"], steps=options["steps"], progress=progress)
    else:
        plan = p_sigmoid_search(calibration.accuracy, layers, options["budget"], progress=progress)
    plan.settings["data"] = calibration.name
    plan.save(out)
    rates = " ".join(f"{rate:.0%}" for rate in plan.rates)
    return f"keep rates {rates}: {plan.mean:.1%} on average, accuracy {plan.accuracy:.1%} of {plan.full:.1%}"
