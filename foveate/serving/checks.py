"""Models and embeddings are checked before they reach an engine, which would stop for all requests, or give NaN to others."""

from __future__ import annotations

import torch
from torch import Tensor

from ..engine.model.anatomy import Anatomy
from ..errors import InputError, UnsupportedModelError


def check_servable(parts: Anatomy) -> None:
    """Refuse models whose decoder needs more than embeddings of words and pictures in their order.

    Raises
    ------
    UnsupportedModelError : positions are (t, h, w), tokens of a picture see each other, features enter several layers, layers have
        embeddings of their own, or the model embeds some words in another way beside pictures.
    """
    family, why = parts.family, None
    if family.mrope:
        why = (
            "its visual tokens have (t, h, w) positions, which embeddings in a prompt do not carry. The plugin of vLLM hands them "
            "over for Qwen2-VL, Qwen2.5-VL and Qwen3-VL (docs/serving.md)"
        )
    elif getattr(parts.model.config.get_text_config(), "hidden_size_per_layer_input", 0):
        why = "its layers look up embeddings of their own for each token, which come with token ids only"
    elif family.two_way:
        why = "its visual tokens see each other in both directions, and a plain language model reads from left to right"
    elif parts.deepstack_levels:
        why = "its visual features enter several layers"
    elif family.marks is not None:
        why = "beside pictures it replaces the embeddings of some words, which another engine would look up"
    if why:
        raise UnsupportedModelError(f"{family.name} cannot be served from embeddings: {why}.")


def check_embeds(embeds: object, width: int, what: str = "image_embeds") -> None:
    """Raise ``InputError`` unless ``embeds`` are visual tokens [n, width], finite and at least one.

    Parameters
    ----------
    what : their name in messages, a plural.
    """
    if not isinstance(embeds, Tensor):
        raise InputError(f"{what} of {type(embeds).__name__}; expected a tensor [tokens, {width}]")
    shape = tuple(embeds.shape)
    if embeds.ndim != 2 or shape[1] != width or not shape[0]:
        raise InputError(f"{what} of shape {shape}; expected [tokens, {width}] with at least one token")
    if not embeds.is_floating_point():
        raise InputError(f"{what} are {embeds.dtype}; expected floating-point numbers, in the space of the decoder")
    if not bool(torch.isfinite(embeds).all()):
        raise InputError(f"{what} hold NaN or infinite values, which would spoil other requests, too")
