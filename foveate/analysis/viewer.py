"""The conventions of LLM-Viewer, the tool behind Table 2 of LLaVA-PruMerge, as it was in February and March 2024.

Kept as they were, whatever one may think of them. The activation of the MLP is as wide as the model, not as its inside; an addition
reads one of its operands; fused attention writes the whole square, twice, and reads keys and values as often as there are query
heads, but one of the two only; the head counts one operation per multiply-add and one byte per weight whatever the bits, and moves
the activations of one row. There are no embeddings, rotations, biases, windows, vision encoder or projector; a head has
``width / heads`` channels; causal attention computes the whole square. The peak is that of 8 bits where weights, activations and
cache all have at most 8, else that of 16, for matrix products and everything else.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from .architecture import Decoder
from .operators import Operator, Precision


def viewer_layer(
    decoder: Decoder, batch: float, tokens: float, precision: Precision, fused: bool, decoding: bool
) -> Iterator[Operator]:
    """One decoder layer over prompts of ``tokens``, or ``decoding`` one more token after them."""
    stack, bits = decoder.stack, viewer_bits(precision)
    width, heads = stack.width, stack.heads
    head = width // heads
    narrow = width * stack.key_value_heads / heads
    queries = 1 if decoding else tokens
    rows = batch * queries
    weight, size, cache = precision.weight / 8, precision.activation / 8, precision.cache / 8
    shapes = {"q_proj": (width, width), "k_proj": (width, narrow), "v_proj": (width, narrow), "o_proj": (width, width)}
    shapes |= {"gate_proj": (width, stack.inner)} if stack.gated else {}
    shapes |= {"up_proj": (width, stack.inner), "down_proj": (stack.inner, width)}
    for name, (inputs, outputs) in shapes.items():
        kept = name in ("k_proj", "v_proj")
        yield Operator(
            name,
            flops=2 * rows * inputs * outputs,
            weights=inputs * outputs * weight,
            loads=rows * inputs * size,
            stores=0 if kept else rows * outputs * size,
            cache_stores=rows * outputs * cache if kept else 0,
            bits=bits,
        )
    product, pairs = 2 * rows * tokens * head * heads, rows * tokens * heads
    asked, square = rows * head * heads * size, pairs * size
    if fused:
        blocks = math.ceil(queries / head)
        read = blocks * batch * tokens * head * heads * cache
        yield Operator("attention", 2 * product + 5 * pairs, loads=asked, stores=2 * square, cache_loads=read, bits=bits)
    else:
        read = batch * tokens * head * stack.key_value_heads * cache
        scores = {"loads": asked, "cache_loads": read} if decoding else {"cache_loads": 2 * read}
        yield Operator("scores", product, stores=square, bits=bits, **scores)
        yield Operator("values", product, loads=square, stores=asked, cache_loads=read, bits=bits)
        yield Operator("softmax", 5 * pairs, loads=square, stores=square, bits=bits)
    values = rows * width
    for name, each in (("attention norm", 7), ("mlp norm", 7), ("attention add", 1), ("mlp add", 1)):
        yield Operator(name, each * values, loads=values * size, stores=values * size, bits=bits)
    yield Operator("mlp activation", 2 * values, loads=2 * values * size, stores=values * size, bits=bits)


def viewer_head(decoder: Decoder, batch: float, precision: Precision) -> Operator:
    """The logits, as the tool counts them."""
    width, size = decoder.stack.width, precision.activation / 8
    matrix = width * decoder.vocabulary
    return Operator("lm_head", batch * matrix, matrix, width * size, decoder.vocabulary * size, bits=viewer_bits(precision))


def viewer_bits(precision: Precision) -> float:
    """The width whose peak all operators run at."""
    return 8 if max(precision.weight, precision.activation, precision.cache) <= 8 else 16
