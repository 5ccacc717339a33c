"""The parts of transformers that foveate relies on and that are not documented as stable, all in this file.

``tests/test_seams.py`` names the seam when a new release moves it.
"""

from __future__ import annotations

import copy
import inspect
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from ..errors import UnsupportedModelError

if TYPE_CHECKING:
    from .prompt import Layout

RAW_INPUTS = ("pixel_values", "pixel_values_images", "pixel_values_videos", "image_patches")
PER_TOKEN_INPUTS = ("token_type_ids", "mm_token_type_ids")
PRE_ENCODED = "mm_encoder_outputs"
MERGE_CALLBACKS = "_merge_criteria_processor_list"  # of transformers' generate
REPLICATE = "_replicate_for_data_parallel"  # of torch
WRAPPED_FORWARD = "_old_forward"  # where accelerate's hooks keep the forward they wrap, and start from when they are put on anew
_LAYOUT = "_foveate_layout"
_REDUCED = "_foveate_reduced"


def check_pre_encoded_input(model: PreTrainedModel) -> None:
    """Raise unless ``forward`` takes already encoded pictures (transformers >= 5.18)."""
    if PRE_ENCODED not in inspect.signature(model.base_model.forward).parameters:
        raise UnsupportedModelError(
            f"{type(model).__name__} takes no pre-encoded pictures ({PRE_ENCODED}). foveate needs transformers >= 5.18."
        )


def has_pixels(kwargs: dict[str, Any]) -> bool:
    return any(kwargs.get(name) is not None for name in RAW_INPUTS)


def encode_images(base: Any, kwargs: dict[str, Any]) -> Any:
    """Run the model's own ``get_image_features``; what it consumed is taken out of ``kwargs``, as ``generate`` does."""
    names = [name for name in inspect.signature(base.get_image_features).parameters if name != "kwargs" and name in kwargs]
    return base.get_image_features(**{name: kwargs.pop(name) for name in names}, return_dict=True)


def with_features(output: Any, features: list[Tensor]) -> Any:
    """The encoder output with other projected features, one tensor [m_i, D] per image."""
    changed = copy.copy(output)
    changed.pooler_output = features
    changed.__dict__[_REDUCED] = True
    return changed


def is_ours(pre_encoded: Any) -> bool:
    """Whether encoded pictures come from another session of ours, as the assistant of assisted generation gets them."""
    return bool(pre_encoded) and all(_REDUCED in getattr(output, "__dict__", {}) for output in pre_encoded.values())


def find_cache(output: Any) -> Cache | None:
    """The key-value cache in what ``forward`` or ``generate`` returned."""
    cache = getattr(output, "past_key_values", None)
    if cache is None and isinstance(output, tuple):
        cache = next((part for part in output if isinstance(part, Cache)), None)
    return cache if isinstance(cache, Cache) else None


def layout_of(cache: Any) -> Layout | None:
    """How the prompt in a cache was shortened, None if it was not."""
    return getattr(cache, _LAYOUT, None)


def mark(cache: Any, layout: Layout) -> None:
    """Remember on a cache how its prompt was shortened."""
    setattr(cache, _LAYOUT, layout)


def forget_if_empty(cache: Any) -> None:
    """A cache that was reset holds no prompt any more."""
    if layout_of(cache) is not None and int(cache.get_seq_length()) == 0:
        delattr(cache, _LAYOUT)


def restore(cache: Any, layout: Layout | None) -> None:
    """Mark a cache as it was marked before."""
    if layout is not None:
        mark(cache, layout)
    elif layout_of(cache) is not None:
        delattr(cache, _LAYOUT)
