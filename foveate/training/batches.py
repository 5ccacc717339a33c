"""Conversations as batches for a model: what its processor makes of them, and labels for the answers only."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ..chat import media_words
from ..engine.model.anatomy import innermost
from ..engine.model.seams import ASSISTANT_MASKS
from ..errors import InputError, first_line
from ..images import open_picture
from ..loading import Loaded, quiet_loading
from .conversations import Conversation, Message

IGNORE = -100  # the label of what is not taught
MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")  # in a chat template, around what the assistant says


@dataclass(frozen=True)
class Sample:
    """A conversation with its pictures opened."""

    messages: tuple[Message, ...]
    images: tuple[Image.Image, ...]
    where: str

    @property
    def answers(self) -> list[str]:
        """What the assistant says in each turn."""
        said = [message["content"] for message in self.messages if message["role"] == "assistant"]
        return ["".join(part["text"] for part in parts) for parts in said]

    @property
    def filled(self) -> list[Message]:
        """The messages with the pictures in their places."""
        images, found = iter(self.images), []
        for message in self.messages:
            parts = [{**part, "image": next(images)} if part["type"] == "image" else part for part in message["content"]]
            found.append({**message, "content": parts})
        return found


class Samples(Dataset[Sample]):
    """Conversations of files; a picture is opened when its conversation is asked for."""

    def __init__(self, conversations: Sequence[Conversation]) -> None:
        self.conversations = conversations

    def __len__(self) -> int:
        return len(self.conversations)

    def __getitem__(self, index: int) -> Sample:
        row = self.conversations[index]
        try:
            images = tuple(open_picture(path).image for path in row.pictures)
        except InputError as error:
            raise InputError(f"{row.where}: {error}") from error
        return Sample(row.messages, images, row.where)


class Collator:
    """Makes the arguments of a model's forward of some samples, padded on the right.

    Answers are found by the generation marks of the chat template. Where it has none, a prompt is read up to each answer and up to
    its end, which has the processor work on pictures several times.

    Raises
    ------
    InputError : the processor has no chat template.
    """

    def __init__(self, loaded: Loaded) -> None:
        self.processor, self.name = loaded.processor, loaded.name
        template = getattr(self.processor, "chat_template", None)
        if not template:
            raise InputError(
                f"the processor of {self.name!r} has no chat template, and conversations cannot be written without. Give it one "
                "(processor.chat_template = ...), and save it beside the model."
            )
        self.marked = bool(MARKS.search(str(template)))
        self.words = media_words(self.processor)
        self.known = inspect.signature(type(innermost(loaded.model)).forward).parameters.keys()
        self.dtype = loaded.model.dtype

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """``input_ids``, ``attention_mask``, ``labels`` [B, S], pictures, and what else the model takes.

        Raises
        ------
        InputError : the processor cannot use a sample, or its answers cannot be found again.
        """
        for sample in samples:
            self._check_words(sample)
        inputs = self._inputs([sample.filled for sample in samples], samples, marks=self.marked)
        ids, real = inputs["input_ids"], inputs["attention_mask"].bool()
        taught = inputs["assistant_masks"].bool() if self.marked else self._by_prefixes(samples, ids, real)
        labels = ids.masked_fill(~(taught & real), IGNORE)
        for sample, row in zip(samples, labels, strict=True):
            self._check_answers(sample, row)
        found = {name: value for name, value in inputs.items() if name in self.known}
        for name in found.keys() & {"pixel_values", "pixel_values_videos"}:
            found[name] = found[name].to(self.dtype)
        return {**found, "labels": labels}

    def prompts(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """Arguments of ``generate`` for samples that end with a question, padded on the left."""
        inputs = self._inputs([sample.filled for sample in samples], samples, side="left", add_generation_prompt=True)
        return {name: value for name, value in inputs.items() if name in self.known}

    def _inputs(
        self, messages: list[list[Message]], samples: Sequence[Sample], *, side: str = "right", marks: bool = False, **options: Any
    ) -> dict[str, Tensor]:
        options |= {"return_assistant_tokens_mask": True} if marks else {}
        try:
            with quiet_loading(), listed_offsets(self.processor):
                return dict(
                    self.processor.apply_chat_template(
                        messages,
                        tokenize=True,
                        return_dict=True,
                        return_tensors="pt",
                        processor_kwargs={"padding": True, "padding_side": side},
                        **options,
                    )
                )
        except MemoryError:
            raise
        except Exception as error:  # processors raise what their tokenizers and image processors make of it
            places = ", ".join(sample.where for sample in samples)
            raise InputError(f"{places}: the processor of {self.name!r} cannot use it: {first_line(error)}") from error

    def _by_prefixes(self, samples: Sequence[Sample], ids: Tensor, real: Tensor) -> Tensor:
        """[B, S] bool, tokens of answers: what a longer conversation adds to the prompt that asks for it."""
        taught = torch.zeros_like(real)
        for row, sample in enumerate(samples):
            filled, whole = sample.filled, ids[row][real[row]]
            for number, message in enumerate(filled):
                if message["role"] != "assistant":
                    continue
                asked = self._inputs([filled[:number]], [sample], add_generation_prompt=True)["input_ids"][0]
                told = self._inputs([filled[: number + 1]], [sample])["input_ids"][0]
                if not (torch.equal(whole[: len(asked)], asked) and torch.equal(whole[: len(told)], told)):
                    raise InputError(
                        f"{sample.where}: the chat template of {self.name!r} writes a conversation otherwise once it goes on, so "
                        "that answers cannot be found. Put {% generation %} and {% endgeneration %} around them in the template."
                    )
                taught[row, len(asked) : len(told)] = True
        return taught

    def _check_answers(self, sample: Sample, labels: Tensor) -> None:
        """Raise ``InputError`` unless the answers can be read in the labels."""
        tokenizer = self.processor.tokenizer
        read = _letters(tokenizer.decode(labels[labels != IGNORE], skip_special_tokens=True))
        for answer in sample.answers:
            ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
            wanted = _letters(tokenizer.decode(ids, skip_special_tokens=True))
            if not ids or wanted not in read:
                raise InputError(
                    f"{sample.where}: the answer {answer[:60]!r} is not among the labels that the chat template of {self.name!r} "
                    "leads to. Its generation marks must enclose what the assistant says, and its tokenizer must know the words."
                )

    def _check_words(self, sample: Sample) -> None:
        for message in sample.messages:
            for part in message["content"]:
                word = next((word for word in self.words if word in part.get("text", "")), None)
                if word is not None:
                    raise InputError(f"{sample.where}: its text holds {word!r}, which stands for a picture. Leave it out.")


@contextmanager
def listed_offsets(processor: Any) -> Iterator[None]:
    """Give a processor lists, and no tensors, to find the assistant's tokens in: it reads number by number."""
    original = getattr(processor, ASSISTANT_MASKS, None)  # older releases have none, and read lists
    if original is None:
        yield
        return

    def adjusted(found: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(found.get("offset_mapping"), Tensor):
            found["offset_mapping"] = found["offset_mapping"].tolist()
        return original(found, *args, **kwargs)

    setattr(processor, ASSISTANT_MASKS, adjusted)
    try:
        yield
    finally:
        delattr(processor, ASSISTANT_MASKS)


def _letters(text: str) -> str:
    return "".join(text.split())
