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
    """One kind of vision encoder; ``layers`` is an attribute of the tower, the other paths are attributes of one of its layers.

    A layer is ``x + attention(...)``, then ``x + mlp(norm(x))``. ``resizable`` encoders take pictures of any size, with the option
    ``interpolate_pos_encoding``.
    """

    model_type: str
    has_cls: bool
    layers: str = "encoder.layers"
    attention: str = "self_attn"
    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    norm: str = "layer_norm2"
    mlp: str = "mlp"
    resizable: bool = True


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
class Block:
    """The parts of one layer of the vision encoder."""

    module: nn.Module
    attention: Any
    query: nn.Module
    key: nn.Module
    value: nn.Module
    norm: nn.Module
    mlp: nn.Module
    heads: int


@dataclass(frozen=True)
class Anatomy:
    """Where the parts of one model are."""

    model: PreTrainedModel
    family: Family
    tower_kind: Tower
    tower: nn.Module
    projector: nn.Module
    chosen: Any = None  # the layers that make the features, where a call says it and not the config

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

    def feature_layers(self) -> list[int]:
        """Indices of the encoder layers whose outputs the projector reads, side by side; -1 is what enters the first layer."""
        chosen = self.model.config.vision_feature_layer if self.chosen is None else self.chosen
        every = [chosen] if isinstance(chosen, int) else list(chosen)
        return [layer + len(self.layers) if layer < 0 else layer - 1 for layer in every]

    def feature_layer(self) -> int:
        """Index of the last encoder layer whose output the projector reads.

        Raises
        ------
        UnsupportedModelError : no layer makes it.
        """
        layer = self.feature_layers()[-1]
        if not 0 <= layer < len(self.layers):
            raise UnsupportedModelError(
                f"the features of this model come from no layer of its vision encoder (vision_feature_layer="
                f"{self.model.config.vision_feature_layer if self.chosen is None else self.chosen}). Use a method that reads none."
            )
        return layer

    @property
    def takes_any_size(self) -> bool:
        """Whether the encoder takes pictures of other sizes: it must be able to read its position embeddings at any time."""
        here = (not p.is_meta for name, p in self.tower.named_parameters() if "position_embedding" in name)
        return self.tower_kind.resizable and all(here)

    def encoder_block(self, layer: EncoderLayer) -> Block:
        """The parts of an encoder layer.

        Raises
        ------
        UnsupportedModelError : there is no such layer, or it has no such part.
        """
        depth, kind = len(self.layers), self.tower_kind
        index = self.feature_layer() if layer == "aligned" else depth - 1 if layer == "last" else layer
        if not isinstance(index, int) or not -depth <= index < depth:
            raise UnsupportedModelError(f'encoder layer {layer!r} does not exist; use "last", "aligned" or 0 to {depth - 1}')
        block = self.layers[index]
        names = ("attention", "query", "key", "value", "norm", "mlp")
        parts = {name: _part(block, getattr(kind, name), f"{name} in its encoder layers") for name in names}
        return Block(block, **parts, heads=int(self.model.config.vision_config.num_attention_heads))

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
