"""The one runner of "method x budget -> answers": what every table and study of the laboratory is made with."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..loading import POCKET, Loaded, load
from ..methods.base import KeepAll, Method
from ..pocket.native.clips import Clip
from ..pocket.worlds import world_of
from .exam import Asker, Evaluator, Result
from .native_exam import NativeEvaluator
from .scores import Scores
from .store import Store, key_of
from .testset import SEED, TestSet

Tell = Callable[[str, int, int], None]  # what comes next, how many are done, of how many


@dataclass(frozen=True)
class Outcome:
    """How one method did.

    Attributes
    ----------
    right : [questions] in [0, 1].
    layers : visual tokens of a picture in each decoder layer.
    seconds : that it took.
    """

    right: NDArray[np.float64]
    layers: tuple[float, ...]
    seconds: float

    @property
    def tokens(self) -> float:
        """Visual tokens of a picture that enter the decoder."""
        return self.layers[0]

    @property
    def mean(self) -> float:
        """Visual tokens of a picture on average over decoder layers, which is what the decoder pays for."""
        return float(np.mean(self.layers))


class Runner:
    """Answers the questions of one test set with any method. What the store holds is not computed again.

    Parameters
    ----------
    scenes, each, seed, split : of the test set: how many pictures, and questions about each.
    store : file of results so far; None = none.
    model : Hub id or folder, "pocket", "pocket+ADAPTER", or a model that is loaded.
    """

    def __init__(
        self,
        scenes: int = 501,
        each: int = 2,
        seed: int = SEED,
        store: Path | None = None,
        *,
        model: str | Loaded = POCKET,
        split: str = "test",
    ) -> None:
        from .. import __version__

        self.loaded = model if isinstance(model, Loaded) else load(model)
        test = {"scenes": scenes, "each": each, "seed": seed, "split": split}
        self.setting: dict[str, Any] = {**test, "foveate": __version__, "model": self.loaded.name, "weights": self.loaded.weights}
        self.store = Store(store, self.setting)
        self.world = world_of(self.loaded.processor)
        draw: Callable[..., TestSet[Any]] = TestSet.draw_native if self.world == "native" else TestSet.draw
        self.data = draw(scenes, seed, split).picked(each, seed)
        self.scores = Scores.of(self.data)
        self.asker = Asker(self.loaded, self.data)

    @property
    def layers(self) -> int:
        """Decoder layers."""
        return int(self.loaded.model.config.get_text_config().num_hidden_layers)

    @property
    def shares(self) -> bool:
        """Whether pictures have different numbers of tokens, so that budgets are shares of them."""
        return self.world == "native"

    @functools.cached_property
    def total(self) -> int:
        """Visual tokens of a picture without reduction."""
        return round(self.outcome(None).tokens)

    def parts(self, outcome: Outcome) -> dict[str, tuple[float, float, float]]:
        """Accuracies with intervals of pictures and of clips, where the test set has both."""
        clips = np.array([isinstance(self.data.scenes[number], Clip) for number, _ in self.data.asked])
        if not clips.any() or clips.all():
            return {}
        masks = {"pictures": ~clips, "clips": clips}
        return {name: self.scores.part(mask).interval(outcome.right[mask]) for name, mask in masks.items()}

    def nearby(self, mean: float) -> int | float:
        """The budget at which baselines are run beside a mean over layers: a count, or a share where pictures differ."""
        if not self.shares:
            return min(self.total, nearby(mean))
        return min(1.0, max(0.02, round(mean / self.total * 25) / 25))

    @functools.cached_property
    def evaluator(self) -> Evaluator | NativeEvaluator:
        """Has encoded all pictures."""
        if self.world == "native":
            return NativeEvaluator(self.loaded, self.data)
        made = Evaluator(self.loaded.model, self.data)
        _ = [pictures.embeds for pictures in made.pictures]
        return made

    def outcome(self, method: Method | None) -> Outcome:
        """Answer all questions; None keeps all tokens, and a random choice is the mean over its seeds.

        Raises
        ------
        InputError, UnsupportedModelError : the method cannot do that.
        """
        found = []
        for setting in (method or KeepAll()).repeats():
            key = key_of(setting)
            result = self.store.get(key)
            if result is None:
                result = self._answer(setting)
                self.store.put(key, result)
            found.append(result)
        right = np.mean([[float(digit) for digit in result["right"]] for result in found], axis=0)
        layers = np.mean([result["layers"] for result in found], axis=0)
        return Outcome(right, tuple(layers.tolist()), float(np.mean([result["seconds"] for result in found])))

    def _answer(self, method: Method) -> dict[str, Any]:
        fast = self.sees_no_question(method) and self.world is not None
        _ = self.evaluator if fast else None  # encoding once is nobody's time
        begin = time.perf_counter()
        result: Result = self.evaluator.run(method.before_decoder()) if fast else self.asker.run(method)
        right = "".join(str(int(value)) for value in result.right)
        return {"right": right, "layers": result.layers, "seconds": time.perf_counter() - begin}

    @staticmethod
    def sees_no_question(method: Method) -> bool:
        """Whether all questions about a picture get the same tokens, at the places that the evaluator gives them."""
        front = method.before_decoder()
        inside = bool(method.inside_decoder()) or method.first_tokens() is not None
        return not inside and not front.reads_question and front.positions == "compact"


def nearby(mean: float) -> int:
    """The count at which baselines are run beside a mean over layers: the nearest multiple of 12."""
    return max(12, 12 * round(mean / 12))
