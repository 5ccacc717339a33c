"""Floating-point operations of a decoder's prefill, and of a vision encoder, from their configs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def prefill_flops(config: Any, tokens: int | Sequence[int]) -> int:
    """Operations (2 per multiply-add) to prefill a prompt: projections, attention, gated MLP, one row of logits.

    Parameters
    ----------
    config : of a Llama-type decoder, or of a model that has one (``get_text_config``).
    tokens : length of the prompt, visual tokens included; one for each decoder layer where they differ.
    """
    config = config.get_text_config()
    width, layers, heads = config.hidden_size, config.num_hidden_layers, config.num_attention_heads
    head = getattr(config, "head_dim", None) or width // heads
    key_value = (getattr(config, "num_key_value_heads", None) or heads) * head
    projections = 2 * width * heads * head + 2 * width * key_value
    mlp = 3 * width * config.intermediate_size
    each = [tokens] * layers if isinstance(tokens, int) else tokens
    # scores and values of causal attention, each over half of the square
    return 2 * (sum(number * (projections + mlp + number * heads * head) for number in each) + width * config.vocab_size)


def encoder_flops(config: Any, tokens: Sequence[int]) -> int:
    """Operations (2 per multiply-add) of a CLIP- or SigLIP-type vision encoder for one picture.

    Parameters
    ----------
    config : of the encoder.
    tokens : that enter the first layer, and that leave each layer, [CLS] included. The attention of a layer runs what entered it,
        its MLP what leaves it.
    """
    width, inner, entering, leaving = config.hidden_size, config.intermediate_size, tokens[:-1], tokens[1:]
    embedding = config.num_channels * config.patch_size**2 * width * entering[0]
    blocks = sum(n * (4 * width**2 + 2 * n * width) + left * 2 * width * inner for n, left in zip(entering, leaving, strict=True))
    return 2 * (embedding + blocks)
