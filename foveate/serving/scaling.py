"""What an image processor does to a picture, found out by trying: whether it scales it first, and whether others change it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..chat import Prompt, collate
from ..loading import Loaded
from .template import placeholder

SIZES = ((1000, 600), (600, 1000), (700, 700))  # of pictures that are tried together


def scaled(processor: Any, image: Image.Image) -> Image.Image:
    """A picture at the size to which the processor scales it first; one that would grow stays as it is."""
    images = processor.image_processor
    size, short = images.size, _shortest(processor)
    if not short or min(image.size) <= short:
        return image
    pixels = images.process_image(image, do_convert_rgb=True)
    made = torch.as_tensor(np.asarray(images.resize(pixels, size=_named(size), resample=images.resample)))
    if made.dtype != torch.uint8 or made.ndim != 3:
        raise TypeError("the processor scales no pixels of 8 bits")
    return Image.fromarray(made.permute(1, 2, 0).contiguous().numpy())


def _shortest(processor: Any) -> int:
    """The shortest side of a picture that the processor has scaled, 0 where it does not say."""
    size = processor.image_processor.size
    if size.get("longest_edge"):  # beside it, Qwen's processors mean numbers of pixels
        return 0
    return int(size.get("shortest_edge") or min(size.get("height") or 0, size.get("width") or 0))


def _named(size: Any) -> Any:
    from transformers.image_utils import SizeDict

    return size if isinstance(size, SizeDict) else SizeDict(**size)


def scales_first(loaded: Loaded) -> bool:
    """Whether a processor makes the same, to the last bit, of pictures that are ``scaled`` already.

    It does where it scales a picture once, and not where it makes tiles of several sizes of it.
    """
    try:
        short = _shortest(loaded.processor)
        if not short:
            return False
        for picture in _pictures([(3 * short, 2 * short), (2 * short, 3 * short), (5 * short // 2, 5 * short // 2)]):
            small = scaled(loaded.processor, picture)
            if small.size == picture.size or not _same(_inputs(loaded, [picture]), _inputs(loaded, [small])):
                return False
    except Exception:  # processors raise whatever they like; then pictures go to them as they are
        return False
    return True


def encodes_apart(loaded: Loaded) -> bool:
    """Whether a processor makes the same of a picture when it is alone and with others, in whatever order."""
    try:
        a, b, c = _pictures(SIZES)
        alone = {id(picture): _seen(loaded, [picture]) for picture in (a, b, c)}
        for row in ((a, b), (b, a), (a, b, c), (c, b, a), (a, a)):
            parts = [alone[id(picture)] for picture in row]
            together = [tile for tiles, _ in parts for tile in tiles], sum(number for _, number in parts)
            if _seen(loaded, row) != together:
                return False
    except Exception:  # then nothing is taken for granted
        return False
    return True


def _pictures(sizes: Sequence[tuple[int, int]]) -> list[Image.Image]:
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes]


def _inputs(loaded: Loaded, images: Sequence[Image.Image]) -> dict[str, Any]:
    content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": "a"}]
    return collate(loaded, [Prompt([{"role": "user", "content": content}], "a", [*images], [])])


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(torch.as_tensor(one[n]), torch.as_tensor(other[n])) for n in one)


def _seen(loaded: Loaded, images: Sequence[Image.Image]) -> tuple[list[bytes], int]:
    """The tiles, or patches, that the encoder gets of pictures, without those that only fill up, and the number of placeholders."""
    inputs, tokenizer = _inputs(loaded, images), loaded.processor.tokenizer
    tiles = [
        tile.float().cpu().numpy().tobytes()
        for values in inputs.values()
        if isinstance(values, Tensor) and values.is_floating_point() and values.ndim >= 2
        for tile in (values if values.ndim == 2 else values.reshape(-1, *values.shape[-3:]))
        if bool(tile.any())
    ]
    number = tokenizer.convert_tokens_to_ids(placeholder(loaded.processor))
    return tiles, int((inputs["input_ids"] == number).sum())
