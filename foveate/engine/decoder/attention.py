"""Reading queries and keys of one decoder layer at no cost: its attention module is routed through a function that looks and
delegates to whatever implementation the model uses (eager, SDPA, flash attention).
"""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

BIASED = ("eager", "sdpa")  # implementations that take a bias for each key
_LOCK = threading.Lock()
_HELD = "_foveate_attends"  # on a module: its own config, and for how many calls it has another one
_NAME = "foveate_tap"
_ATTRIBUTE = "_foveate_tap"


class Recorded(NamedTuple):
    """What one attention module was called with: query [B, H, S, d], keys [B, G, K, d], scale of their products and its bound."""

    query: Tensor
    keys: Tensor
    scale: float
    softcap: float | None


class OnlyRecording(Exception):  # noqa: N818  (a signal, not an error)
    """Ends a dry run of a layer once its queries and keys are known."""


class Tap:
    """Calls ``record`` with the queries and keys of one attention module, before it attends.

    The module gets a copy of its config that names our function; ``remove`` gives it its own back.
    """

    def __init__(self, attention: Any, record: Callable[[Recorded], None]) -> None:
        self.attention, self.config, self.record = attention, attention.config, record
        attention.config = copy.copy(self.config)
        attention.config._attn_implementation_internal = _NAME
        setattr(attention, _ATTRIBUTE, self)

    def remove(self) -> None:
        self.attention.config = self.config
        delattr(self.attention, _ATTRIBUTE)


def implementation_of(attention: Any) -> str:
    """What an attention module attends with, when nobody has changed it."""
    config, _ = getattr(attention, _HELD, (attention.config, 0))
    return str(config._attn_implementation)


def attend_with_sdpa(attention: Any) -> None:
    """Let an attention module attend with SDPA, until ``attend_as_before`` was called as often: several threads may use it."""
    with _LOCK:
        config, calls = getattr(attention, _HELD, (attention.config, 0))
        if not calls:
            attention.config = copy.copy(config)
            attention.config._attn_implementation_internal = "sdpa"
        setattr(attention, _HELD, (config, calls + 1))


def attend_as_before(attention: Any) -> None:
    """Undo one ``attend_with_sdpa``."""
    with _LOCK:
        config, calls = getattr(attention, _HELD)
        if calls > 1:
            setattr(attention, _HELD, (config, calls - 1))
        else:
            attention.config = config
            delattr(attention, _HELD)


def _tapped(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
    tap: Tap = getattr(module, _ATTRIBUTE)
    tap.record(Recorded(query, key, kwargs.get("scaling") or query.shape[-1] ** -0.5, kwargs.get("softcap")))
    implementation = tap.config._attn_implementation
    eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager)
    if "flash" not in implementation:
        return attend(module, query, key, value, attention_mask, **kwargs)
    ours, module.config = module.config, tap.config  # flash attention picks its kernel by the module's config
    try:
        return attend(module, query, key, value, attention_mask, **kwargs)
    finally:
        module.config = ours


AttentionInterface.register(_NAME, _tapped)
