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
    marks : the field of the config that names tokens of text whose embeddings the model replaces where there are pictures.
    one_placeholder : videos have the placeholder of pictures in prompts, so that a call brings either.
    stamped : each frame of a video is a run of placeholders of its own in prompts, after its time.
    recurrent : some layers of the decoder hold a state instead of keys and values, so that no tokens can leave between layers.
    uncut : another reason why none can; "" = they can.
    late : the projector that the model's forward puts encoded pictures through; None = they are projected where they are encoded.
    since : the first version of transformers whose model takes encoded pictures as the engine hands them in.
    vllm : its class in vLLM, and the module and class of ``serving.plugin`` that take its place; None = there is none.
    handover : how visual tokens that were made outside go to vLLM (a name in ``serving.handover.HANDOVERS``).
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
    marks: str | None = None
    one_placeholder: bool = False
    stamped: bool = False
    recurrent: bool = False
    uncut: str = ""
    late: str | None = None
    joins: str = "mlp"
    since: str = "5.18"
    vllm: tuple[str, str] | None = None
    handover: str = "prompt_embeds"
    notes: str = ""


@dataclass(frozen=True)
class TowerKind:
    """One kind of vision encoder; ``layers`` is an attribute of the tower, the other paths are attributes of one of its layers.

    In a layer that methods can act in, tokens run through ``x + attention(...)``, then ``x + mlp(norm(x))``.

    Attributes
    ----------
    joined : the norm before attention, where tokens of a method can run through the layers beside the patches; None = they cannot.
    out : the projection of attention's outputs; ``entrance`` and ``embedding``, attributes of the tower: the norm before the first
        layer, None = there is none, and what makes patches of pixels. For ``joined`` layers.
    qkv : one projection of queries, keys and values, where these are not apart.
    resizable : takes pictures of any size, with the option ``interpolate_pos_encoding``.
    rotary : queries and keys are turned by rotary embeddings after their projections, where the engine reads them.
    windows : patches are in the order of attention windows inside the encoder.
    packs : takes patches of any number with their places, so that some can be left out before it.
    any_size : pictures keep their own sizes, and each patch is a visual token.
    by_rows : patches come row by row; elsewhere, where a token stands for a block of them, they come block by block.
    cls_last : [CLS] stands after the patches, and not before them.
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
    joined: str | None = None
    out: str = "self_attn.out_proj"
    entrance: str | None = None
    embedding: str = "embeddings.patch_embedding"
    resizable: bool = False
    rotary: bool = False
    windows: bool = False
    packs: bool = False
    any_size: bool = False
    by_rows: bool = False
    cls_last: bool = False
    shape: str = "plain"
    pools: bool = False
    gated: bool = False
    patch_bias: bool = True
    vllm: str | None = None


def _qwen(model_type: str, name: str, example: str, **more: Any) -> Family:
    places = Family(model_type, name, example, "thw", "thw", tower="visual", projector=None, mrope=True, joins="merger")
    return replace(places, **more)


def _glm(model_type: str, name: str, example: str) -> Family:
    places: dict[str, Any] = {"joins": "convolution", "one_placeholder": True, "stamped": True}
    return _qwen(model_type, name, example, **places, notes="pictures or videos in a call, not both")


def _intern(model_type: str, layers: str) -> TowerKind:
    places = TowerKind(model_type, has_cls=True, layers=layers, attention="attention", norm="layernorm_after")
    return replace(places, query="attention.q_norm", key="attention.k_norm", value="attention.v_proj", shape="scaled")


def _fused(model_type: str, **more: Any) -> TowerKind:
    places = TowerKind(model_type, layers="blocks", attention="attn", qkv="attn.qkv", rotary=True, shape="fused")
    return replace(places, **more)


ANY_SIZE = ("thw", "sizes", "shapes", "places")
"""How the tokens of pictures of any size are arranged."""
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
        _qwen(
            "qwen2_vl",
            "Qwen2-VL",
            "Qwen/Qwen2-VL-7B-Instruct",
            vllm=("Qwen2VLForConditionalGeneration", "qwen:FoveateQwen2VL"),
            handover="image_embeds",
        ),
        _qwen(
            "qwen2_5_vl",
            "Qwen2.5-VL",
            "Qwen/Qwen2.5-VL-7B-Instruct",
            vllm=("Qwen2_5_VLForConditionalGeneration", "qwen:FoveateQwen25VL"),
            handover="image_embeds",
        ),
        _qwen(
            "qwen3_vl",
            "Qwen3-VL",
            "Qwen/Qwen3-VL-8B-Instruct",
            stamped=True,
            vllm=("Qwen3VLForConditionalGeneration", "qwen3:FoveateQwen3VL"),
            handover="image_embeds",
        ),
        _qwen("qwen3_vl_moe", "Qwen3-VL-MoE", "Qwen/Qwen3-VL-30B-A3B-Instruct", stamped=True),
        _qwen("qwen3_5", "Qwen3.5", "Qwen/Qwen3.5-9B", stamped=True, recurrent=True, since="5.21"),
        _qwen("qwen3_5_moe", "Qwen3.5-MoE", "Qwen/Qwen3.5-35B-A3B", stamped=True, recurrent=True, since="5.21"),
        Family("internvl", "InternVL", "OpenGVLab/InternVL3-8B-hf", images="runs", projector=None, joins="shuffle", notes=_FRAMES),
        Family("qianfan_ocr", "Qianfan-OCR", "baidu/Qianfan-OCR", images="runs", projector=None, joins="shuffle"),
        Family("gemma3", "Gemma 3", "google/gemma-3-4b-it", projector=None, two_way=True, joins="pooled"),
        Family(
            *("gemma4", "Gemma 4", "google/gemma-4-E4B-it", "places", "places"),
            stamped=True,
            projector=None,
            two_way=True,
            joins="pooled, no weights",
            since="5.24",
            notes="cuts inside the decoder only where all layers have keys and values of their own (not E2B and E4B)",
        ),
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
        Family(
            "lighton_ocr",
            "LightOnOCR",
            "lightonai/LightOnOCR-1B-1025",
            images="sizes",
            tower="vision_encoder",
            projector=None,
            joins="merged mlp",
        ),
        Family(
            "lfm2_vl",
            "LFM2-VL",
            "LiquidAI/LFM2-VL-1.6B",
            images="shapes",
            projector=None,
            recurrent=True,
            joins="normed shuffle",
            notes=_TILES,
        ),
        Family(
            "ovis2",
            "Ovis2",
            "thisisiron/Ovis2-1B-hf",
            projector=None,
            marks="visual_indicator_token_ids",
            joins="words",
            since="5.20",
            notes=_TILES,
        ),
        Family("aya_vision", "Aya Vision", "CohereLabs/aya-vision-8b", projector=None, joins="gated", notes=_TILES),
        Family(
            "cohere2_vision",
            "Command A Vision",
            "CohereLabs/command-a-vision-07-2025",
            projector=None,
            joins="gated, no norm",
            notes=_TILES,
        ),
        Family(
            "llama4",
            "Llama 4",
            "meta-llama/Llama-4-Scout-17B-16E-Instruct",
            tower="vision_model",
            projector=None,
            late="multi_modal_projector",
            uncut="its layers count chunks of the prompt, and scale queries, by the places of tokens in their caches",
            joins="shuffled mlp",
            since="5.24",
            notes=_TILES,
        ),
        _qwen("paddleocr_vl", "PaddleOCR-VL", "PaddlePaddle/PaddleOCR-VL", videos=None, since="5.21"),
        _glm("glm4v", "GLM-4V", "zai-org/GLM-4.1V-9B-Thinking"),
        _glm("glm4v_moe", "GLM-4.5V", "zai-org/GLM-4.5V"),
        _glm("glm46v", "GLM-4.6V", "zai-org/GLM-4.6V-Flash"),
    )
}
REFUSED = {
    "mllama": "pictures enter by cross-attention: there are no visual tokens in the prompt to remove",
    "idefics": "pictures enter by cross-attention: there are no visual tokens in the prompt to remove",
    "blip-2": "its Q-Former makes 32 tokens of any picture already",
    "instructblip": "its Q-Former makes 32 tokens of any picture already",
    "instructblipvideo": "its Q-Former makes 32 tokens of any picture already",
    "fuyu": "it has no vision encoder: patches of pixels are the tokens",
    "chameleon": "visual tokens are words of its vocabulary",
    "emu3": "visual tokens are words of its vocabulary",
    "janus": "it brings a generate of its own",
    "florence2": "an encoder-decoder: visual tokens are not in the decoder's prompt",
    "kosmos-2": "it takes no encoded pictures from outside",
}
TOWERS = {
    tower.model_type: tower
    for tower in (
        TowerKind(
            "clip_vision_model",
            has_cls=True,
            joined="layer_norm1",
            entrance="pre_layrnorm",
            resizable=True,
            patch_bias=False,
            vllm="vision_model.encoder.layers",
        ),
        TowerKind("siglip_vision_model", joined="layer_norm1", resizable=True, pools=True, vllm="vision_model.encoder.layers"),
        _intern("internvl_vision", "encoder.layer"),
        _intern("qianfan_ocr_vision", "layers"),
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
        _fused("qwen2_vl_vision", patch_bias=False, packs=True),
        _fused("qwen2_5_vl_vision", windows=True, gated=True, patch_bias=False, packs=True),
        TowerKind("siglip2_vision_model", pools=True, shape="resampled"),
        TowerKind("paddleocr_vl_vision", layers="vision_model.encoder.layers", rotary=True, by_rows=True, shape="rotated"),
        TowerKind(
            "ovis2_vision",
            layers="transformer.encoder.layers",
            attention="attention",
            query="attention.q_proj",
            key="attention.k_proj",
            value="attention.v_proj",
            norm="rms_norm2",
            mlp="ffn",
            shape="root",
            gated=True,
        ),
        TowerKind(
            "gemma4_vision",
            query="self_attn.q_norm",
            key="self_attn.k_norm",
            norm="pre_feedforward_layernorm",
            rotary=True,
            gated=True,
            patch_bias=False,
            shape="averaged",
        ),
        TowerKind(
            "llama4_vision_model",
            has_cls=True,
            layers="model.layers",
            norm="post_attention_layernorm",
            rotary=True,
            cls_last=True,
            patch_bias=False,
        ),
        *(_fused(name, packs=True) for name in ("qwen3_vl_vision", "qwen3_vl_moe_vision", "qwen3_5_vision", "qwen3_5_moe_vision")),
        *(_fused(name, shape="normed", gated=True) for name in ("glm4v_vision", "glm4v_moe_vision")),
    )
}
