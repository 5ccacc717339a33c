"""Questions of one's own about one's own pictures and videos, as JSON lines, and how a model does on them."""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..chat import Prompt, media_words, question_about, takes_videos
from ..errors import FoveateError, InputError, first_line
from ..fingerprint import digest
from ..loading import Loaded
from ..methods.base import KeepAll, Method
from ..places import user_path
from ..pocket.worlds import world_of
from ..serving.batch.rows import AnswerSettings, Row, RowPlace, Source, contents, opened
from ..serving.encoding import pictures_of
from ..video import Video, open_video
from .exam import Result, as_shown
from .prompts import Prompts
from .runner import Outcome, Runner
from .scores import Scores
from .scoring import Score
from .store import Store
from .testset import TestSet

WANTED = '{"image": "a.jpg", "question": "...", "answer": "..."}'
FRAMES = 8  # of a video
NAMED = 3  # lines that a message names


@dataclass(frozen=True)
class Example:
    """A question, and what is right.

    Attributes
    ----------
    line : of the file.
    prompt : makes the prompt; it opens the pictures, or the video.
    shape : of the prompt.
    answers : that are right; empty where the file does not say.
    kind : the row's "kind": what tables group by.
    group : a digest of its pictures; examples about the same ones belong together.
    digest : of all that the answer depends on.
    document : the line.
    """

    line: int
    prompt: Callable[[], Prompt]
    shape: tuple[bool, bool]
    answers: tuple[str, ...]
    kind: str
    group: str
    digest: str
    document: dict[str, Any]


@dataclass(frozen=True)
class Examples:
    """All examples of a file that can be used.

    Attributes
    ----------
    path : of the file.
    items : the examples.
    skipped : why others cannot be used, by line.
    left : rows that were not read, since there are more than were asked for.
    unused : rows that say how they are answered (method, budget, length), which counts for ``foveate batch`` alone.
    """

    path: Path
    items: list[Example]
    skipped: dict[int, str]
    left: int = 0
    unused: int = 0

    @property
    def digest(self) -> str:
        """Of all of them."""
        return digest(*(item.digest + str(item.answers) for item in self.items))

    @property
    def answered(self) -> bool:
        """Whether the file says what is right."""
        return bool(self.items[0].answers)

    def notes(self) -> list[str]:
        """What was left out."""
        found = [f"{self.left} further rows are not used"] if self.left else []
        if self.unused:
            found.append(
                f"{self.unused} rows name a method, a budget or a length of the answer, which counts for foveate batch alone"
            )
        if not self.skipped:
            return found
        first = "; ".join(f"line {line}: {why}" for line, why in [*self.skipped.items()][:NAMED])
        return [
            *found,
            f"{len(self.skipped)} of {len(self.items) + len(self.skipped)} rows cannot be used and are left out ({first})",
        ]


def read_examples(
    path: Path,
    loaded: Loaded,
    frames: int = FRAMES,
    limit: int | None = None,
    tell: Callable[[int, int], None] = lambda *_: None,
    seed: int | None = None,
) -> Examples:
    """Examples of a file of JSON lines: rows as ``foveate batch`` takes them, with ``answer`` or ``answers``, or without.

    A row may have a ``video`` in place of pictures, and a ``kind``, by which tables group. Rows that cannot be used are left out
    and counted.

    Parameters
    ----------
    path : of the file; places of pictures and videos are relative to it.
    loaded : the model.
    frames : of a video.
    limit : of rows that are read.
    tell : is told how many rows were read, of how many.
    seed : of which rows are read, where there are more than ``limit``; None = the first ones.

    Raises
    ------
    InputError : the file cannot be read, no row can be used, or some have answers and others have none.
    """
    source, items, skipped, unused = Source(user_path(path)), [], {}, 0
    every = source.lines()
    places = every[:limit]
    if seed is not None and len(places) < len(every):
        places = sorted(Random(f"rows/{seed}").sample(every, len(places)), key=lambda place: place.number)
    for number, place in enumerate(places):
        tell(number, len(places))
        try:
            example, plain = _example(source, place, loaded, frames)
            items.append(example)
            unused += not plain
        except FoveateError as error:
            skipped[place.number] = first_line(error)
    if not items:
        raise InputError(f"none of the {len(places)} rows of {path} can be used. Line {min(skipped)}: {skipped[min(skipped)]}")
    missing = [item.line for item in items if not item.answers]
    if missing and len(missing) < len(items):
        lines = ", ".join(map(str, missing[:NAMED])) + (" ..." if len(missing) > NAMED else "")
        raise InputError(
            f"{len(missing)} of {len(items)} rows of {path} have no answer (lines {lines}). Give all rows an 'answer', or none: "
            "then the model's own answers with all tokens are what others are compared with."
        )
    return Examples(source.path, items, skipped, len(every) - len(places), unused)


def drawn_examples(loaded: Loaded, number: int, seed: int, split: str = "validation") -> Examples:
    """Questions about drawn scenes of the world of a pocket model, one about each.

    Raises
    ------
    InputError : it is no pocket model.
    """
    world = world_of(loaded.processor)
    if world is None:
        raise InputError("scenes of the pocket world are for the pocket models. Give --data, a file of examples of your own.")
    draw: Callable[..., TestSet[Any]] = TestSet.draw_native if world == "native" else TestSet.draw
    data = draw(number, seed, split).picked(1, seed)
    items = []
    for index, (scene, question) in enumerate(data.asked):
        shown, named = as_shown(data.scenes[scene]), digest(world, split, str(seed), str(number), str(scene))
        make = functools.partial(question_about, loaded.processor, loaded.model, shown, question.text)
        document = {"question": question.text, "answer": question.answer, "kind": question.family}
        shape = (not isinstance(shown, Video), isinstance(shown, Video))
        mine = digest(named, question.text)
        items.append(Example(index + 1, make, shape, (question.answer,), question.family, named, mine, document))
    return Examples(Path(f"{split} scenes of the pocket world (seed {seed})"), items, {})


def _example(source: Source, place: RowPlace, loaded: Loaded, frames: int) -> tuple[Example, bool]:
    """A row, and whether it says nothing of how it is answered."""
    row, document = source.read_document(place, AnswerSettings())
    plain = row.wanted == AnswerSettings()
    answers = _answers(document)
    kind = document.get("kind", "")
    if not isinstance(kind, str):
        raise InputError("'kind' is no text")
    video = document.get("video")
    if video is not None:
        if not isinstance(video, str) or pictures_of(row.messages):
            raise InputError("'video' is the path of a file, and a row with one has no pictures")
        path = source.path.parent / video
        group = digest("video", str(frames), contents(path))

        def shown() -> Prompt:
            found = open_video(path, frames)
            return question_about(loaded.processor, loaded.model, found, document["question"])

        shape = (False, True) if takes_videos(loaded.processor, loaded.model) else (True, False)
        shown()  # what cannot be opened is known before anything is computed
        return Example(place.number, shown, shape, answers, kind, group, digest(row.digest, group), document), plain
    prompt = opened(row, media_words(loaded.processor))
    if not prompt.images:
        raise InputError("there is no picture, so that nothing can be reduced")
    group = digest(*(image.tobytes() for image in prompt.images))
    made = _opener(row, media_words(loaded.processor))
    return Example(place.number, made, prompt.shape, answers, kind, group, row.digest, document), plain


def _opener(row: Row, reserved: Sequence[str]) -> Callable[[], Prompt]:
    return lambda: opened(row, reserved)


def _answers(document: dict[str, Any]) -> tuple[str, ...]:
    found = document.get("answers", document.get("answer"))
    if found is None:
        return ()
    each = found if isinstance(found, list) else [found]
    if not each or not all(isinstance(one, str | int | float) and re.search(r"\w", str(one)) for one in each):
        raise InputError(f"an answer is empty or no text; expected {WANTED}")
    return tuple(str(one) for one in each)


class OwnQuestions:
    """Examples as a model answers them.

    Parameters
    ----------
    loaded : the model.
    examples : that it is asked.
    score : how right an answer is.
    chunk : prompts at a time.
    longest : new tokens of an answer.
    """

    def __init__(self, loaded: Loaded, examples: Sequence[Example], score: Score, chunk: int = 8, longest: int = 32) -> None:
        self.loaded, self.examples, self.score = loaded, [*examples], score
        shapes = [example.shape for example in self.examples]
        self.prompts = Prompts(loaded, shapes, lambda number: self.examples[number].prompt(), chunk, longest)

    @property
    def groups(self) -> NDArray[np.int64]:
        """[N] a number for each example; those about the same pictures have the same."""
        names = {group: number for number, group in enumerate(dict.fromkeys(example.group for example in self.examples))}
        return np.array([names[example.group] for example in self.examples])

    def judged(self, number: int, text: str) -> float:
        """How right a text is as the answer of an example."""
        example = self.examples[number]
        return self.score(text, example.answers, example.document)

    def run(self, method: Method) -> Result:
        """Answer everything with a method attached; ``right`` is from 0 to 1.

        Raises
        ------
        InputError, UnsupportedModelError : the method cannot do that.
        """
        right = np.zeros(len(self.examples))
        layers = np.zeros(int(self.loaded.model.config.get_text_config().num_hidden_layers))
        for part in self.prompts.answers(method):
            for number, text in zip(part.numbers, part.texts, strict=True):
                right[number] = self.judged(number, text)
            layers += part.layers
        return Result(right, [], (layers / len(self.examples)).tolist())


def with_reference(examples: Sequence[Example], texts: Sequence[str]) -> list[Example]:
    """Examples whose right answers are ``texts``."""
    return [replace(example, answers=(text,)) for example, text in zip(examples, texts, strict=True)]


class OwnRunner(Runner):
    """The runner of tables, on examples of one's own.

    Parameters
    ----------
    examples : that methods answer. Where they say nothing of what is right, the model's own answers with all tokens are.
    score, scored : how right an answer is: as a function, and what it is called.
    store : file of results so far; None = none.
    model : that is asked.
    chunk : prompts at a time.
    longest : new tokens of an answer.
    """

    world = None
    shares = True

    def __init__(  # of the other runner nothing is wanted but what it does with answers
        self, examples: Examples, score: Score, scored: str, store: Path | None, model: Loaded, chunk: int = 8, longest: int = 32
    ) -> None:
        from .. import __version__

        self.loaded = model
        data = {
            "name": examples.path.name,
            "digest": examples.digest,
            "score": scored,
            "right": "the answers of the data" if examples.answered else "the model's own answers with all tokens",
        }
        setting = {"data": data, "seed": None, "longest": longest, "foveate": __version__}
        own = OwnQuestions(model, examples.items, score, chunk, longest)
        number = int(own.groups.max()) + 1
        self.setting = {**setting, "scenes": number, "model": model.name, "weights": model.weights}
        self.store = Store(store, self.setting)
        self.scores = Scores.grouped(np.array([item.kind or "all" for item in examples.items]), own.groups, number)
        if not examples.answered:
            texts = [text for part in own.prompts.answers(KeepAll()) for text in part.texts]
            own.examples = with_reference(examples.items, texts)
        self.questions = own

    def parts(self, outcome: Outcome) -> dict[str, tuple[float, float, float]]:
        """Accuracies with intervals of examples with pictures and with videos, where there are both."""
        clips = np.array([example.shape[1] for example in self.questions.examples])
        if not clips.any() or clips.all():
            return {}
        masks = {"pictures": ~clips, "videos": clips}
        return {name: self.scores.part(mask).interval(outcome.right[mask]) for name, mask in masks.items()}

    def _answer(self, method: Method) -> dict[str, Any]:
        begin = time.perf_counter()
        result = self.questions.run(method)
        return {"right": result.right.tolist(), "layers": result.layers, "seconds": time.perf_counter() - begin}
