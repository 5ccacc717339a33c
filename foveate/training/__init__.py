"""Training of methods, and of models with a method attached."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .callbacks import callback as callback
    from .run import train as train
    from .settings import TrainSettings as TrainSettings

__all__ = ["TrainSettings", "callback", "train"]


def __getattr__(name: str) -> Any:
    """Read when they are first used: they need accelerate, which not everybody has."""
    if name == "callback":
        from .callbacks import callback

        return callback
    if name == "train":
        from .run import train

        return train
    if name == "TrainSettings":
        from .settings import TrainSettings

        return TrainSettings
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
