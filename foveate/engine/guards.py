"""Two places where transformers reads position ids to detect packed sequences, and would take the gaps of kept tokens for borders.

Only needed where kept tokens hold their original positions.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

Changed: TypeAlias = "tuple[tuple[Any, ...], dict[str, Any]] | None"


def _mask_instead_of_none(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Changed:
    """Without mask and cache the decoder looks for packed sequences: give it a mask of ones."""
    positions, embeds = kwargs.get("position_ids"), kwargs.get("inputs_embeds")
    if positions is None or embeds is None:
        return None
    if kwargs.get("attention_mask") is None and kwargs.get("past_key_values") is None:
        kwargs["attention_mask"] = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
        return args, kwargs
    return None


def _no_positions(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Changed:
    """Flash attention looks again in every layer; rotary embeddings have been computed before, so a layer needs no positions."""
    if kwargs.get("position_embeddings") is None or kwargs.get("position_ids") is None:
        return None
    kwargs["position_ids"] = None
    return args, kwargs


def guard_positions(model: PreTrainedModel) -> list[RemovableHandle]:
    """Install both guards; the caller removes the handles."""
    decoder = model.get_decoder()
    handles = [decoder.register_forward_pre_hook(_mask_instead_of_none, with_kwargs=True)]
    handles += [layer.register_forward_pre_hook(_no_positions, with_kwargs=True) for layer in getattr(decoder, "layers", ())]
    return handles
