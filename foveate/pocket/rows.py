"""Questions as rows of tokens, one after the other behind what they are about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .questions import PocketQuestion

IGNORE = -100
Targets = list[tuple[int, ...]]  # for each word of a question


@dataclass(frozen=True)
class Language:
    """How a pocket model is asked.

    Attributes
    ----------
    ids : of its words.
    ending : what stands between a question and its answer.
    pad, end : ids of what fills rows, and of what ends an answer.
    families : of questions.
    targets : how many auxiliary targets a word has.
    """

    ids: Mapping[str, int]
    ending: str
    pad: int
    end: int
    families: tuple[str, ...]
    targets: int

    def encode(self, text: str) -> list[int]:
        """Token ids of a text that uses only its words, as the tokenizer gives them."""
        return [self.ids[word] for word in text.split()]

    def rows(self, asked: Sequence[tuple[PocketQuestion, Targets]]) -> dict[str, list]:
        """All questions of one sample as a row: ids, block, offset, labels, family and grounding.

        Each is tokenised by itself, as behind its pictures in a real prompt. Its targets may be fewer than its tokens.
        """
        rows: dict[str, list] = {name: [] for name in ("ids", "block", "offset", "labels", "family", "grounding")}
        for number, (question, targets) in enumerate(asked):
            prompt, answer = self.encode(f"{question.text} {self.ending}"), [*self.encode(question.answer), self.end]
            ids = prompt + answer[:-1]
            rows["ids"] += ids
            rows["block"] += [number] * len(ids)
            rows["offset"] += range(len(ids))
            rows["labels"] += [IGNORE] * (len(prompt) - 1) + answer
            rows["family"] += [self.families.index(question.family)] * len(ids)
            rows["grounding"] += targets + [(IGNORE,) * self.targets] * (len(ids) - len(targets))
        return rows

    def collated(self, rows: Sequence[dict[str, list]]) -> dict[str, Tensor]:
        """Rows of several samples as rectangular tensors [B, T] (grounding [B, T, targets])."""
        nothing = (IGNORE,) * self.targets
        fill = {"ids": self.pad, "block": -1, "offset": 0, "labels": IGNORE, "family": 0, "grounding": nothing}
        length = -(-max(len(row["ids"]) for row in rows) // 16) * 16

        def filled(name: str) -> Tensor:
            return torch.tensor([row[name] + [fill[name]] * (length - len(row[name])) for row in rows])

        return {name: filled(name) for name in fill}
