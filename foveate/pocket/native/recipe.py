"""How the second pocket model is trained."""

from __future__ import annotations

from dataclasses import replace

from ..recipe import Recipe, written
from .batches import Batch, Mix, NativeBatches
from .build import build_model, build_processor
from .objectives import NativeTrainee


def _label(batch: Batch) -> str:
    if batch.frames.shape[1] > 1:
        return "clip"
    return "picture" if len(batch.frames) == len(batch.ids) else "pair"


NATIVE = Recipe(
    phases={
        "vision": Mix(1500, 120, 1500, (0.7, 0.0, 0.3), language=False),
        "joint": Mix(6000, 120, 2200),
        "final": Mix(5000, 600, 2600),
    },
    scaled=lambda mix, steps, scale: replace(mix, steps=steps, budget=round(mix.budget * scale)),
    trainee=lambda seed: NativeTrainee(build_model(seed)),
    batches=NativeBatches,
    save=lambda trainee, folder: written(trainee, build_model(), build_processor(), folder),
    label=_label,
    shown=("picture", "clip"),
)
