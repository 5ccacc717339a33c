"""The gateway before a language model: an HTTP server that encodes pictures and hands on embeddings."""

from __future__ import annotations

import importlib
from typing import Any


def __getattr__(name: str) -> Any:
    """What was in ``foveate.serving.gateway`` while that was a file."""
    if not name.startswith("_"):
        found = getattr(importlib.import_module(f"{__name__}.gateway"), name, None)
        if found is not None:
            return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
