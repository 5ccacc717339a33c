"""One question answered with all visual tokens and with some methods: what the page of the playground shows, without the page."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..answering import Answer, ask, frame_counts, limits, open_shown, title, unknown
from ..chat import AS_PICTURES, make_inputs, takes_videos
from ..errors import FoveateError, InputError, first_line
from ..heads import opening
from ..images import formats, reading
from ..loading import SPREAD, Loaded, load
from ..methods.base import KeepAll, Method
from ..methods.registry import get
from ..video import ANIMATED, SUFFIXES, Video
from ..viz.frames import first_as_seen, frames_as_seen

MOST = 3  # methods beside all tokens
LONGEST = 1000  # characters of a question
PIXELS = 12_000_000  # of a picture
FRAMES = 8  # of a clip
NEW_TOKENS = 64  # of an answer
ROUNDS = 5  # in which all ways answer, at most; times are the medians
PATIENCE = 2.0  # seconds after which no further round begins

Shown = Image.Image | Video


@dataclass(frozen=True)
class Choice:
    """A method and its budget.

    Attributes
    ----------
    name : as ``foveate.methods()`` lists it.
    share : of the visual tokens to keep, above 0 up to 1; None = the method's own rule.
    """

    name: str
    share: float | None = None

    def method(self) -> Method:
        """The method.

        Raises
        ------
        InputError : there is no such method, or it has no rule of its own and no share is given.
        """
        return get(self.name, budget=self.share)

    @property
    def label(self) -> str:
        return self.name + (", its own rule" if self.share is None else f", {self.share:.0%} kept")


@dataclass(frozen=True)
class Outcome:
    """What one way of answering gave: an answer, or a problem in words."""

    label: str
    answer: Answer | None
    problem: str = ""


@dataclass(frozen=True)
class Comparison:
    """Answers to one question.

    Attributes
    ----------
    question : as it was asked.
    frames : the picture, or the frames of a clip, as the encoder saw them.
    seconds : when each frame of a clip is shown; empty for a picture.
    outcomes : all tokens first, then the methods in the order of the choices.
    counts : for each outcome, visual tokens before and after of each frame; empty for pictures and problems.
    notes : what its reader should know.
    """

    question: str
    frames: list[Image.Image]
    seconds: list[float]
    outcomes: list[Outcome]
    counts: list[list[dict[str, float]]]
    notes: list[str]


class Playground:
    """Models that questions are put to, one question at a time: times would say nothing otherwise.

    Parameters
    ----------
    names : of the models, as ``foveate.loading.load`` takes them.

    Raises
    ------
    InputError : a model cannot be loaded.
    UnsupportedModelError : it is of a family that is not supported.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.models: dict[str, Loaded] = {}
        for name in names:
            loaded = load(name, device=SPREAD)
            with KeepAll()(loaded.model):  # which raises where a model is not supported
                pass
            self.models[name] = loaded
        self._turn = threading.Lock()

    def loaded(self, name: str) -> Loaded:
        """The model of a name.

        Raises
        ------
        InputError : there is no such model here.
        """
        if name not in self.models:
            raise InputError(f"there is no model {name!r} here. Choose one of {', '.join(self.models)}.")
        return self.models[name]

    def compare(self, model: str, shown: Shown | None, question: str, choices: Sequence[Choice]) -> Comparison:
        """Answer with all visual tokens and with each method. What a method cannot do is a problem of its outcome.

        Parameters
        ----------
        model : its name.
        shown : a picture or a clip.
        question : about it.
        choices : one to three methods.

        Raises
        ------
        InputError : there is no picture, no question, no method or too many, or the model cannot use the picture.
        """
        question = " ".join(question.split())
        if shown is None:
            raise InputError("there is no picture. Load one, or draw a scene.")
        if not question:
            raise InputError("the question is empty. Type what you want to know about the picture.")
        if len(question) > LONGEST:
            raise InputError(f"the question has {len(question)} characters; at most {LONGEST} are taken.")
        if not 1 <= len(choices) <= MOST:
            raise InputError(f"{len(choices)} methods are chosen. Choose one to {MOST}.")
        loaded = self.loaded(model)
        with self._turn:
            return _compare(loaded, shown, question, choices)


def _compare(loaded: Loaded, shown: Shown, question: str, choices: Sequence[Choice]) -> Comparison:
    model, processor = loaded.model, loaded.processor
    inputs, note = make_inputs(processor, model, shown, question)
    video = shown if isinstance(shown, Video) else None
    first = shown.frames[0] if isinstance(shown, Video) else shown
    notes = [*(video.notes if video else ()), *([note] if note else []), *unknown(loaded, first, question)]
    notes += [AS_PICTURES] if video and not takes_videos(processor, model) else []
    ask(model, processor, inputs, None, new_tokens=1)  # warms up, so that all are timed alike
    outcomes = _timed(loaded, inputs, [None, *choices])
    notes += limits(model, {each.label: each.answer for each in outcomes if each.answer})
    reports = [each.answer.report if each.answer else None for each in outcomes]
    return Comparison(
        question,
        frames_as_seen(inputs, processor, video.frames) if video else [first_as_seen(inputs, processor, first)],
        [*video.seconds] if video else [],
        outcomes,
        [frame_counts(video, report) if video and report else [] for report in reports],
        [*dict.fromkeys(notes)],
    )


def _timed(loaded: Loaded, inputs: dict[str, Any], ways: Sequence[Choice | None]) -> list[Outcome]:
    """Answers whose times are medians of rounds. In each round all ways run, so that what slows the machine meets all of them."""
    begin = time.perf_counter()
    outcomes = [_outcome(loaded, inputs, way) for way in ways]
    rounds = [outcomes]
    while len(rounds) < ROUNDS and time.perf_counter() - begin < PATIENCE:
        again = [_outcome(loaded, inputs, way) if known.answer else known for way, known in zip(ways, outcomes, strict=True)]
        rounds.append(again)
    found = []
    for outcome, each in zip(outcomes, zip(*rounds, strict=True), strict=True):
        answers = [one.answer for one in each if one.answer]
        if outcome.answer:
            prefill, seconds = (statistics.median(times) for times in zip(*((a.prefill, a.seconds) for a in answers), strict=True))
            outcome = replace(outcome, answer=replace(outcome.answer, prefill=prefill, seconds=seconds))
        found.append(outcome)
    return found


def _outcome(loaded: Loaded, inputs: dict[str, Any], choice: Choice | None) -> Outcome:
    """An answer; what a method raises, also one of somebody else's, is told in its place."""
    label = title("full") if choice is None else choice.label
    try:
        method = None if choice is None else choice.method()
        answer = ask(loaded.model, loaded.processor, inputs, method, new_tokens=NEW_TOKENS)
    except FoveateError as error:
        return Outcome(label, None, str(error))
    except (MemoryError, torch.OutOfMemoryError):
        return Outcome(label, None, "there is not enough memory for this. Take a smaller picture, or a smaller model.")
    except Exception as error:
        return Outcome(label, None, f"{type(error).__name__}: {first_line(error)}")
    return Outcome(label, answer)


def open_upload(path: Path) -> tuple[Shown, list[str]]:
    """A picture, or frames of a clip (a film, or a moving GIF, WebP or PNG), that somebody uploaded; and notes on it.

    Raises
    ------
    InputError : it is neither, it is damaged, or it has too many pixels.
    MissingExtraError : it is a film, and PyAV is not installed.
    """
    try:
        return open_shown(path, FRAMES if _moves(path) else None)
    except InputError as error:  # which names the place that it was uploaded to
        raise InputError(str(error).replace(str(path), path.name)) from error


def _moves(path: Path) -> bool:
    """Whether a file is a clip."""
    if path.suffix.lower() in SUFFIXES:
        return True
    with reading(path), opening(path, formats()) as opened:
        if opened.width * opened.height > PIXELS:
            size = f"{opened.width} x {opened.height} pixels"
            raise InputError(f"{path.name} is {size}; at most {PIXELS:,} pixels are taken here. Scale it down first.")
        return opened.format in ANIMATED and getattr(opened, "n_frames", 1) > 1
