"""How visual tokens go to vLLM: as embeddings between the words of a prompt, or as images whose tokens have places.

The table of families says which way a model needs (``Family.handover``).
"""

from __future__ import annotations

import base64
from abc import ABC, abstractmethod
from io import BytesIO
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..chat import takes_videos
from ..engine.model.anatomy import Anatomy
from .checks import check_servable
from .placing import Places, fields_of
from .template import PLACEHOLDER, around, check_marks, written_alike

if TYPE_CHECKING:
    from .encoding import EncodedPrompt

PLUGINS = "vllm.general_plugins"  # entry points that vLLM loads


class Handover(ABC):
    """One way, for one model.

    Parameters
    ----------
    parts : of the model.

    Attributes
    ----------
    name : as the table of families has it.
    arguments, options : that vLLM's server needs, and its ``LLM`` class where there is no server.
    words : that no text of a request may hold, beside those of the model.
    plugin : whether vLLM needs foveate's plugin.

    Raises
    ------
    UnsupportedModelError : the language model needs more than is handed over.
    """

    name: ClassVar[str]
    arguments: ClassVar[tuple[str, ...]]
    options: ClassVar[dict[str, Any]]
    words: ClassVar[tuple[str, ...]] = ()
    plugin: ClassVar[bool] = False

    def __init__(self, parts: Anatomy) -> None:
        self.parts = parts
        self.check()

    def check(self) -> None:  # noqa: B027
        """Raise ``UnsupportedModelError`` where the language model needs more than is handed over."""

    @property
    def width(self) -> int:
        """Of a visual token, with the features that deeper layers add to it."""
        return int(self.parts.model.config.get_text_config().hidden_size) * (1 + self.parts.deepstack_levels)

    @abstractmethod
    def check_processor(self, processor: Any) -> None:
        """Raise ``InputError`` where a chat template or processor writes pictures in another way than vLLM can be told."""

    def takes_videos(self, processor: Any) -> bool:
        """Whether videos are handed over."""
        return False

    @abstractmethod
    def part(self, embeds: Tensor, places: Places | None) -> dict[str, Any]:
        """The part of a message that brings the tokens [m, D] of a picture or video."""

    @classmethod
    @abstractmethod
    def prompt(cls, encoded: EncodedPrompt, config: Any, dtype: torch.dtype) -> dict[str, Any]:
        """A prompt with visual tokens, for vLLM without a server.

        Parameters
        ----------
        config : of the model that vLLM runs.
        dtype : of its weights.
        """

    def probe(self) -> dict[str, Any] | None:
        """A part of a message that a vLLM that does not fit takes, and one that fits refuses with ``refusal``; None = all fit."""
        return None

    refusal: ClassVar[str] = ""


class PromptEmbeds(Handover):
    """For language models that read visual tokens one after the other, as they read words."""

    name = "prompt_embeds"
    arguments = ("--enable-prompt-embeds",)
    options: ClassVar[dict[str, Any]] = {"enable_prompt_embeds": True}
    words = (PLACEHOLDER,)

    def check(self) -> None:
        check_servable(self.parts)

    def check_processor(self, processor: Any) -> None:
        around(processor)

    def part(self, embeds: Tensor, places: Places | None) -> dict[str, Any]:
        return {"type": "prompt_embeds", "data": saved(embeds)}

    @classmethod
    def prompt(cls, encoded: EncodedPrompt, config: Any, dtype: torch.dtype) -> dict[str, Any]:
        visual = torch.tensor(encoded.visual)
        embeds = torch.zeros(len(visual), config.get_text_config().hidden_size, dtype=dtype)
        embeds[visual] = torch.cat(encoded.embeds).to(dtype)
        return {
            "prompt_embeds": embeds,
            "prompt_token_ids": encoded.ids,
            "prompt_is_token_ids": [not each for each in encoded.visual],
        }


class ImageEmbeds(Handover):
    """For language models that number visual tokens by (t, h, w): vLLM takes them as an image, and its plugin their places."""

    name = "image_embeds"
    # without images and videos of its own, vLLM does not load the vision encoder
    arguments = ("--enable-mm-embeds", "--limit-mm-per-prompt", '{"image": 0, "video": 0}')
    options: ClassVar[dict[str, Any]] = {"enable_mm_embeds": True, "limit_mm_per_prompt": {"image": 0, "video": 0}}
    plugin = True
    refusal = "go together"  # of the plugin, about places without their extent

    def check_processor(self, processor: Any) -> None:
        check_marks(processor)

    def takes_videos(self, processor: Any) -> bool:
        """They are images with places of their own, if templates write the same around them, and nothing between frames."""
        return not self.parts.family.stamped and takes_videos(processor, self.parts.model) and written_alike(processor)

    def part(self, embeds: Tensor, places: Places | None) -> dict[str, Any]:
        if places is None:
            raise TypeError("these visual tokens have no places")
        merge = int(self.parts.model.config.vision_config.spatial_merge_size)
        fields = fields_of([embeds], [places], merge)
        # vLLM puts the fields of several parts together: one of a picture has no first dimension
        fields |= {name: fields[name][0] for name in ("image_grid_thw", "image_extents")}
        return {"type": "image_embeds", "image_embeds": {name: saved(value) for name, value in fields.items()}}

    @classmethod
    def prompt(cls, encoded: EncodedPrompt, config: Any, dtype: torch.dtype) -> dict[str, Any]:
        """A prompt with one placeholder for each picture: vLLM repeats it. Text is between two (``placing.places_of``)."""
        if encoded.places is None:
            raise TypeError("these visual tokens have no places")
        visual = torch.tensor(encoded.visual)
        stay = ~(visual & visual.roll(1))
        stay[0] = True
        merge = int(config.vision_config.spatial_merge_size)
        fields = fields_of([each.to(dtype) for each in encoded.embeds], encoded.places, merge)
        return {"prompt_token_ids": torch.tensor(encoded.ids)[stay].tolist(), "multi_modal_data": {"image": fields}}

    def probe(self) -> dict[str, Any] | None:
        width = self.width
        part = self.part(torch.zeros(1, width, dtype=self.parts.model.dtype), Places(torch.zeros(1, 3, dtype=torch.long), 1))
        del part["image_embeds"]["image_extents"]
        return part


HANDOVERS: dict[str, type[Handover]] = {each.name: each for each in (PromptEmbeds, ImageEmbeds)}


def handover_of(parts: Anatomy) -> Handover:
    """The way of a model.

    Raises
    ------
    UnsupportedModelError : there is none.
    """
    return HANDOVERS[parts.family.handover](parts)


def saved(values: Tensor) -> str:
    """A tensor as vLLM reads it from JSON."""
    written = BytesIO()
    torch.save(values.contiguous().clone(), written)  # a slice would bring all of its storage
    return base64.b64encode(written.getvalue()).decode()
