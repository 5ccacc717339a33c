"""Transformers with a method attached, as an engine of an offline batch; and how every engine reads rows."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from ...chat import Prompt, collate, media_words
from ...engine.model.anatomy import anatomy
from ...engine.session import Session
from ...errors import InputError, first_line
from ...loading import load
from ...methods.base import Method
from ...methods.saved import named
from .base import Answered, BatchEngine, EngineError, Job
from .offline import answered
from .rows import AnswerSettings, Row, opened

PIXELS = 100_000_000  # of the pictures that are open at once
# the likeliest word each time, whatever the generation config of a model says
PLAIN = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "temperature": None, "top_p": None, "top_k": None}

T = TypeVar("T")
U = TypeVar("U")


def through(items: Sequence[T | Exception], stage: Callable[[list[T]], Sequence[U | Exception]]) -> list[U | Exception]:
    """Send items through a stage as one batch, and one by one where that fails; errors are passed on.

    Raises
    ------
    EngineError : the stage raised it.
    """
    done = iter(_done([item for item in items if not isinstance(item, Exception)], stage))
    return [item if isinstance(item, Exception) else next(done) for item in items]


def _done(items: list[T], stage: Callable[[list[T]], Sequence[U | Exception]]) -> list[U | Exception]:
    if not items:
        return []
    try:
        return [*stage(items)]
    except EngineError:
        raise
    except Exception as error:
        if "CUDA error" in str(error):  # of which no later call on this device recovers; lack of memory reads otherwise
            raise EngineError(f"the device has stopped: {first_line(error)}") from error
        if len(items) == 1:
            return [error]
    return [outcome for item in items for outcome in _done([item], stage)]  # behind the block, which holds memory of what failed


def with_pictures(
    rows: Sequence[Row], reserved: Sequence[str], stage: Callable[[list[tuple[Row, Prompt]]], Sequence[U | Exception]]
) -> list[U | Exception]:
    """Read rows with their pictures, and send them through a stage; those of a row that cannot be read, as it was raised.

    Pictures are large once they are opened: no further row is read before those go that have ``PIXELS`` together.

    Raises
    ------
    EngineError : the stage raised it.
    """
    found: list[U | Exception] = []
    waiting: list[tuple[Row, Prompt] | Exception] = []
    pixels = 0
    for row in rows:
        waiting += _done([row], lambda one: [(one[0], opened(one[0], reserved))])
        if not isinstance(waiting[-1], Exception):
            pixels += sum(image.width * image.height for image in waiting[-1][1].images)
        if pixels >= PIXELS:
            found += through(waiting, stage)
            waiting, pixels = [], 0
    return found + through(waiting, stage)


@functools.lru_cache(maxsize=64, typed=True)  # 1 is a count, 1.0 a share
def _method(name: str, budget: int | float | None, config: str) -> Method:
    return named(name, budget, config)


def any_method(wanted: AnswerSettings) -> Method:
    """The method of a row for transformers, where it may also act inside the decoder.

    Raises
    ------
    InputError : there is none, or it needs a budget.
    """
    return _method(wanted.method, wanted.budget, wanted.config)


def too_long(prompt: int, longest: float) -> InputError | None:
    """An error where a prompt of so many tokens leaves no room for an answer."""
    if prompt < longest:
        return None
    return InputError(
        f"the prompt has {prompt} tokens, and the model takes {longest} with the answer. Ask less, or keep fewer visual tokens."
    )


class Drawing(LogitsProcessor):
    """Draws each answer of a batch with numbers of its own, and takes note of scores that are no numbers.

    The likeliest word after adding Gumbel noise is one drawn by its probability.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self.heat = [row.wanted.temperature for row in rows]
        self.numbers = [torch.Generator().manual_seed(row.seed) for row in rows]
        self.odd = [False] * len(rows)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.odd = [odd or bad for odd, bad in zip(self.odd, scores.isnan().any(-1).tolist(), strict=True)]
        for row, (heat, numbers) in enumerate(zip(self.heat, self.numbers, strict=True)):
            if heat > 0:
                noise = -torch.empty(scores.shape[1], dtype=torch.float64).exponential_(generator=numbers).log()
                above = scores[row].double().cpu()  # what is next to no heat would make infinite scores of all
                scores[row] = ((above - above.max()) / heat + noise).to(scores)
        return scores


class TransformersEngine:
    """A model on this machine with a method attached.

    Parameters
    ----------
    name : Hub id or folder; "pocket" is the shipped model.
    wanted : how rows are answered that do not say.

    Raises
    ------
    InputError : the model cannot be loaded, or there is no such method.
    UnsupportedModelError : the method does not work on the model.
    """

    def __init__(self, name: str, wanted: AnswerSettings) -> None:
        method = any_method(wanted)
        self.loaded = load(name)
        with method(self.loaded.model):
            pass
        self.reserved, self.parts = media_words(self.loaded.processor), anatomy(self.loaded.model)
        self.longest = getattr(self.loaded.model.config.get_text_config(), "max_position_embeddings", None) or math.inf

    def answer(self, rows: Sequence[Row]) -> list[Answered | Exception]:
        """Answer rows of one ``Row.batch``; of a row that cannot be answered, what was raised."""
        return with_pictures(rows, self.reserved, self._generate)

    def _generate(self, pairs: list[tuple[Row, Prompt]]) -> list[Answered | Exception]:
        rows, prompts = [row for row, _ in pairs], [prompt for _, prompt in pairs]
        model, inputs, drawing = self.loaded.model, collate(self.loaded, prompts), Drawing(rows)
        mask = inputs["attention_mask"]
        words = (mask.bool() & ~self.parts.visual(inputs["input_ids"])).sum(1)
        hopeless = too_long(int(words.max()), self.longest)  # the report of the call tells the other ones
        if hopeless:
            raise hopeless
        with any_method(rows[0].wanted)(model) as session:
            out = model.generate(
                **inputs,
                **PLAIN,
                max_new_tokens=int(min(max(row.wanted.max_new_tokens for row in rows), self.longest)),
                logits_processor=LogitsProcessorList([drawing]),
            )
            counts = visual_tokens(session, len(rows)) if prompts[0].images else [([], [])] * len(rows)
        written, lengths = out[:, mask.shape[1] :].tolist(), mask.sum(1).tolist()
        return [
            InputError("the model gave no numbers (NaN) for this row. Give another picture, or load the model with another dtype.")
            if odd
            else self._answered(row, tokens, length - sum(before) + sum(after), before, after)
            for row, tokens, length, (before, after), odd in zip(rows, written, lengths, counts, drawing.odd, strict=True)
        ]

    def _answered(self, row: Row, tokens: list[int], prompt: int, before: list[int], after: list[int]) -> Answered | Exception:
        """The answer without what came after its end, or was generated for longer answers of the batch."""
        ends = self.loaded.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        stop = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
        length = int(min(stop + 1, row.wanted.max_new_tokens, self.longest - prompt, len(tokens)))
        text = self.loaded.processor.decode(tokens[:length], skip_special_tokens=True).strip()
        return too_long(prompt, self.longest) or Answered(text, stop < length, prompt, length, before, after)


def visual_tokens(session: Session, rows: int) -> list[tuple[list[int], list[int]]]:
    """Of each prompt of the last call, visual tokens per picture before and after."""
    found: list[tuple[list[int], list[int]]] = [([], []) for _ in range(rows)]
    for row, before, after in zip(session.report.rows, session.report.before, session.report.after, strict=True):
        found[row][0].append(before)
        found[row][1].append(after)
    return found


class Transformers(BatchEngine, name="transformers", rows=8):
    """Models of transformers on this machine, with any method."""

    def check(self, wanted: AnswerSettings) -> None:
        any_method(wanted)

    def start(self, job: Job) -> Iterator[list[dict[str, Any]]]:
        return answered(job.source, job.lines, job.wanted, TransformersEngine(job.model, job.wanted), job.size)
