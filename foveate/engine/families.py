"""Which models the engine can drive. Models differ in data, not in code: supporting one more is a row in these tables."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..errors import UnsupportedModelError
from ..tokens import EncoderLayer


@dataclass(frozen=True)
class Family:
    """One kind of vision-language model; paths are attributes of ``model.base_model``."""

    model_type: str
    name: str
    tower: str = "vision_tower"
    projector: str = "multi_modal_projector"


@dataclass(frozen=True)
class Tower:
    """One kind of vision encoder; paths are attributes of the tower, ``query`` and ``key`` of one of its layers."""

    model_type: str
    has_cls: bool
    layers: str = "encoder.layers"
    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"


FAMILIES = {family.model_type: family for family in (Family("llava", "LLaVA-1.5"),)}
TOWERS = {
    tower.model_type: tower for tower in (Tower("clip_vision_model", has_cls=True), Tower("siglip_vision_model", has_cls=False))
}


def innermost(model: Any) -> PreTrainedModel:
    """The Hugging Face model inside PEFT, ``torch.compile`` and data-parallel wrappers.

    Raises
    ------
    UnsupportedModelError : there is no Hugging Face model that can generate.
    """
    seen: list[Any] = []
    while not any(model is earlier for earlier in seen):
        seen.append(model)
        if hasattr(model, "get_base_model"):  # PEFT
            model = model.get_base_model()
        elif hasattr(model, "_orig_mod"):  # torch.compile
            model = model._orig_mod
        elif isinstance(getattr(model, "module", None), nn.Module):  # data parallel
            model = model.module
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"{type(seen[0]).__name__} is not a Hugging Face model. Load one with AutoModelForImageTextToText.from_pretrained."
        )
    return model


def _part(root: nn.Module, path: str, what: str) -> Any:
    part: Any = root
    for name in path.split("."):
        part = getattr(part, name, None)
        if part is None:
            raise UnsupportedModelError(f"the model has no {what} at {path!r}; this version of transformers may have moved it")
    return part


@dataclass(frozen=True)
class Anatomy:
    """Where the parts of one model are."""

    model: PreTrainedModel
    family: Family
    tower_kind: Tower
    tower: nn.Module
    projector: nn.Module

    @property
    def image_token(self) -> int:
        """Id of the placeholder that stands for one visual token in the prompt."""
        return int(self.model.config.image_token_id)

    @property
    def layers(self) -> nn.ModuleList:
        """The blocks of the vision encoder."""
        layers: nn.ModuleList = _part(self.tower, self.tower_kind.layers, "encoder layers")
        return layers

    @property
    def decoder_layers(self) -> int:
        return int(self.model.config.get_text_config().num_hidden_layers)

    @property
    def decoder(self) -> nn.Module:
        """The language model without its head; its blocks are at ``layers``."""
        decoder: nn.Module = self.model.get_decoder()
        _part(decoder, "layers", "decoder layers")
        _part(decoder, "rotary_emb", "rotary embeddings")
        return decoder

    def special_tokens(self) -> tuple[int, ...]:
        """Ids of the tokens that begin and end texts, as far as the configs name them."""
        found: set[int] = set()
        for config in (self.model.config, self.model.config.get_text_config(), self.model.generation_config):
            for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
                value = getattr(config, name, None)
                found |= set(value if isinstance(value, list | tuple) else [] if value is None else [value])
        return tuple(sorted(found))

    def feature_layer(self) -> int:
        """Index of the encoder layer whose output the projector reads."""
        chosen = self.model.config.vision_feature_layer
        chosen = chosen if isinstance(chosen, int) else chosen[-1]
        return chosen + len(self.layers) if chosen < 0 else chosen - 1

    def projections(self, layer: EncoderLayer) -> tuple[nn.Module, nn.Module, nn.Module, int]:
        """An encoder layer, its query and key projection, and its number of heads.

        Raises
        ------
        UnsupportedModelError : the encoder has no [CLS] token, or no such layer.
        """
        if not self.tower_kind.has_cls:
            raise UnsupportedModelError(
                f"this method needs the [CLS] token of the vision encoder, and {self.tower_kind.model_type!r} has none. "
                "Use a method that needs no [CLS], such as 'spatial' or 'pool'."
            )
        depth = len(self.layers)
        index = {"last": depth - 1, "aligned": self.feature_layer()}.get(str(layer), layer)
        if not isinstance(index, int) or not -depth <= index < depth:
            raise UnsupportedModelError(f'encoder layer {layer!r} does not exist; use "last", "aligned" or 0 to {depth - 1}')
        block = self.layers[index]
        query = _part(block, self.tower_kind.query, "query projection")
        key = _part(block, self.tower_kind.key, "key projection")
        return block, query, key, int(self.model.config.vision_config.num_attention_heads)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of visual tokens of a picture of ``height`` x ``width`` pixels."""
        patch = self.model.config.vision_config.patch_size
        rows, columns = (patch, patch) if isinstance(patch, int) else patch
        return height // rows, width // columns


def anatomy(model: Any) -> Anatomy:
    """Find the parts of a model, wrapped or not.

    Raises
    ------
    UnsupportedModelError : the family is not supported, or a part is missing; the message says which.
    """
    model = innermost(model)
    kind = getattr(model.config, "model_type", "?")
    names = ", ".join(f"{family.name} ({kind})" for kind, family in FAMILIES.items())
    if kind not in FAMILIES:
        vision = "" if hasattr(model.config, "vision_config") else ", a model without vision"
        raise UnsupportedModelError(f"{type(model).__name__} is of type {kind!r}{vision}. Supported: {names}.")
    if model.get_output_embeddings() is None or not model.can_generate():
        raise UnsupportedModelError(f"{type(model).__name__} has no language head. Load it with AutoModelForImageTextToText.")
    family = FAMILIES[kind]
    tower = _part(model.base_model, family.tower, "vision encoder")
    tower_type = tower.config.model_type
    if tower_type not in TOWERS:
        raise UnsupportedModelError(
            f"{family.name} with a {tower_type!r} vision encoder is not supported; supported encoders: {', '.join(TOWERS)}."
        )
    if any(p.is_meta for p in tower.parameters()) and not _offloaded(tower):
        raise UnsupportedModelError("the weights of the model are not loaded (meta tensors). Load them before attaching.")
    return Anatomy(model, family, TOWERS[tower_type], tower, _part(model.base_model, family.projector, "projector"))


def _offloaded(module: nn.Module) -> bool:
    """Whether accelerate brings the weights in when a part runs."""
    return any(hasattr(part, "_hf_hook") for part in module.modules())
