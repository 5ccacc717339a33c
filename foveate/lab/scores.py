"""Accuracies with intervals: scenes are resampled, since questions of a scene belong together."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..pocket.questions import QUESTION_KINDS
from .testset import TestSet


@dataclass(frozen=True)
class Scores:
    """Accuracies of results on a test set, with intervals from resampling scenes (questions of a scene belong together)."""

    families: NDArray[Any]
    scene: NDArray[np.int64]
    resamples: NDArray[np.int64]  # [R, scenes] how often each scene was drawn

    @classmethod
    def of(cls, data: TestSet, resamples: int = 2000) -> Scores:
        number = len(data.scenes)
        drawn = np.random.default_rng(0).multinomial(number, np.full(number, 1 / number), size=resamples)
        return cls(data.column(lambda _, q: q.family), data.column(lambda i, _: i), drawn)

    def per_family(self, right: NDArray[Any]) -> dict[str, float]:
        return {f: float(right[self.families == f].mean()) for f in QUESTION_KINDS if (self.families == f).any()}

    def interval(self, values: NDArray[Any]) -> tuple[float, float, float]:
        """Mean over questions, and its 95 % interval."""
        number = self.resamples.shape[1]
        totals = np.bincount(self.scene, values.astype(float), minlength=number)
        counts = np.bincount(self.scene, minlength=number)
        asked = self.resamples @ counts
        means = (self.resamples @ totals)[asked > 0] / asked[asked > 0]
        low, high = np.quantile(means, [0.025, 0.975])
        return float(values.mean()), float(low), float(high)

    def difference(self, a: NDArray[Any], b: NDArray[Any]) -> tuple[float, float, float]:
        """Accuracy of a minus accuracy of b on the same questions, with its paired 95 % interval."""
        return self.interval(a.astype(float) - b.astype(float))


def majority(data: TestSet) -> dict[str, float]:
    """Accuracy of always giving the most frequent answer of a family."""
    families, answers = data.column(lambda _, q: q.family), data.column(lambda _, q: q.answer)
    found = {}
    for family in QUESTION_KINDS:
        mine = Counter(answers[families == family].tolist())
        if mine:
            found[family] = max(mine.values()) / sum(mine.values())
    return found
