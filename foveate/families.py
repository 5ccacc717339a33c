"""The table of models. Models differ in data, not in code: supporting one more is a row here.

The engine, the analysis of costs and the plugin of vLLM read it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Family:
    """One kind of vision-language model; paths are attributes of ``model.base_model``.

    Attributes
    ----------
    example : Hub id of one model.
    images, videos : how the visual tokens of a picture, or a video, are arranged in its run of placeholders (a name in
        ``arrangement.ARRANGEMENTS``); None = the engine does not take it.
    tower, video_tower : vision encoders; None = the one of pictures.
    projector : where it works on each token by itself, so that tokens can be merged before it; None = they are merged after it.
    joins : the layers of the projector, for their cost (a name in ``analysis.projectors.SHAPES``).
    shrinkable : every patch that leaves the encoder is a visual token, so that methods inside the encoder can act.
    mrope : tokens have (t, h, w) positions, which those that stay keep.
    first_position : of a prompt.
    two_way : tokens of a picture see each other in the decoder, not only those before them.
    since : the first version of transformers whose model takes encoded pictures as the engine hands them in.
    vllm : its class in vLLM, and the module and class of ``serving.plugin`` that take its place; None = there is none.
    notes : what is different from what one may expect.
    """

    model_type: str
    name: str
    example: str
    images: str = "grid"
    videos: str | None = None
    tower: str = "vision_tower"
    video_tower: str | None = None
    projector: str | None = "multi_modal_projector"
    shrinkable: bool = False
    mrope: bool = False
    first_position: int = 0
    two_way: bool = False
    joins: str = "mlp"
    since: str = "5.18"
    vllm: tuple[str, str] | None = None
    notes: str = ""


@dataclass(frozen=True)
class TowerKind:
    """One kind of vision encoder; ``layers`` is an attribute of the tower, the other paths are attributes of one of its layers.

    In a layer that methods can act in, tokens run through ``x + attention(...)``, then ``x + mlp(norm(x))``.

    Attributes
    ----------
    qkv : one projection of queries, keys and values, where these are not apart.
    resizable : takes pictures of any size, with the option ``interpolate_pos_encoding``.
    rotary : queries and keys are turned by rotary embeddings after their projections, where the engine reads them.
    windows : patches are in the order of attention windows inside the encoder.
    any_size : pictures keep their own sizes, and each patch is a visual token.
    shape : its layers, for their cost (a name in ``analysis.towers.SHAPES``).
    pools : a layer of attention after the last one pools all patches; its weights are there, and nobody reads what it gives.
    gated : its MLPs are gated, and its norms without means.
    patch_bias : the first convolution has a bias.
    vllm : ``layers`` in vLLM's own encoder; None = tokens of this encoder cannot be reduced inside vLLM.
    """

    model_type: str
    has_cls: bool = False
    layers: str = "encoder.layers"
    attention: str = "self_attn"
    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    qkv: str | None = None
    norm: str = "layer_norm2"
    mlp: str = "mlp"
    resizable: bool = False
    rotary: bool = False
    windows: bool = False
    any_size: bool = False
    shape: str = "plain"
    pools: bool = False
    gated: bool = False
    patch_bias: bool = True
    vllm: str | None = None


def _qwen(
    model_type: str,
    name: str,
    example: str,
    *,
    joins: str = "merger",
    videos: str | None = "thw",
    vllm: tuple[str, str] | None = None,
) -> Family:
    places = Family(model_type, name, example, images="thw", videos=videos, tower="visual", projector=None, mrope=True)
    return replace(places, joins=joins, vllm=vllm)


def _fused(model_type: str, **more: Any) -> TowerKind:
    places = TowerKind(model_type, layers="blocks", attention="attn", qkv="attn.qkv", rotary=True, shape="fused")
    return replace(places, **more)


_TILES = "each tile of a large picture is a picture of its own"
_FRAMES = "frames of a video come as pictures"

FAMILIES = {
    family.model_type: family
    for family in (
        Family(
            "llava",
            "LLaVA-1.5",
            "llava-hf/llava-1.5-7b-hf",
            shrinkable=True,
            vllm=("LlavaForConditionalGeneration", "llava:FoveateLlava"),
        ),
        Family("vipllava", "VipLLaVA", "llava-hf/vip-llava-7b-hf", shrinkable=True, joins="normed mlp", since="5.23"),
        Family("llava_next", "LLaVA-NeXT", "llava-hf/llava-v1.6-mistral-7b-hf", images="packed", joins="mlp, newline"),
        Family(
            "llava_next_video",
            "LLaVA-NeXT-Video",
            "llava-hf/LLaVA-NeXT-Video-7B-hf",
            images="packed",
            videos="frames",
            joins="mlp, newline",
            since="5.21",
        ),
        Family(
            "llava_onevision",
            "LLaVA-OneVision",
            "llava-hf/llava-onevision-qwen2-7b-ov-hf",
            images="packed",
            videos="frames",
            projector=None,
            joins="mlp, newline",
        ),
        Family(
            "video_llava",
            "Video-LLaVA",
            "LanguageBind/Video-LLaVA-7B-hf",
            videos="frames",
            tower="image_tower",
            video_tower="video_tower",
            shrinkable=True,
            since="5.21",
        ),
        _qwen("qwen2_vl", "Qwen2-VL", "Qwen/Qwen2-VL-7B-Instruct", vllm=("Qwen2VLForConditionalGeneration", "qwen:FoveateQwen2VL")),
        _qwen(
            "qwen2_5_vl",
            "Qwen2.5-VL",
            "Qwen/Qwen2.5-VL-7B-Instruct",
            vllm=("Qwen2_5_VLForConditionalGeneration", "qwen:FoveateQwen25VL"),
        ),
        _qwen("qwen3_vl", "Qwen3-VL", "Qwen/Qwen3-VL-8B-Instruct"),
        Family("internvl", "InternVL", "OpenGVLab/InternVL3-8B-hf", images="runs", projector=None, joins="shuffle", notes=_FRAMES),
        Family("gemma3", "Gemma 3", "google/gemma-3-4b-it", projector=None, two_way=True, joins="pooled"),
        Family(
            "paligemma",
            "PaliGemma",
            "google/paligemma2-3b-mix-448",
            shrinkable=True,
            first_position=1,
            two_way=True,
            joins="linear",
        ),
        Family(
            "idefics3",
            "Idefics3",
            "HuggingFaceM4/Idefics3-8B-Llama3",
            "tiles",
            tower="vision_model",
            projector=None,
            joins="one",
            notes=_TILES,
        ),
        Family(
            "smolvlm",
            "SmolVLM",
            "HuggingFaceTB/SmolVLM2-2.2B-Instruct",
            "tiles",
            tower="vision_model",
            projector=None,
            joins="one",
            since="5.21",
            notes=f"{_TILES}; {_FRAMES}",
        ),
        Family(
            "mistral3",
            "Mistral 3",
            "mistralai/Mistral-Small-3.1-24B-Instruct-2503",
            images="sizes",
            projector=None,
            joins="merged mlp",
        ),
        Family("aya_vision", "Aya Vision", "CohereLabs/aya-vision-8b", projector=None, joins="gated", notes=_TILES),
        _qwen("glm4v", "GLM-4V", "zai-org/GLM-4.1V-9B-Thinking", videos=None, joins="convolution"),
    )
}
REFUSED = {
    "mllama": "pictures enter by cross-attention: there are no visual tokens in the prompt to remove",
    "idefics": "pictures enter by cross-attention: there are no visual tokens in the prompt to remove",
    "blip-2": "its Q-Former makes 32 tokens of any picture already",
    "instructblip": "its Q-Former makes 32 tokens of any picture already",
    "instructblipvideo": "its Q-Former makes 32 tokens of any picture already",
    "llama4": "its forward projects what the encoder gave, where no other number of tokens can be handed in",
    "fuyu": "it has no vision encoder: patches of pixels are the tokens",
    "chameleon": "visual tokens are words of its vocabulary",
    "emu3": "visual tokens are words of its vocabulary",
    "janus": "it brings a generate of its own",
    "florence2": "an encoder-decoder: visual tokens are not in the decoder's prompt",
    "kosmos-2": "it takes no encoded pictures from outside",
    "qwen3_5": "its decoder mixes attention with linear attention, which was not tested",
}
TOWERS = {
    tower.model_type: tower
    for tower in (
        TowerKind("clip_vision_model", has_cls=True, resizable=True, patch_bias=False, vllm="vision_model.encoder.layers"),
        TowerKind("siglip_vision_model", resizable=True, pools=True, vllm="vision_model.encoder.layers"),
        TowerKind(
            "internvl_vision",
            has_cls=True,
            layers="encoder.layer",
            attention="attention",
            query="attention.q_norm",
            key="attention.k_norm",
            value="attention.v_proj",
            norm="layernorm_after",
            shape="scaled",
        ),
        TowerKind("idefics3_vision"),
        TowerKind("smolvlm_vision"),
        TowerKind(
            "pixtral",
            layers="transformer.layers",
            attention="attention",
            query="attention.q_proj",
            key="attention.k_proj",
            value="attention.v_proj",
            norm="ffn_norm",
            mlp="feed_forward",
            rotary=True,
            any_size=True,
            shape="sized",
            gated=True,
            patch_bias=False,
        ),
        _fused("qwen2_vl_vision", patch_bias=False),
        _fused("qwen2_5_vl_vision", windows=True, gated=True, patch_bias=False),
        _fused("qwen3_vl_vision"),
        _fused("glm4v_vision", shape="normed", gated=True),
    )
}
