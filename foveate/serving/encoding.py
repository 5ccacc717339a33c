"""Encodes the pictures of conversations and reduces their visual tokens, for a language model that runs elsewhere."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..chat import Prompt, collate, video_part
from ..engine.model.anatomy import anatomy
from ..engine.vision.front import prepare
from ..errors import InputError
from ..loading import Loaded, usable_device
from ..methods.base import Method
from ..methods.saved import named
from ..pictures import Pictures
from .checks import check_embeds
from .handover import handover_of
from .placing import Places, places_of, with_levels
from .scaling import encodes_apart, scales_first


@dataclass(frozen=True)
class EncodedPrompt:
    """A conversation whose pictures are encoded.

    Attributes
    ----------
    ids : the prompt, with one placeholder for each visual token that stays.
    visual : of each token of it, whether it is a placeholder.
    embeds : per picture, what takes the place of its placeholders [m_i, D], on the CPU; with ``placing.with_levels``.
    before : visual tokens per picture without reduction.
    places : per picture, where its tokens stand; None where they are numbered one after the other.
    frames : per picture, visual tokens of each frame that stay; None for what is no video.
    """

    ids: list[int]
    visual: list[bool]
    embeds: list[Tensor]
    before: list[int]
    places: list[Places] | None = None
    frames: list[list[int] | None] | None = None

    @property
    def after(self) -> list[int]:
        """Visual tokens per picture that stay."""
        return [len(each) for each in self.embeds]


@functools.lru_cache(maxsize=256, typed=True)  # 1 is a count, 1.0 a share
def method_of(name: str, budget: float | None = None, config: str = "") -> Method:
    """A method that acts before the language model; "full" keeps all visual tokens.

    Parameters
    ----------
    name, budget, config : as of ``saved.named``.

    Raises
    ------
    InputError : there is no such method, it needs a budget, or it acts inside the language model, which runs elsewhere.
    """
    return servable(named(name, budget, config))


def servable(method: Method) -> Method:
    """The method, if all of it acts before the language model.

    Raises
    ------
    InputError : it acts inside the language model, or keeps places of dropped tokens in the prompt.
    """
    if method.inside_decoder() or method.first_tokens() is not None:
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


class PictureEncoder:
    """Encodes and reduces the pictures of conversations; for one thread at a time.

    Parameters
    ----------
    loaded : a model, with or without the layers of its decoder, and its processor.

    Raises
    ------
    UnsupportedModelError : its language model cannot run elsewhere.

    Attributes
    ----------
    handover : how its visual tokens go to vLLM.
    """

    def __init__(self, loaded: Loaded) -> None:
        self.loaded, self.parts = loaded, anatomy(loaded.model)
        self.handover = handover_of(self.parts)

    @functools.cached_property
    def scales_first(self) -> bool:
        """Whether pictures may be scaled down before they are handed over (``scaling.scaled``), and nothing changes."""
        return scales_first(self.loaded)

    @functools.cached_property
    def encodes_apart(self) -> bool:
        """Whether a picture is encoded alone as it is with others in one conversation."""
        return encodes_apart(self.loaded)

    def check(self, method: Method) -> None:
        """Raise ``UnsupportedModelError`` where the model lacks what a method needs."""
        prepare(self.parts, method)

    def copied(self, device: str) -> PictureEncoder:
        """Another one, with weights of its own."""
        loaded, place = self.loaded, usable_device(device)
        return PictureEncoder(replace(loaded, model=copy.deepcopy(loaded.model).to(place)))

    def encode(self, conversations: Sequence[list[dict[str, Any]]], method: Method) -> list[EncodedPrompt]:
        """Encode the pictures of conversations, as one batch.

        Parameters
        ----------
        conversations : messages of transformers' chat templates, with pictures as ``{"type": "image", "image": PIL image}`` and
            videos as ``{"type": "video", "video": Video}``; each has at least one, and all have the same kinds.
        method : what reduces.

        Raises
        ------
        InputError : the processor cannot use a conversation, or its features are not finite.
        """
        prompts = [
            Prompt([_with_arrays(message) for message in messages], "", pictures_of(messages), videos_of(messages))
            for messages in conversations
        ]
        inputs = collate(self.loaded, prompts)
        encoded = Pictures(self.loaded.model, **inputs).reduce(method)
        ids, mask = (encoded.inputs[name].cpu() for name in ("input_ids", "attention_mask"))
        visual = self.parts.visual(ids)
        found: list[tuple[list[Tensor], list[int], list[list[int] | None]]] = [([], [], []) for _ in prompts]
        for item, each in zip(encoded.report.items, with_levels(encoded.embeds, encoded.deepstack), strict=True):
            check_embeds(each, self.handover.width, "the features of a picture")
            part = item.part[item.part >= 0].cpu()
            by_frame = None if item.modality == "image" else torch.bincount(part, minlength=len(item.grids)).tolist()
            embeds, before, frames = found[item.row]
            embeds.append(each.cpu())
            before.append(item.before)
            frames.append(by_frame)
        made = []
        for row, real in enumerate(mask.bool()):
            shown, (embeds, before, frames), places = visual[row][real], found[row], None
            if self.parts.family.mrope:
                positions = encoded.inputs["position_ids"][-3:, row].cpu()[:, real]
                places = places_of(shown, positions, [len(each) for each in embeds])
            made.append(EncodedPrompt(ids[row][real].tolist(), shown.tolist(), embeds, before, places, frames))
        return made


def pictures_of(messages: Sequence[dict[str, Any]]) -> list[Any]:
    """The pictures of a conversation, in their order."""
    return _media_of(messages, "image")


def videos_of(messages: Sequence[dict[str, Any]]) -> list[Any]:
    """The videos of a conversation, in their order."""
    return _media_of(messages, "video")


def _media_of(messages: Sequence[dict[str, Any]], kind: str) -> list[Any]:
    contents = (message["content"] for message in messages if isinstance(message["content"], list))
    return [part[kind] for content in contents for part in content if part["type"] == kind]


def _with_arrays(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose videos are arrays of their frames, as processors take them."""
    if not isinstance(message["content"], list):
        return message
    parts = [video_part(part["video"]) if part["type"] == "video" else part for part in message["content"]]
    return {**message, "content": parts}
