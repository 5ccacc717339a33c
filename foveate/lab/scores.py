"""Accuracies with intervals: scenes are resampled, since questions of a scene belong together."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..pocket.native.questions import FAMILIES
from .testset import TestSet

FEW = 40  # scenes below which resampling them says too little
Z = 1.959964  # of 95 % of a normal distribution


@dataclass(frozen=True)
class Scores:
    """Accuracies of results on a test set, with intervals from resampling scenes (questions of a scene belong together)."""

    families: NDArray[Any]
    scene: NDArray[np.int64]
    resamples: NDArray[np.int64]  # [R, scenes] how often each scene was drawn

    @classmethod
    def of(cls, data: TestSet[Any], resamples: int = 2000) -> Scores:
        scenes = data.column(lambda i, _: i)
        return cls.grouped(data.column(lambda _, q: q.family), scenes, len(data.scenes), resamples)

    @classmethod
    def grouped(cls, families: NDArray[Any], groups: NDArray[Any], number: int, resamples: int = 2000) -> Scores:
        """Of questions by their families and the numbers, below ``number``, of the scenes or pictures that they are about."""
        drawn = np.random.default_rng(0).multinomial(number, np.full(number, 1 / number), size=resamples)
        return cls(families, groups, drawn)

    def part(self, mask: NDArray[Any]) -> Scores:
        """Of the questions [Q] bool alone."""
        return Scores(self.families[mask], self.scene[mask], self.resamples)

    def per_family(self, right: NDArray[Any]) -> dict[str, float]:
        known = dict.fromkeys((*(f for f in FAMILIES if (self.families == f).any()), *self.families.tolist()))
        return {f: float(right[self.families == f].mean()) for f in known}

    def interval(self, values: NDArray[Any], *, paired: bool = False) -> tuple[float, float, float]:
        """Mean over questions, and its 95 % interval; ``paired`` values are differences of shares.

        Resampling says nothing where all values are alike, and too little of few scenes: there a score interval is taken
        (``few_values``), with as many independent observations as scenes.
        """
        number = self.resamples.shape[1]
        totals = np.bincount(self.scene, values.astype(float), minlength=number)
        counts = np.bincount(self.scene, minlength=number)
        scenes, mean = int((counts > 0).sum()), float(values.mean())
        if scenes < FEW or (values == values[0]).all():
            return (mean, *few_values(values, scenes, paired=paired))
        asked = self.resamples @ counts
        means = (self.resamples @ totals)[asked > 0] / asked[asked > 0]
        low, high = np.quantile(means, [0.025, 0.975])
        return mean, float(low), float(high)

    def difference(self, a: NDArray[Any], b: NDArray[Any]) -> tuple[float, float, float]:
        """Accuracy of a minus accuracy of b on the same questions, with its paired 95 % interval."""
        return self.interval(a.astype(float) - b.astype(float), paired=True)


def few_values(values: NDArray[Any], observations: int, *, paired: bool) -> tuple[float, float]:
    """A 95 % interval of a mean that is right for few observations and at its ends.

    Wilson's for shares, of values that are 0 or 1; that of Bonett and Price (2012) for paired differences of such values, which
    adds half an observation to each of the four cells of their table.
    """
    n = observations
    if not paired:
        share, z = float(values.mean()), Z**2 / n
        middle, half = (share + z / 2) / (1 + z), Z / (1 + z) * (share * (1 - share) / n + z / 4 / n) ** 0.5
        return max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half))
    more, fewer = (n * float(values.clip(0, 1).mean()) + 1) / (n + 2), (n * float((-values).clip(0, 1).mean()) + 1) / (n + 2)
    half = Z * ((more + fewer - (more - fewer) ** 2) / (n + 2)) ** 0.5
    return max(-1.0, more - fewer - half), min(1.0, more - fewer + half)


def majority(data: TestSet[Any]) -> dict[str, float]:
    """Accuracy of always giving the most frequent answer of a family."""
    families, answers = data.column(lambda _, q: q.family), data.column(lambda _, q: q.answer)
    found = {}
    for family in FAMILIES:
        mine = Counter(answers[families == family].tolist())
        if mine:
            found[family] = max(mine.values()) / sum(mine.values())
    return found
