"""All questions of a picture in one forward: the picture is the prefix, and each question sees the prefix and itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .vocabulary import BOS, TOKEN_ID

IMAGE_PREFIX = (BOS, TOKEN_ID["user:"])


def answer_mask(prefix: Tensor, block: Tensor) -> Tensor:
    """Who may attend to whom, [B, 1, P + T, P + T].

    Parameters
    ----------
    prefix : [B, P] bool, which tokens of the prefix are real (reduced pictures have fewer).
    block : [B, T] number of the question of each text token, -1 = padding.
    """
    length = prefix.shape[1] + block.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=block.device).tril()
    owner = torch.cat([block.new_full(prefix.shape, -2), block], 1)
    same = (owner[:, :, None] == owner[:, None]) | (owner == -2)[:, None]
    real = torch.cat([prefix, torch.ones_like(block, dtype=torch.bool)], 1)
    mask = same & causal & real[:, None]
    # a row must see something, or its softmax is not a number
    return (mask | torch.eye(length, dtype=torch.bool, device=block.device))[:, None]


def text_states(model: Any, visual: Tensor, real: Tensor, text: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """Hidden states of all decoder layers at the text tokens, each [B, T, D]; the last one is normalised.

    Parameters
    ----------
    model : a pocket model.
    visual : [B, K, D] visual tokens in the space of the decoder.
    real : [B, K] bool, which of them a picture has; they come first.
    text : ``ids``, ``block`` and ``offset`` [B, T].
    """
    decoder = model.model.language_model
    embed = decoder.embed_tokens
    head = embed(torch.tensor(IMAGE_PREFIX, device=visual.device)).expand(len(visual), -1, -1)
    inputs = torch.cat([head.to(visual.dtype), visual, embed(text["ids"]).to(visual.dtype)], 1)
    prefix = torch.cat([real.new_ones(len(real), head.shape[1]), real], 1)
    before = torch.arange(prefix.shape[1], device=visual.device).expand(len(visual), -1)
    places = torch.cat([before, prefix.sum(1, keepdim=True) + text["offset"]], 1)
    out = decoder(
        inputs_embeds=inputs,
        attention_mask=answer_mask(prefix, text["block"]),
        position_ids=places,
        use_cache=False,
        output_hidden_states=True,
    )
    return tuple(hidden[:, prefix.shape[1] :] for hidden in out.hidden_states)
