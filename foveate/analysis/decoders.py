"""The text decoder of a model from its config."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from ..errors import UnsupportedModelError
from .architecture import BARE_NORM, CENTRED_NORM, LAYER_NORM, RMS_NORM, Decoder, Experts, Mixer, Norm, Stack

STATES = ("linear_attention", "conv")
"""Layers that hold a state in the place of keys and values."""


@dataclass(frozen=True)
class _Kind:
    """How text decoders of one kind differ; a string names the field of the config that says so."""

    qkv: bool | str = False
    out: bool | str = False
    mlp: bool | str = False
    gated: bool = True
    norms: int = 2
    norm: Norm = RMS_NORM
    query_norm: bool | str = False
    query_kind: Norm | None = None
    head_bias: bool = False
    rotary: bool | Literal["windows"] = True
    gates: bool = False
    experts: Callable[[Any], Experts | None] | None = None
    own: Callable[[Any, Stack], tuple[Stack, ...]] | None = None
    dense: Callable[[Any], Sequence[int]] = lambda config: ()
    mixer: Callable[[Any], Mixer] | None = None
    inner: Callable[[Any], int] = lambda config: getattr(config, "intermediate_size", 0)


def _chosen(config: Any) -> Experts:
    shared = getattr(config, "shared_expert_intermediate_size", 0)
    return Experts(
        config.num_experts, config.num_experts_per_tok, config.moe_intermediate_size, shared=shared, weighed=bool(shared)
    )


def _routed(config: Any) -> Experts:
    inner = config.moe_intermediate_size
    return Experts(config.n_routed_experts, config.num_experts_per_tok, inner, shared=config.n_shared_experts * inner)


def _scattered(config: Any) -> Experts:
    inner = config.intermediate_size
    return Experts(config.num_local_experts, config.num_experts_per_tok, inner, shared=inner)


def _beside(config: Any) -> Experts | None:
    if not config.enable_moe_block:
        return None
    return Experts(config.num_experts, config.top_k_experts, config.moe_intermediate_size, beside=True)


def _apart(config: Any, stack: Stack) -> tuple[Stack, ...]:
    """Layers with heads of two widths, of which the last ones read the keys and values of earlier ones."""
    found, first = [], config.num_hidden_layers - config.num_kv_shared_layers
    for number, layer in enumerate(stack.each):
        own, whole = config.per_layer_config[number], config.layer_types[number] == "full_attention"
        heads = {"head": own.head_dim, "key_value_heads": own.num_key_value_heads, "one": config.attention_k_eq_v and whole}
        inner = layer.inner * (2 if config.use_double_wide_mlp and number >= first else 1)
        found.append(replace(layer, inner=inner, reads=number >= first, **heads))
    return tuple(found)


def _without_experts(config: Any) -> list[int]:
    """Where every other layer or so has experts, and some that are named have none."""
    step, named = config.decoder_sparse_step, config.mlp_only_layers
    return [layer for layer in range(config.num_hidden_layers) if layer in named or (layer + 1) % step]


def _delta_net(config: Any) -> Mixer:
    """Queries, keys and values, which are convolved; a gate as wide as the values; two numbers for each head of values."""
    heads, reach = config.linear_num_value_heads, config.linear_conv_kernel_dim
    keys, values = config.linear_num_key_heads * config.linear_key_head_dim, heads * config.linear_value_head_dim
    convolved = 2 * keys + values
    state = values * config.linear_key_head_dim
    return Mixer(convolved + values + 2 * heads, convolved, values, reach, state, more=2 * heads + config.linear_value_head_dim)


def _short_convolution(config: Any) -> Mixer:
    """Two gates around a convolution."""
    width = config.hidden_size
    return Mixer(3 * width, width, width, config.conv_L_cache, biases=config.conv_bias * 5 * width)


def _two_thirds(config: Any) -> int:
    """Channels inside an MLP that is made as large as one without a gate, in whole blocks."""
    inner, block = config.intermediate_size, config.block_multiple_of
    if config.block_auto_adjust_ff_dim:
        inner = int((config.block_ffn_dim_multiplier or 1) * int(2 * inner / 3))
        inner = -(-inner // block) * block
    return int(inner)


_BIASED = _Kind(qkv="attention_bias", out="attention_bias")
_QWEN3 = replace(_BIASED, query_norm=True)
_DECODERS = {
    "llama": _Kind(qkv="attention_bias", out="attention_bias", mlp="mlp_bias"),
    **dict.fromkeys(("mistral", "ministral3"), _Kind()),
    **dict.fromkeys(("qwen2", "qwen2_vl_text", "qwen2_5_vl_text"), _Kind(qkv=True)),
    **dict.fromkeys(("qwen3", "qwen3_vl_text"), _QWEN3),
    "qwen3_vl_moe_text": replace(_QWEN3, experts=_chosen, dense=_without_experts),
    "qwen3_5_text": replace(_QWEN3, gates=True, mixer=_delta_net),
    "qwen3_5_moe_text": replace(_QWEN3, gates=True, mixer=_delta_net, experts=_chosen),
    "gemma": _BIASED,
    "gemma2": _Kind(qkv="attention_bias", out="attention_bias", norms=4),
    "gemma3_text": _Kind(qkv="attention_bias", out="attention_bias", norms=4, query_norm=True),
    "gemma4_text": replace(_BIASED, norms=4, query_norm=True, experts=_beside, own=_apart),
    "phi": _Kind(True, True, True, gated=False, norms=1, norm=LAYER_NORM, query_norm="qk_layernorm", head_bias=True),
    "phi3": _Kind(),
    "glm4v_text": _Kind(qkv=True, norms=4),
    "glm4v_moe_text": _Kind(qkv="attention_bias", experts=_routed, dense=lambda config: range(config.first_k_dense_replace)),
    "paddleocr_vl_text": _Kind(qkv="use_bias", out="use_bias", mlp="use_bias"),
    "llama4_text": replace(
        _BIASED,
        query_norm="use_qk_norm",
        query_kind=BARE_NORM,
        rotary="windows",
        experts=_scattered,
        dense=lambda config: sorted({*range(config.num_hidden_layers)} - {*config.moe_layers}),
        inner=lambda config: int(config.intermediate_size_mlp),
    ),
    "lfm2": _Kind(query_norm=True, mixer=_short_convolution, inner=_two_thirds),
    "cohere2": _Kind(qkv="attention_bias", out="attention_bias", norms=1, norm=CENTRED_NORM, rotary="windows"),
}


def read_decoder(whole: Any, tied: bool, causal: bool = True) -> Decoder:
    """The decoder of a config, or of the text config inside it; ``tied`` is whether its head shares the embeddings.

    Raises
    ------
    UnsupportedModelError : it is of a kind that is not known here, or its layers differ in more than windows.
    """
    config = whole.get_text_config()
    name = config.model_type
    kind = _DECODERS.get(name)
    if kind is None:
        raise UnsupportedModelError(
            f"the cost of a text decoder of type {name!r} is not known: its layers may differ from those of {', '.join(_DECODERS)}."
        )

    def flag(value: bool | str) -> bool:
        return bool(getattr(config, value, False)) if isinstance(value, str) else value

    first = getattr(config, "per_layer_config", None) or [config]  # layers may differ, in newer versions of transformers
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    chunk = getattr(config, "attention_chunk_size", None)
    window = getattr(config, "sliding_window", None) or chunk
    types = getattr(config, "layer_types", None) or ["full_attention" if window is None else "sliding_attention"] * layers
    windowed = ("sliding_attention", *(["chunked_attention"] if chunk else []))
    known = {"full_attention", *windowed, *(STATES if kind.mixer else ())}
    unknown = sorted(set(types) - known)
    if unknown:
        raise UnsupportedModelError(f"the cost of layers of type {unknown[0]!r} is not known in a decoder of type {name!r}")
    stack = Stack(
        width=config.hidden_size,
        inner=kind.inner(config),
        layers=layers,
        heads=heads,
        key_value_heads=getattr(first[0], "num_key_value_heads", None) or heads,
        head=getattr(first[0], "head_dim", None) or config.hidden_size // heads,
        gated=kind.gated,
        qkv_bias=flag(kind.qkv),
        out_bias=flag(kind.out),
        mlp_bias=flag(kind.mlp),
        norms=kind.norms,
        norm=kind.norm,
        query_norm=(kind.query_kind or kind.norm) if flag(kind.query_norm) else None,
        rotary=kind.rotary,
        windows=tuple(window if each in windowed else None for each in types),
        chunks="chunked_attention" in types,
        gates=kind.gates,
        experts=kind.experts(config) if kind.experts else None,
        dense=tuple(kind.dense(config)),
        mixer=kind.mixer(config) if kind.mixer else None,
        mixed=tuple(number for number, each in enumerate(types) if each in STATES),
        embeds=getattr(config, "hidden_size_per_layer_input", 0),
    )
    if kind.own is not None:
        stack = replace(stack, own=kind.own(config, stack))
    words = getattr(config, "vocab_size_per_layer_input", 0)
    return Decoder(stack, config.vocab_size, tied, kind.head_bias, causal, words)
