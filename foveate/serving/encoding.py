"""Encodes the pictures of conversations and reduces their visual tokens, for a language model that runs elsewhere."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ..api import encode
from ..engine.model.anatomy import Anatomy, anatomy
from ..engine.vision.front import check_front
from ..errors import InputError, UnsupportedModelError, first_line
from ..evaluation.prompts import Prompt, collate
from ..loading import POCKET, Loaded, load
from ..methods.base import Method, get
from ..methods.baselines import Sequential
from .checks import check_embeds

FULL = "full"  # the name of keeping all visual tokens


@dataclass(frozen=True)
class EncodedPrompt:
    """A conversation whose pictures are encoded.

    Attributes
    ----------
    ids : the prompt, with one placeholder for each visual token that stays.
    visual : of each token of it, whether it is a placeholder.
    embeds : per picture, what takes the place of its placeholders [m_i, D], on the CPU.
    before : visual tokens per picture without reduction.
    """

    ids: list[int]
    visual: list[bool]
    embeds: list[Tensor]
    before: list[int]

    @property
    def after(self) -> list[int]:
        """Visual tokens per picture that stay."""
        return [len(each) for each in self.embeds]


@functools.lru_cache(maxsize=256, typed=True)  # 1 is a count, 1.0 a share
def method_of(name: str, budget: float | None = None) -> Method:
    """A method that acts in front of the language model, by its name; "full" keeps all visual tokens.

    Raises
    ------
    InputError : there is no such method, it needs a budget, or it acts inside the language model, which runs elsewhere.
    """
    if name == FULL:
        if budget is not None:
            raise InputError(f"method {FULL!r} keeps all visual tokens and takes no budget")
        return Sequential(budget=1.0)
    return servable(get(name, **({} if budget is None else {"budget": budget})))


def servable(method: Method) -> Method:
    """The method, if all of it acts in front of the language model.

    Raises
    ------
    InputError : it acts inside the language model, or keeps places of dropped tokens in the prompt.
    """
    if method.inside_decoder():
        raise InputError(
            f"{method.name!r} acts inside the language model, which another engine runs here. Use a method that acts before it, "
            "such as 'prumerge+'."
        )
    if method.before_decoder().positions == "original":
        raise InputError(
            f"{method.name!r} with positions='original' leaves gaps between positions, which the other engine cannot be told. "
            "Use positions='compact'."
        )
    return method


def load_encoder(name: str, *, dtype: str | None = None, device: str | None = None) -> Loaded:
    """Load a model without the layers of its decoder: pictures need its vision encoder, projector and word embeddings.

    Parameters
    ----------
    name : as for ``foveate.loading.load``; an adapter is merged into its model.
    dtype : such as "bfloat16"; None = as saved, for the pocket model float32.
    device : None = the first GPU where there is one.

    Raises
    ------
    InputError : the model cannot be loaded.
    UnsupportedModelError : its language model cannot run elsewhere with embeddings in plain order.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    from ..answering import quiet_loading
    from ..loading import prepared
    from ..pocket import WEIGHTS

    if name.startswith(f"{POCKET}+") or (Path(name) / "adapter_config.json").is_file():
        return _without_layers(merged(load(name, dtype=dtype, device=device)))
    source = str(WEIGHTS) if name == POCKET else name
    dtype = dtype or ("float32" if name == POCKET else "auto")
    try:
        with quiet_loading(bars=False):
            config = AutoConfig.from_pretrained(source)
            text = config.get_text_config()
            text.num_hidden_layers = 0
            if getattr(text, "layer_types", None):
                text.layer_types = []
            found: Any = AutoModelForImageTextToText.from_pretrained(source, config=config, dtype=dtype, output_loading_info=True)
            processor = AutoProcessor.from_pretrained(source)
    except Exception as error:  # whatever a broken config, processor, weight file or device leads to
        raise InputError(f"the model {name!r} cannot be loaded: {first_line(error)}") from error
    model, told = found
    missing = sorted(told["missing_keys"])
    if missing:
        raise InputError(f"the model {name!r} is incomplete: {len(missing)} weights are missing, {missing[0]} for one")
    model = model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()
    check_plain_positions(anatomy(model))
    return prepared(name, model, processor)


def merged(loaded: Loaded) -> Loaded:
    """A model with the adapter, if it has one, merged into its weights."""
    if not hasattr(loaded.model, "merge_and_unload"):
        return loaded
    return replace(loaded, model=loaded.model.merge_and_unload().eval())


def _without_layers(loaded: Loaded) -> Loaded:
    """A model without the layers of its decoder."""
    parts = anatomy(loaded.model)
    check_plain_positions(parts)
    parts.decoder.layers = nn.ModuleList()
    loaded.model.config.get_text_config().num_hidden_layers = 0
    return loaded


def check_plain_positions(parts: Anatomy) -> None:
    """Refuse models whose decoder needs more than embeddings in their order.

    Raises
    ------
    UnsupportedModelError : positions are (t, h, w), tokens of a picture see each other, or features enter several layers.
    """
    family, why = parts.family, None
    if family.mrope:
        why = (
            "its visual tokens have (t, h, w) positions, which embeddings in a prompt do not carry; see the plugin, docs/plugin.md"
        )
    elif family.two_way:
        why = "its visual tokens see each other in both directions, and a plain language model reads from left to right"
    elif parts.deepstack_levels:
        why = "its visual features enter several layers"
    if why:
        raise UnsupportedModelError(f"{family.name} cannot be served from embeddings: {why}.")


class PictureEncoder:
    """Encodes and reduces the pictures of conversations; for one thread at a time.

    Parameters
    ----------
    loaded : a model, with or without the layers of its decoder, and its processor.

    Raises
    ------
    UnsupportedModelError : its language model cannot run elsewhere.
    """

    def __init__(self, loaded: Loaded) -> None:
        self.loaded, self.parts = loaded, anatomy(loaded.model)
        check_plain_positions(self.parts)
        self.width = int(loaded.model.config.get_text_config().hidden_size)

    def check(self, method: Method) -> None:
        """Raise ``UnsupportedModelError`` where the model lacks what a method needs."""
        check_front(self.parts, method.before_decoder())

    def copied(self, device: str) -> PictureEncoder:
        """Another one, with weights of its own."""
        loaded = self.loaded
        return PictureEncoder(Loaded(loaded.name, copy.deepcopy(loaded.model).to(device), loaded.processor, loaded.weights))

    def encode(self, conversations: Sequence[list[dict[str, Any]]], method: Method) -> list[EncodedPrompt]:
        """Encode the pictures of conversations, as one batch.

        Parameters
        ----------
        conversations : messages of transformers' chat templates, with pictures as ``{"type": "image", "image": PIL image}``;
            each has at least one.
        method : what reduces.

        Raises
        ------
        InputError : the processor cannot use a conversation, or its features are not finite.
        """
        prompts = [Prompt(messages, "", pictures_of(messages), [], "") for messages in conversations]
        inputs = collate(self.loaded, prompts)
        encoded = encode(self.loaded.model, method, **inputs)
        ids, mask = (encoded.inputs[name].cpu() for name in ("input_ids", "attention_mask"))
        visual = self.parts.visual(ids)
        found: list[tuple[list[Tensor], list[int]]] = [([], []) for _ in prompts]
        for row, embeds, before in zip(encoded.report.rows, encoded.embeds, encoded.report.before, strict=True):
            check_embeds(embeds, self.width, "the features of a picture")
            found[row][0].append(embeds.cpu())
            found[row][1].append(before)
        return [
            EncodedPrompt(ids[row][real].tolist(), visual[row][real].tolist(), *found[row]) for row, real in enumerate(mask.bool())
        ]


def pictures_of(messages: Sequence[dict[str, Any]]) -> list[Image.Image]:
    """The pictures of a conversation, in their order."""
    contents = (message["content"] for message in messages if isinstance(message["content"], list))
    return [part["image"] for content in contents for part in content if part["type"] == "image"]
