"""One file per paper. Importing a file registers its method; nothing else needs to know of it."""

from __future__ import annotations

import functools
import importlib
import pkgutil

from .base import REGISTRY, TokenReducer, get, presets, registered

__all__ = ["REGISTRY", "TokenReducer", "get", "presets", "registered"]


@functools.cache
def _load_all() -> None:
    """Import every method file of this folder, so that each registers itself."""
    for module in pkgutil.iter_modules(__path__):
        if not module.ispkg:
            importlib.import_module(f"{__name__}.{module.name}")
