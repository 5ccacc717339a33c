"""Tokens of a method on their way through the vision encoder, beside the patches.

In a layer they see [CLS], the patches and one another, and nothing sees them. Run in one sequence with the patches, that is a mask
for their columns. Run apart, they need keys and values of the patches only, which were recorded while the encoder ran as always.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import FoveateError, UnsupportedModelError
from ...tokens import EncoderTap
from ..model.anatomy import Anatomy, Block


@dataclass(frozen=True)
class Beside:
    """The layers that make the features, for tokens beside the patches of B pictures (``tokens.SideStream``).

    Attributes
    ----------
    entrance : the norm before the first layer, None = there is none.
    blocks, taps : the layers, and what was recorded of the patches in each; no gradient leads into that.
    patches : [B, N, C] as they were embedded, before their positions are added.
    """

    entrance: nn.Module | None
    blocks: tuple[Block, ...]
    taps: dict[int, EncoderTap]
    patches: Tensor

    def __call__(self, tokens: Tensor) -> Tensor:
        """[B, K, C] tokens that enter the encoder where patches do -> [B, K, C] as they leave the last of its layers."""
        states = self.taps[0].states
        hidden = tokens if states is None else tokens.to(states.dtype)
        hidden = hidden if self.entrance is None else self.entrance(hidden)
        for layer, block in enumerate(self.blocks):
            hidden = hidden + attended(block, self.taps[layer], hidden)
            hidden = hidden + block.mlp(block.norm(hidden))
        return hidden


def attended(block: Block, tap: EncoderTap, hidden: Tensor) -> Tensor:
    """[B, K, C] what attention of a layer adds to tokens [B, K, C] beside the patches of ``tap``."""
    if block.joined is None or block.out is None or tap.values is None:
        raise FoveateError("tokens run beside patches of which no values were recorded. This is a fault of foveate.")
    normed = block.joined(hidden)
    queries, keys, values = block.query(normed), block.key(normed), block.value(normed)
    keys, values = (torch.cat([seen.to(own), own], 1) for seen, own in ((tap.keys, keys), (tap.values, values)))
    apart = [part.unflatten(-1, (block.heads, -1)).transpose(1, 2) for part in (queries, keys, values)]
    mixed: Tensor = block.out(F.scaled_dot_product_attention(*apart).transpose(1, 2).flatten(2))
    return mixed


def layers_beside(parts: Anatomy) -> tuple[int, ...]:
    """The layers that tokens beside the patches run through."""
    return tuple(range(parts.feature_layer() + 1))


def beside(parts: Anatomy, taps: dict[int, EncoderTap], patches: Tensor) -> Beside:
    """The encoder of a model; taps are those of ``layers_beside``, with values."""
    return Beside(parts.entrance, tuple(parts.encoder_block(layer) for layer in taps), taps, patches)


def check_joinable(parts: Anatomy, name: str) -> None:
    """Raise ``UnsupportedModelError`` unless tokens can run beside the patches, and leave the encoder in the space of the features.

    ``name`` is of the method.
    """
    kind, family, layers = parts.tower_kind, parts.family.name, parts.feature_layers()
    why = ""
    if parts.projector is None:
        why = f"visual tokens of {family} are made of what the encoder put out by further layers"
    elif kind.joined is None or kind.qkv is not None:
        why = f"the layers of {kind.model_type} turn tokens by their places, or scale what they add"
    elif len(layers) > 1:
        why = f"features of {family} are those of several encoder layers ({', '.join(map(str, layers))}) side by side"
    elif getattr(parts.model.config, "vision_feature_layer", None) is None and parts.chosen is None:
        why = f"features of {family} are normed once more after the last layer"
    if why:
        raise UnsupportedModelError(
            f"{name} runs tokens of its own through the vision encoder, which this model is not built for: {why}. Use another one."
        )
    for layer in layers_beside(parts):
        parts.encoder_block(layer)
