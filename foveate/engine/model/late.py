"""Models whose forward projects the encoded pictures that it is handed (Llama 4), so that it cannot be handed visual tokens.

Pictures are projected where they are encoded, as those of other models are, and take the places of their placeholders here, before
the model's forward: it gets embeddings. Whatever expands or slices encoded pictures on the way, as beam search does, finds them as
it finds those of other models.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from .anatomy import Anatomy
from .seams import PRE_ENCODED


def with_projection(parts: Anatomy, output: Any) -> Any:
    """The encoder output with visual tokens in the space of the decoder, also where the model's forward would project them."""
    if parts.family.late is not None:
        projector = attrgetter(parts.family.late)(parts.model.base_model)
        output["pooler_output"] = projector(output.last_hidden_state)
    return output


def taking_visual_tokens(model: Any, original: Callable[..., Any]) -> Callable[..., Any]:
    """A model's own forward, which takes pictures that are projected already."""

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **_embedded(model, kwargs))

    return forward


def _embedded(model: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a forward with embeddings in the place of token ids and pictures; the same where no pictures are projected."""
    ids, output = arguments.get("input_ids"), (arguments.get(PRE_ENCODED) or {}).get("image")
    if ids is None or output is None or output.get("pooler_output") is None:
        return arguments
    words = model.get_input_embeddings()(ids)
    visual = torch.cat(list(output.pooler_output)).to(words.device, words.dtype)
    places = model.get_placeholder_mask(ids, inputs_embeds=words, image_features=visual)
    rest = {name: value for name, value in arguments.items() if name not in ("input_ids", PRE_ENCODED)}
    return {**rest, "inputs_embeds": words.masked_scatter(places, visual)}


def mended(model: Any) -> RemovableHandle:
    """Let the forward of transformers 5.24.0 work: it reads a field of its language model's output that this does not have.

    The caller removes the handle.
    """
    language: nn.Module = model.base_model.language_model
    return language.register_forward_hook(_filled)


def _filled(_: nn.Module, __: Any, output: Any) -> None:
    if not isinstance(output, tuple) and not hasattr(output, "image_outputs"):
        output.image_outputs = None
