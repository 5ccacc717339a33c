"""Where the parts of one model are, found through wrappers, quantised layers and adapters."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...errors import InputError, UnsupportedModelError
from ...families import ANY_SIZE, FAMILIES, REFUSED, TOWERS, Family, TowerKind
from ...fingerprint import signature
from ...methods.trained import Host, ModelShape
from ...tokens import EncoderLayer


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
    fused: bool = False  # one projection makes queries, keys and values, side by side
    joined: nn.Module | None = None  # the norm before attention, and the projection after it, where tokens can join the patches
    out: nn.Module | None = None


@dataclass(frozen=True)
class Anatomy:
    """Where the parts of one model are.

    Attributes
    ----------
    tower, tower_kind : the vision encoder of ``modality``.
    projector : where it works on each token by itself, else None.
    chosen : the layers that make the features, where a call says it and not the config.
    modality : "image" or "video".
    """

    model: PreTrainedModel
    family: Family
    tower_kind: TowerKind
    tower: nn.Module
    projector: nn.Module | None
    chosen: Any = None
    modality: str = "image"

    def of(self, modality: str, chosen: Any = None) -> Anatomy:
        """The parts that encode images, or videos."""
        tower = self.tower
        if modality == "video" and self.family.video_tower is not None:
            tower = _part(self.model.base_model, self.family.video_tower, "vision encoder")
        return replace(self, tower=tower, modality=modality, chosen=chosen)

    @property
    def arrangement(self) -> str | None:
        """How visual tokens are arranged in the prompt, None = the engine does not take the modality."""
        return self.family.images if self.modality == "image" else self.family.videos

    def check_modality(self) -> None:
        """Raise ``UnsupportedModelError`` where the engine does not take the modality."""
        if self.arrangement is None:
            raise UnsupportedModelError(
                f"{self.family.name}: {self.modality}s are not supported by foveate. Detach the method for them."
            )

    def check_together(self, modalities: Sequence[str]) -> None:
        """Raise ``InputError`` where a call brings pictures and videos that the prompt does not tell apart."""
        if self.family.one_placeholder and len(modalities) > 1:
            raise InputError(
                f"{self.family.name} has one placeholder for pictures and videos, and takes either in a call. Give the videos as "
                "pictures of their frames, or ask about each in a call of its own."
            )

    @property
    def placeholders(self) -> dict[str, int]:
        """For each modality, the id of the placeholder that stands for one visual token in the prompt."""
        config, found = self.model.config, {"image": int(self.model.config.image_token_id)}
        if self.family.videos is not None:
            found["video"] = found["image"] if self.family.one_placeholder else int(config.video_token_id)
        return found

    def visual(self, ids: Tensor) -> Tensor:
        """[B, S] bool, which tokens are placeholders."""
        return torch.isin(ids, torch.tensor(list(self.placeholders.values()), device=ids.device, dtype=ids.dtype))

    @property
    def layers(self) -> nn.ModuleList:
        """The blocks of the vision encoder."""
        layers: nn.ModuleList = _part(self.tower, self.tower_kind.layers, "encoder layers")
        return layers

    @property
    def device(self) -> torch.device:
        """Where the model is; of one on several devices, where it begins."""
        device = getattr(self.model, "device", None)
        return next(self.tower.parameters()).device if device is None else device

    @property
    def shape(self) -> ModelShape:
        """The sizes that methods with weights depend on."""
        config = self.model.config
        vision, width = config.vision_config, int(config.get_text_config().hidden_size)
        inner = int(getattr(vision, "embed_dim", None) or vision.hidden_size)
        made_by = [layer for layer in self.feature_layers()[-1:] if 0 <= layer < len(self.layers)]
        size = getattr(vision, "image_size", None)
        sides = (size, size) if isinstance(size, int) else size
        plain = self.family.images not in ANY_SIZE
        return ModelShape(
            model_type=config.model_type,
            features=width if self.projector is None else inner * len(self.feature_layers()),
            width=width,
            encoder_width=inner,
            encoder_heads=self.heads,
            encoder_layers=len(self.layers),
            feature_layer=made_by[0] if made_by else None,
            decoder_layers=self.decoder_layers,
            grid=self.grid(sides[0], sides[1]) if sides is not None and plain else None,
        )

    @property
    def host(self) -> Host:
        """The model, as methods with weights see it."""
        adapted = any("lora_" in name for name, _ in self.model.named_parameters())
        return Host(self.shape, self.device, functools.partial(signature, self.model), adapted)

    @property
    def decoder_layers(self) -> int:
        return int(self.model.config.get_text_config().num_hidden_layers)

    @property
    def deepstack_levels(self) -> int:
        """After how many of the first decoder layers features of the vision encoder are added."""
        return len(getattr(self.model.config.vision_config, "deepstack_visual_indexes", None) or ())

    @property
    def decoder(self) -> nn.Module:
        """The language model without its head; its blocks are at ``layers``."""
        decoder = decoder_of(self.model)
        _part(decoder, "layers", "decoder layers")
        _part(decoder, "rotary_emb", "rotary embeddings")
        return decoder

    @property
    def first_token(self) -> int:
        """Id of the token that texts begin with; -1 = the config names none."""
        found = self.model.config.get_text_config().bos_token_id
        return -1 if not isinstance(found, int) else found

    def special_tokens(self) -> tuple[int, ...]:
        """Ids of the tokens that begin and end texts and pictures, as far as the configs name them; placeholders, too."""
        found: set[int] = set()
        for config in (self.model.config, self.model.config.get_text_config(), self.model.generation_config):
            for name, value in vars(config).items():
                if name.endswith(("_token_id", "_token_index")):  # ends of texts, marks around pictures
                    found |= set(value if isinstance(value, list | tuple) else [] if value is None else [value])
        return tuple(sorted(found))

    def _chosen(self) -> Sequence[int]:
        """The layers that make the features, as transformers numbers them; without a setting it is the last one."""
        chosen = getattr(self.model.config, "vision_feature_layer", None) if self.chosen is None else self.chosen
        return [-1] if chosen is None else [chosen] if isinstance(chosen, int) else list(chosen)

    def feature_layers(self) -> list[int]:
        """Indices of the encoder layers whose outputs the projector reads, side by side; -1 is what enters the first layer."""
        return [layer + len(self.layers) if layer < 0 else layer - 1 for layer in self._chosen()]

    def feature_layer(self) -> int:
        """Index of the last encoder layer whose output the projector reads.

        Raises
        ------
        UnsupportedModelError : no layer makes it.
        """
        layer = self.feature_layers()[-1]
        if not 0 <= layer < len(self.layers):
            raise UnsupportedModelError(
                "the features of this model come from no layer of its vision encoder (vision_feature_layer="
                f"{', '.join(map(str, self._chosen()))}). Use a method that reads none."
            )
        return layer

    @property
    def takes_any_size(self) -> bool:
        """Whether the encoder takes pictures of other sizes: it must be able to read its position embeddings at any time."""
        here = (not p.is_meta for name, p in self.tower.named_parameters() if "position_embedding" in name)
        return self.tower_kind.resizable and all(here)

    def layer_index(self, layer: EncoderLayer) -> int:
        """The number of an encoder layer, from 0 on.

        Raises
        ------
        UnsupportedModelError : there is no such layer.
        """
        depth = len(self.layers)
        index = self.feature_layer() if layer == "aligned" else depth - 1 if layer == "last" else layer
        if not isinstance(index, int) or not -depth <= index < depth:
            raise UnsupportedModelError(f'encoder layer {layer!r} does not exist; use "last", "aligned" or 0 to {depth - 1}')
        return index % depth

    def encoder_block(self, layer: EncoderLayer) -> Block:
        """The parts of an encoder layer.

        Raises
        ------
        UnsupportedModelError : there is no such layer, or it has no such part.
        """
        block, kind = self.layers[self.layer_index(layer)], self.tower_kind
        if kind.qkv is not None:
            fused = _part(block, kind.qkv, "projection of queries, keys and values in its encoder layers")
            return Block(block, _part(block, kind.attention, "attention"), fused, fused, fused, block, block, self.heads, True)
        names = ["attention", "query", "key", "value", "norm", "mlp"]
        names += ["joined", "out"] if kind.joined is not None else []
        parts = {name: _part(block, getattr(kind, name), f"{name} in its encoder layers") for name in names}
        return Block(block, **parts, heads=self.heads)

    @property
    def entrance(self) -> nn.Module | None:
        """The norm that tokens pass before the first layer of the vision encoder, None = there is none."""
        place = self.tower_kind.entrance
        return None if place is None else _part(self.tower, place, "norm before its encoder layers")

    @property
    def embedding(self) -> nn.Module:
        """What makes patches of pixels, without their positions."""
        embedding: nn.Module = _part(self.tower, self.tower_kind.embedding, "embedding of patches")
        return embedding

    @property
    def heads(self) -> int:
        """Attention heads of the vision encoder."""
        config = self.model.config.vision_config
        return int(config.num_heads if hasattr(config, "num_heads") else config.num_attention_heads)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches of a picture of ``height`` x ``width`` pixels."""
        patch = self.model.config.vision_config.patch_size
        rows, columns = (patch, patch) if isinstance(patch, int) else patch
        return height // rows, width // columns


def decoder_of(model: Any) -> nn.Module:
    """The language model without its head; transformers gives that of Llama 4 with it."""
    decoder = model.get_decoder()
    found: nn.Module = decoder if hasattr(decoder, "layers") else getattr(decoder, "model", decoder)
    return found


def anatomy(model: Any) -> Anatomy:
    """Find the parts of a model, wrapped or not.

    Raises
    ------
    UnsupportedModelError : the family is not supported, or a part is missing; the message says which.
    """
    model = innermost(model)
    kind = getattr(model.config, "model_type", "?")
    if kind not in FAMILIES:
        vision = "" if hasattr(model.config, "vision_config") or kind in REFUSED else ", a model without vision"
        vision += f"; {REFUSED[kind]}" if kind in REFUSED else ""
        names = ", ".join(f"{family.name} ({kind})" for kind, family in FAMILIES.items())
        raise UnsupportedModelError(f"{type(model).__name__} is of type {kind!r}{vision}. Supported: {names}.")
    if model.get_output_embeddings() is None or not model.can_generate():
        raise UnsupportedModelError(f"{type(model).__name__} has no language head. Load it with AutoModelForImageTextToText.")
    family = FAMILIES[kind]
    if Version(transformers.__version__) < Version(f"{family.since}.dev0"):
        raise UnsupportedModelError(
            f"{family.name} needs transformers {family.since} or newer, and this is {transformers.__version__}: "
            "pip install -U transformers"
        )
    tower = _part(model.base_model, family.tower, "vision encoder")
    tower_type = tower.config.model_type
    if tower_type not in TOWERS:
        raise UnsupportedModelError(
            f"{family.name} with a {tower_type!r} vision encoder is not supported; supported encoders: {', '.join(TOWERS)}."
        )
    if any(p.is_meta for p in tower.parameters()) and not _offloaded(tower):
        raise UnsupportedModelError("the weights of the model are not loaded (meta tensors). Load them before attaching.")
    if TOWERS[tower_type].any_size and family.images == "grid":
        family = replace(family, images="sizes", projector=None, shrinkable=False)
    projector = None if family.projector is None else _part(model.base_model, family.projector, "projector")
    return Anatomy(model, family, TOWERS[tower_type], tower, projector)


def _offloaded(module: nn.Module) -> bool:
    """Whether accelerate brings the weights in when a part runs."""
    return any(hasattr(part, "_hf_hook") for part in module.modules())
