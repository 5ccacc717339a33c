"""The trained parts of a method as a part of the model: optimizers, wrappers and trainers then find their weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..errors import InputError
from ..methods.base import Method
from ..methods.trained import Trained
from .model.anatomy import Anatomy

NAME = "foveate"  # of the submodule


def named_parts(method: Method) -> dict[str, Trained]:
    """The trained parts of a method by name; a second one of the same name is numbered."""
    found: dict[str, Trained] = {}
    for part in method.trained():
        same = sum(name.partition("-")[0] == part.name for name in found)
        found[part.name if not same else f"{part.name}-{same + 1}"] = part
    return found


def parameters(method: Method) -> Iterator[nn.Parameter]:
    """Of all trained parts."""
    for part in method.trained():
        yield from part.module.parameters()


def places(method: Method, folder: str | Path) -> list[tuple[Trained, Path]]:
    """Where each trained part is saved: in the folder itself, or in one of its own where there are several.

    Raises
    ------
    InputError : the method has no weights.
    """
    parts = named_parts(method)
    if not parts:
        raise InputError(f"{method.name!r} has no weights that could be trained, saved or loaded")
    root = Path(folder)
    return [(part, root if len(parts) == 1 else root / name) for name, part in parts.items()]


class Registered:
    """The trained parts as the submodule ``foveate`` of a model, until ``remove()``.

    Checkpoints of the model do not hold them, as others could not be loaded without foveate: they are saved apart.

    Raises
    ------
    InputError : nothing can be trained, there are no weights to begin with, or the model has such a submodule already.
    """

    def __init__(self, parts: Anatomy, method: Method) -> None:
        self.model, self.trained = parts.model, named_parts(method)
        if not self.trained:
            raise InputError(f"{method.name!r} has nothing to train. Attach it without train=True.")
        if hasattr(self.model, NAME):
            raise InputError(f"the model has a part called {NAME!r} already; detach what is being trained on it first")
        for part in self.trained.values():
            part.begin_training(parts.host)
        self.model.add_module(NAME, nn.ModuleDict({name: part.module for name, part in self.trained.items()}))
        self._handles = [
            self.model.register_state_dict_post_hook(_leave_out),
            self.model.register_load_state_dict_post_hook(_not_missed),
        ]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        del self.model._modules[NAME]
        for part in self.trained.values():
            part.end_training()


def _leave_out(_: nn.Module, state: dict[str, Tensor], prefix: str, __: Any) -> None:
    for key in [key for key in state if key.startswith(f"{prefix}{NAME}.")]:
        del state[key]


def _not_missed(model: nn.Module, incompatible: Any) -> None:
    ours = tuple(f"{NAME}.{key}" for key in getattr(model, NAME).state_dict())
    incompatible.missing_keys[:] = [key for key in incompatible.missing_keys if not key.endswith(ours)]
