"""``foveate demo``: the pocket model answers about three scenes, with all visual tokens and with a fraction of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from PIL import Image

from ..answering import Answer, ask
from ..chat import make_inputs
from ..errors import InputError
from ..loading import load_model
from ..methods.base import Method
from ..methods.registry import get
from ..pocket.questions import PocketQuestion, exam
from ..pocket.scenes import LEVELS, Scene, draw_scene
from ..viz.overlay import as_seen, picture_file, save_figure

SEED = 7
BUDGET = 144  # tokens for methods that have no rule of their own


@dataclass(frozen=True)
class Shown:
    """One scene of the demo."""

    level: str
    question: str
    expected: str
    answers: dict[str, Answer]
    scene: Path
    picture: Path

    def to_dict(self) -> dict[str, Any]:
        return {
            "level": self.level,
            "question": self.question,
            "expected": self.expected,
            "answers": {name: answer.text for name, answer in self.answers.items()},
            "visual_tokens": {name: answer.visual_tokens for name, answer in self.answers.items()},
            "layers": {name: answer.layers for name, answer in self.answers.items()},
            "prefill_seconds": {name: answer.prefill for name, answer in self.answers.items()},
            "prefill_flops": {name: answer.flops for name, answer in self.answers.items()},
            "scene": str(self.scene),
            "picture": str(self.picture),
        }


def with_a_budget(name: str) -> Method:
    """A method with its own rule, or with ``BUDGET`` tokens where it has none."""
    try:
        return get(name)
    except InputError:
        return get(name, budget=BUDGET)


def pick_scene(level: int, seed: int) -> tuple[Scene, PocketQuestion]:
    """A scene of the test split of a level, and one question about it."""
    random = Random(f"demo/{seed}/{level}")
    wanted = ("color", "where", "word")[level % 3]
    while True:
        scene = draw_scene(random, split="test", level=level)
        matching = [question for question in exam(scene, random) if question.family == wanted]
        if matching:
            return scene, matching[0]


def run_demo(folder: Path, seed: int, methods: dict[str, Method], progress: Callable[[str], None]) -> list[Shown]:
    """Draw three scenes from plain to crowded, answer one question about each with all tokens and with each method, and save a
    picture of each.
    """
    kept_files = [picture_file(folder / f"kept-{level + 1}-{name}.png") for level, name in enumerate(LEVELS)]
    progress("loading the pocket model")
    model, processor = load_model(None)
    ways: dict[str, Method | None] = {"full": None, **methods}
    shown: list[Shown] = []
    for level, name in enumerate(LEVELS):
        scene, question = pick_scene(level, seed)
        progress(f"{name} scene: {question.text}")
        inputs, _ = make_inputs(processor, model, Image.fromarray(scene.image), question.text)
        if not shown:
            ask(model, processor, inputs, None, new_tokens=2)  # warm-up, so that the first prefill is timed like the others
        answers = {key: ask(model, processor, inputs, method, new_tokens=8, repeats=3) for key, method in ways.items()}
        Image.fromarray(scene.image).save(folder / f"scene-{level + 1}-{name}.png")
        reports = {key: answer.report.images[0] for key, answer in answers.items() if answer.report}
        said = ", ".join(f"{key}: {answer.text}" for key, answer in answers.items())
        title = f"{question.text}   {question.answer}   ({said})"
        layers = {key: answer.layers for key, answer in answers.items()}
        save_figure(as_seen(inputs["pixel_values"][0], processor), reports, kept_files[level], title, layers)
        shown.append(
            Shown(name, question.text, question.answer, answers, folder / f"scene-{level + 1}-{name}.png", kept_files[level])
        )
    return shown
