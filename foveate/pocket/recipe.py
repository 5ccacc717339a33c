"""What the training of a pocket model needs to know of it, and the recipe of the first one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from .batches import Mix, PocketBatches
from .build import build_model, build_processor
from .objectives import PocketTrainee


class Batches(Protocol):
    """Batches by number of the step, as a data set of torch."""

    def __len__(self) -> int: ...

    def __getitem__(self, step: int) -> Any: ...

    def options(self, step: int) -> dict[str, bool]:
        """Arguments of the trainee's ``forward``."""
        ...


@dataclass(frozen=True)
class Recipe:
    """How a pocket model is trained.

    Attributes
    ----------
    phases : by name, in order; over the last one the learning rate falls to zero.
    scaled : a phase with other steps, and a factor on its batch size.
    trainee : the model of a seed with its auxiliary heads; it tells its ``body_matrices``.
    batches : of phases, a seed and the number of this process.
    save : writes a trained model and its processor in Hugging Face format.
    label : of a batch, for the log.
    shown : label of what is printed.
    """

    phases: Mapping[str, Any]
    scaled: Callable[[Any, int, float], Any]
    trainee: Callable[[int], Any]
    batches: Callable[[list[Any], int, int], Batches]
    save: Callable[[Any, Path], None]
    label: Callable[[Any], str]
    shown: tuple[str, ...]


def written(trainee: Any, model: Any, processor: Any, folder: Path) -> None:
    """Write the weights of a trainee's model as bfloat16 safetensors, with a processor, in Hugging Face format."""
    model.load_state_dict(trainee.model.state_dict())
    model.bfloat16().save_pretrained(folder)
    processor.save_pretrained(folder)


POCKET = Recipe(
    phases={
        "vision": Mix(2000, {8: 0.25, 12: 0.3, 16: 0.3, 24: 0.15}, {8: 40, 12: 20, 16: 12, 24: 4}, language=False),
        "joint": Mix(1700, {8: 0.3, 12: 0.3, 16: 0.3, 24: 0.1}, {8: 14, 12: 8, 16: 5, 24: 3}),
        "calm": Mix(1300, {8: 0.3, 12: 0.3, 16: 0.3, 24: 0.1}, {8: 14, 12: 8, 16: 5, 24: 3}, calm=True),
        "final": Mix(3500, {12: 0.05, 16: 0.1, 24: 0.85}, {12: 8, 16: 5, 24: 3}, calm=True),
    },
    scaled=lambda mix, steps, scale: replace(
        mix, steps=steps, sizes={side: max(1, round(size * scale)) for side, size in mix.sizes.items()}
    ),
    trainee=lambda seed: PocketTrainee(build_model(seed)),
    batches=PocketBatches,
    save=lambda trainee, folder: written(trainee, build_model(), build_processor(), folder),
    label=lambda batch: str(batch.pixels.shape[-1] // 8),
    shown=("24",),
)
