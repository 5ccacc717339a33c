"""What processors return beside the pixels: which of it a model needs, and what stands for no picture at all."""

from __future__ import annotations

from collections.abc import Sized
from typing import Any

from torch import Tensor

from ...errors import InputError

RAW_INPUTS = ("pixel_values", "pixel_values_images", "pixel_values_videos", "image_patches")
BESIDE = ("image_grid_thw", "video_grid_thw", "image_sizes", "batch_num_images", "pixel_attention_mask", "second_per_grid_ts")
# how visual tokens are arranged in the prompt, and where a model reads the sizes of pictures that this depends on
SIZES = {"thw": "{modality}_grid_thw", "packed": "image_sizes", "sizes": "image_sizes"}


def is_none(value: Any) -> bool:
    """Whether an input is not given, or given for no picture, as collators do for batches of text."""
    if isinstance(value, Tensor):
        return value.numel() == 0
    return value is None or (isinstance(value, Sized) and len(value) == 0)


def without_empty(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments without inputs of no picture; the same dictionary where there are none."""
    empty = {name for name in (*RAW_INPUTS, *BESIDE) if arguments.get(name) is not None and is_none(arguments[name])}
    return {name: value for name, value in arguments.items() if name not in empty} if empty else arguments


def check_sizes(arrangement: str | None, modality: str, arguments: dict[str, Any]) -> None:
    """Refuse pictures without their sizes, where placeholders depend on them.

    Raises
    ------
    InputError : they are missing.
    """
    name = SIZES.get(arrangement or "", "").format(modality=modality)
    if name and is_none(arguments.get(name)):
        raise InputError(f"{modality}s and no {name}, which says how large each of them is. Pass all that the processor returned.")
