"""Tables of a paper in small: its numbers beside ours, and what of its ordering ours confirms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..pocket.questions import QUESTION_KINDS, READING
from .scores import Scores

GROUPS: dict[str, tuple[str, ...]] = {
    "reading": READING,
    "existence": ("existence_random", "existence_adversarial"),
    "objects": ("color", "shape", "count", "where", "relation"),
    "choice": ("choice",),
    "pair": ("pair",),
    "all": QUESTION_KINDS,
}
MIRRORS = {"VQAv2": "objects", "SQA": "all", "VQAT": "reading", "POPE": "existence", "MME": "pair", "MMB": "choice"}
MIRRORED = (
    "Ours are answers right in %, on the question families that mirror a benchmark: reading (TextVQA), existence (POPE), objects "
    "(VQAv2: colour, shape, count, place, relation), choice (MMBench), pair (MME). None mirrors ScienceQA; all questions stand "
    "beside it."
)
VERDICTS = ("agrees", "disagrees", "cannot be told")
Difference = tuple[float, float, float]


@dataclass
class TableLine:
    """One line of a table: the paper's numbers by task, and how ours did.

    Attributes
    ----------
    label : of the method in the table.
    told : what the paper says of the tokens, by task; "" is for all others.
    paper : its numbers by task.
    setting : of ours, where one line of the paper has several.
    tokens : ours, mean per image.
    shape : rows and columns of ours, where they matter.
    right : ours, [questions]; None where it could not be run.
    reason : why not.
    """

    label: str
    told: dict[str, str]
    paper: dict[str, float]
    setting: str = ""
    tokens: float | None = None
    shape: tuple[int, int] | None = None
    right: Any = None
    reason: str = ""

    def tokens_told(self, task: str) -> str:
        return self.told.get(task, self.told.get("", ""))

    @property
    def tokens_shown(self) -> str:
        """Of ours."""
        if self.shape is not None:
            return f"{self.shape[0]} x {self.shape[1]} = {self.shape[0] * self.shape[1]}"
        return "-" if self.tokens is None else f"{self.tokens:g}" if self.tokens == int(self.tokens) else f"{self.tokens:.1f}"


@dataclass(frozen=True)
class Claim:
    """The paper orders two lines of a table on a task; ours gives one paired difference for each setting that was run."""

    task: str
    above: str
    below: str
    numbers: tuple[float, float]
    ours: dict[str, Difference] = field(default_factory=dict)  # by setting; "" where there is only one

    def verdicts(self) -> dict[str, str]:
        """For each setting one of ``VERDICTS``."""
        return {setting: verdict(difference) for setting, difference in self.ours.items()}

    def sentence(self) -> str:
        """What the paper says, and how ours agrees."""
        a, b = (f"{number:g}" for number in self.numbers)
        said = f"{self.task}: the paper has {self.above} above {self.below} ({a} against {b})."
        if not self.ours:
            return f"{said} Ours could not be run."
        parts = []
        for kind in VERDICTS:
            mine = [
                f"{setting}{': ' if setting else ''}{100 * d:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
                for setting, (d, low, high) in self.ours.items()
                if verdict((d, low, high)) == kind
            ]
            if mine:
                parts.append(f"{kind} ({'; '.join(mine)})")
        return f"{said} Ours, on {MIRRORS[self.task]}: {', '.join(parts)}."

    def to_dict(self) -> dict[str, Any]:
        return {
            "task": self.task,
            "group": MIRRORS[self.task],
            "above": self.above,
            "below": self.below,
            "paper": list(self.numbers),
            "ours": {setting: {"difference": list(d), "verdict": verdict(d)} for setting, d in self.ours.items()},
            "sentence": self.sentence(),
        }


def verdict(difference: Difference) -> str:
    """Whether a paired difference (a minus b, with its 95 % interval) agrees with a claim that a is above b."""
    _, low, high = difference
    return VERDICTS[0] if low > 0 else VERDICTS[1] if high < 0 else VERDICTS[2]


class Judge:
    """Scores lines of a table on the groups of questions."""

    def __init__(self, scores: Scores) -> None:
        self.scores, self.masks = scores, {}
        for name, families in GROUPS.items():
            self.masks[name] = np.isin(scores.families, families)

    def _in(self, task: str, right: Any, other: Any = None) -> Difference | None:
        """Accuracy on the group of a task, or its difference to that of ``other``."""
        mask = self.masks[MIRRORS[task]]
        if not mask.any():
            return None
        part, values = self.scores.part(mask), np.asarray(right, float)[mask]
        return part.interval(values) if other is None else part.difference(values, np.asarray(other, float)[mask])

    def accuracy(self, line: TableLine, task: str) -> Difference | None:
        """Ours on the group of a task, with its interval."""
        return None if line.right is None else self._in(task, line.right)

    def claim(self, task: str, pairs: dict[str, tuple[TableLine, TableLine]]) -> Claim | None:
        """The paper's ordering of two lines on a task, for each setting of ours; None where it has none."""
        a, b = next(iter(pairs.values()))
        if task not in a.paper or task not in b.paper or a.paper[task] == b.paper[task]:
            return None
        upwards = a.paper[task] > b.paper[task]
        pairs = pairs if upwards else {setting: (second, first) for setting, (first, second) in pairs.items()}
        above, below = next(iter(pairs.values()))
        ours = {}
        for setting, (first, second) in pairs.items():
            if first.right is not None and second.right is not None:
                difference = self._in(task, first.right, second.right)
                if difference is not None:
                    ours[setting] = difference
        return Claim(task, above.label, below.label, (above.paper[task], below.paper[task]), ours)


def claims_of(
    judge: Judge, tasks: Sequence[str], pairs: Callable[[str], Sequence[dict[str, tuple[TableLine, TableLine]]]]
) -> list[Claim]:
    """All claims of a table: for each task the pairs that the paper compares on it."""
    found = (judge.claim(task, pair) for task in tasks for pair in pairs(task))
    return [claim for claim in found if claim is not None]


def tally(claims: Sequence[Claim]) -> str:
    """One line: how often ours agrees."""
    every = [kind for claim in claims for kind in claim.verdicts().values()]
    counts = ", ".join(f"{kind} {every.count(kind)}" for kind in VERDICTS)
    return f"{len(every)} comparisons with the paper's order: {counts} (each at 95 %, not corrected for their number)"
