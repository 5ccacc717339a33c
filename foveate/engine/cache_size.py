"""How much memory a key-value cache takes."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..errors import CacheError

STATES = ("conv_states", "recurrent_states")  # of layers that hold a state, beside keys and values or in their place


def _held(layer: Any) -> list[Any]:
    """What a layer of a cache holds: keys and values, and the states that it has, as far as they are there."""
    found = [layer.keys, layer.values] if hasattr(layer, "keys") else []
    for states in (getattr(layer, name, None) for name in STATES):
        found += [state for state in (states or {}).values() if state is not None]
    return found


def cache_bytes(cache: Any) -> list[int]:
    """Bytes of memory that the keys and values of each layer of a cache hold on to, or its states.

    Raises
    ------
    CacheError : there is none, or it stores them in another form.
    """
    if cache is None:
        raise CacheError("generate returned no key-value cache, so its size is not known. Use a model that keeps one.")
    found, seen = [], set()
    empty = getattr(cache, "is_dummy", None) or [False] * len(cache.layers)  # layers that read what earlier ones hold
    for layer, nothing in zip(cache.layers, empty, strict=True):
        held = 0
        for tensor in [] if nothing else _held(layer) or [None]:
            if not isinstance(tensor, Tensor):
                raise CacheError("this cache does not show its keys and values, so its size is not known. Use a dynamic cache.")
            storage = tensor.untyped_storage()  # what is held is all of it, even where the layer sees a part
            if storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                held += storage.nbytes()
        found.append(held)
    return found
