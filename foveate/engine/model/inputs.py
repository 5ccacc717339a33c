"""What processors return beside the pixels: which of it a model needs, and what stands for no picture at all."""

from __future__ import annotations

from collections.abc import Sized
from typing import Any

from torch import Tensor

from ...errors import InputError

RAW_INPUTS = ("pixel_values", "pixel_values_images", "pixel_values_videos", "image_patches")
TENSORS = ("input_ids", "attention_mask", "position_ids", "labels", *RAW_INPUTS)  # of them nothing else is taken
BESIDE = (
    *("image_grid_thw", "video_grid_thw", "image_sizes", "spatial_shapes", "batch_num_images"),
    *("image_position_ids", "video_position_ids", "num_frames_per_video"),
    *("pixel_attention_mask", "second_per_grid_ts"),
)
# how visual tokens are arranged in the prompt, and where a model reads the sizes of pictures that this depends on
SIZES = {"thw": "{modality}_grid_thw", "packed": "image_sizes", "sizes": "image_sizes", "shapes": "spatial_shapes"}
SIZES |= {"places": "{modality}_position_ids"}
COUNTS = {("places", "video"): "num_frames_per_video"}  # where the frames of all videos follow one another


def is_none(value: Any) -> bool:
    """Whether an input is not given, or given for no picture, as collators do for batches of text."""
    if isinstance(value, Tensor):
        return value.numel() == 0
    return value is None or (isinstance(value, Sized) and len(value) == 0)


def without_empty(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments without inputs of no picture; the same dictionary where there are none."""
    empty = {name for name in (*RAW_INPUTS, *BESIDE) if arguments.get(name) is not None and is_none(arguments[name])}
    return {name: value for name, value in arguments.items() if name not in empty} if empty else arguments


def check_tensors(ids: Any, arguments: dict[str, Any]) -> None:
    """Refuse a prompt with pictures that is no batch of tensors.

    Raises
    ------
    InputError : it is something else, such as the lists of a processor that was not asked for tensors.
    """
    for name, value in {**arguments, "input_ids": ids}.items():
        if name in TENSORS and value is not None and not isinstance(value, Tensor):
            raise InputError(
                f"{name} is of type {type(value).__name__}; expected a tensor. Call the processor with return_tensors='pt'."
            )
    if ids is None:
        return
    if ids.ndim != 2 or ids.is_floating_point():
        raise InputError(
            f"input_ids are {ids.dtype} of shape {tuple(ids.shape)}; expected whole numbers of shape [batch, tokens]. "
            "A single prompt is input_ids[None]."
        )
    mask = arguments.get("attention_mask")
    if mask is not None and (mask.ndim < 2 or len(mask) not in (1, len(ids))):
        raise InputError(
            f"attention_mask has shape {tuple(mask.shape)} and input_ids {tuple(ids.shape)}; give one row for each prompt."
        )


def check_sizes(arrangement: str | None, modality: str, arguments: dict[str, Any]) -> None:
    """Refuse pictures without their sizes, where placeholders depend on them, and frames that belong to no video.

    Raises
    ------
    InputError : they are missing, or do not fit.
    """
    name = SIZES.get(arrangement or "", "").format(modality=modality)
    if name and is_none(arguments.get(name)):
        raise InputError(f"{modality}s and no {name}, which says how large each of them is. Pass all that the processor returned.")
    counts = COUNTS.get((arrangement or "", modality))
    if counts is None:
        return
    if is_none(arguments.get(counts)):
        raise InputError(f"{modality}s and no {counts}, which says whose each frame is. Pass all that the processor returned.")
    told, frames = int(arguments[counts].sum()), len(arguments[name])
    if told != frames:
        raise InputError(f"{counts} counts {told} frames, and there are {frames}. Pass all that the processor returned.")
