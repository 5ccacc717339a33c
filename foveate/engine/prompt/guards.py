"""Two places where transformers reads position ids to detect packed sequences, and would take the gaps of kept tokens for borders.

Only needed where kept tokens hold their original positions. Truly packed sequences, whose positions begin anew, are left alone.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from ..model.seams import cache_in

Changed: TypeAlias = "tuple[tuple[Any, ...], dict[str, Any]] | None"


@torch.compiler.disable
def _increasing(positions: Tensor) -> bool:
    return bool((positions.diff(dim=-1) > 0).all())


@torch.compiler.disable
def _padded(mask: Any) -> bool:
    """Whether positions repeat because of padding, and not because sequences are packed."""
    return isinstance(mask, Tensor) and mask.ndim == 2 and not bool(mask.all())


class _Guards:
    """The hooks of one decoder; ``active`` is found once per forward and read by every layer."""

    def __init__(self) -> None:
        self.active = False

    def decoder(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Changed:
        """Without mask and cache the decoder looks for packed sequences: give it a mask of ones."""
        positions, embeds = kwargs.get("position_ids"), kwargs.get("inputs_embeds")
        mask, cache = kwargs.get("attention_mask"), cache_in(kwargs)
        if positions is None or embeds is None:
            self.active = False
            return None
        self.active = positions.shape[-1] == 1 or _increasing(positions) or _padded(mask)
        if self.active and mask is None and cache is None:
            kwargs["attention_mask"] = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
            return args, kwargs
        return None

    def layer(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Changed:
        """Flash attention looks again in every layer, which needs no positions: its rotary embeddings are computed already."""
        if not self.active or kwargs.get("position_embeddings") is None or kwargs.get("position_ids") is None:
            return None
        kwargs["position_ids"] = None
        return args, kwargs


def guard_positions(model: PreTrainedModel) -> list[RemovableHandle]:
    """Install both guards; the caller removes the handles."""
    decoder, guards = model.get_decoder(), _Guards()
    handles = [decoder.register_forward_pre_hook(guards.decoder, with_kwargs=True)]
    handles += [layer.register_forward_pre_hook(guards.layer, with_kwargs=True) for layer in getattr(decoder, "layers", ())]
    return handles
