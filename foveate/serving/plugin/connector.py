"""Visual tokens that stay, where vLLM's encoder-cache connector looks for them: encoded once, for any number of engines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save

from ...fingerprint import digest
from ...places import ready_folder, write_bytes
from .requests import qwen_request

if TYPE_CHECKING:
    from ...pictures import Encoded

FILE, TENSOR = "encoder_cache.safetensors", "ec_cache"  # as vLLM's ECExampleConnector has them


def stored_request(encoded: Encoded, folder: str | Path, *, row: int = 0, merge: int = 2) -> dict[str, Any]:
    """Write the visual tokens of a prompt into a folder that engines share, and name them in a request that brings none itself.

    Each image is a file FOLDER/KEY/encoder_cache.safetensors. It is written as a whole or not at all, and only once: its key says
    what is in it. vLLM ends when a file is gone that a request names, so delete none that is in use.

    Parameters
    ----------
    encoded : of images; what ``foveate.encode`` returned, for Qwen2-VL, Qwen2.5-VL or Qwen3-VL.
    folder : ``shared_storage_path`` of the connector. Whoever can write to it decides what engines see.
    row : the prompt of the batch.
    merge : ``spatial_merge_size`` of the vision encoder.

    Returns
    -------
    ``multi_modal_data`` with the fields of ``qwen_request`` but for ``image_embeds``, and ``multi_modal_uuids`` with the key of
    each image. Put both into the prompt.

    Raises
    ------
    InputError : the prompt has no images, or videos, or the folder cannot be written.
    FoveateError : the disk is full.
    """
    fields = qwen_request(encoded, row=row, merge=merge)["image"]
    embeds = fields.pop("image_embeds")
    counts = (fields["image_grid_thw"].prod(-1) // merge**2).tolist()
    place, keys = ready_folder(folder), []
    pieces = zip(embeds.split(counts), fields["image_positions"].split(counts), fields["image_extents"], strict=True)
    for tokens, positions, extent in pieces:
        contents = save({TENSOR: tokens.contiguous()})
        # vLLM's prefix cache knows an image by its key alone, so the places of its tokens are in it, too
        key = f"foveate-{digest(contents, json.dumps([positions.tolist(), int(extent)]))}"
        file = ready_folder(place / key) / FILE
        if not file.is_file() or file.stat().st_size != len(contents):  # it may have been copied in part
            write_bytes(file, contents)
        keys.append(key)
    return {"multi_modal_data": {"image": fields}, "multi_modal_uuids": {"image": keys}}
