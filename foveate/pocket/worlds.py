"""Which pocket world a model knows."""

from __future__ import annotations

from typing import Any, Literal

from .native.vocabulary import TOKEN_ID as NATIVE
from .vocabulary import TOKEN_ID as POCKET

World = Literal["pocket", "native"]


def world_of(processor: Any) -> World | None:
    """The pocket world whose words a model has and no others, so that its answers can be taken word by word."""
    words = processor.tokenizer.get_vocab()
    return "pocket" if words == POCKET else "native" if words == NATIVE else None
