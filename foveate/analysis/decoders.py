"""The text decoder of a model from its config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ..errors import UnsupportedModelError
from .architecture import CENTRED_NORM, LAYER_NORM, RMS_NORM, Decoder, Norm, Stack


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
    head_bias: bool = False
    rotary: bool | Literal["windows"] = True


_BIASED = _Kind(qkv="attention_bias", out="attention_bias")
_DECODERS = {
    "llama": _Kind(qkv="attention_bias", out="attention_bias", mlp="mlp_bias"),
    **dict.fromkeys(("mistral", "ministral3"), _Kind()),
    **dict.fromkeys(("qwen2", "qwen2_vl_text", "qwen2_5_vl_text"), _Kind(qkv=True)),
    **dict.fromkeys(("qwen3", "qwen3_vl_text"), _Kind(qkv="attention_bias", out="attention_bias", query_norm=True)),
    "gemma": _BIASED,
    "gemma2": _Kind(qkv="attention_bias", out="attention_bias", norms=4),
    "gemma3_text": _Kind(qkv="attention_bias", out="attention_bias", norms=4, query_norm=True),
    "phi": _Kind(True, True, True, gated=False, norms=1, norm=LAYER_NORM, query_norm="qk_layernorm", head_bias=True),
    "phi3": _Kind(),
    "glm4v_text": _Kind(qkv=True, norms=4),
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

    heads, layers = config.num_attention_heads, config.num_hidden_layers
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None) or ["full_attention" if window is None else "sliding_attention"] * layers
    unknown = sorted(set(types) - {"full_attention", "sliding_attention"})
    if unknown:
        raise UnsupportedModelError(f"the cost of layers of type {unknown[0]!r} is not known; only full and sliding attention are")
    stack = Stack(
        width=config.hidden_size,
        inner=config.intermediate_size,
        layers=layers,
        heads=heads,
        key_value_heads=getattr(config, "num_key_value_heads", None) or heads,
        head=getattr(config, "head_dim", None) or config.hidden_size // heads,
        gated=kind.gated,
        qkv_bias=flag(kind.qkv),
        out_bias=flag(kind.out),
        mlp_bias=flag(kind.mlp),
        norms=kind.norms,
        norm=kind.norm,
        query_norm=kind.norm if flag(kind.query_norm) else None,
        rotary=kind.rotary,
        windows=tuple(window if each == "sliding_attention" else None for each in types),
    )
    return Decoder(stack, config.vocab_size, tied, kind.head_bias, causal)
