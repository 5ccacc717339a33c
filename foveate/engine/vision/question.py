"""What is asked about each image, in the space that a method compares it with visual tokens in."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from ...errors import InputError, first_line
from ...tokens import Question
from ..model.anatomy import Anatomy

Asking = Callable[[Tensor, Tensor, list[int]], Question]  # features [B, N, C], projected [B, N, D], their prompts -> the question


def question_tokens(ids: Tensor, real: Tensor, visual: Tensor, special: tuple[int, ...]) -> Tensor:
    """[B, S] bool, text after the first visual token of its row, without special tokens; all text where none is after.

    A single token between two visual ones is a break in a picture, and none of the question.
    """
    lone = torch.nn.functional.pad(visual, (1, 0))[:, :-1] & torch.nn.functional.pad(visual, (0, 1))[:, 1:]
    text = real & ~visual & ~lone & ~torch.isin(ids, torch.tensor(special, device=ids.device, dtype=ids.dtype))
    after = text & ((real & visual).long().cumsum(1) > 0)
    return torch.where(after.any(1, keepdim=True), after, text)


def asking(parts: Anatomy, text_tower: str | None, ids: Tensor, asked: Tensor) -> Asking:
    """How a method gets its question.

    Parameters
    ----------
    parts : where the parts of the model are.
    text_tower : Hub id or folder of the CLIP model whose text encoder reads it; None = the decoder's own input embeddings.
    ids, asked : [B, S] tokens of the prompts, and which of them are the question (``question_tokens``).
    """

    @torch.no_grad()
    def read(features: Tensor, projected: Tensor, prompts: list[int]) -> Question:
        if text_tower is not None:
            clip = ClipText.load(text_tower)
            texts = clip.texts(parts.model, [row[some] for row, some in zip(ids, asked, strict=True)])
            found, visual = [clip.embed(text) for text in texts], clip.visual(features)
        else:
            table = parts.model.get_input_embeddings()
            found = [table(row[some]) for row, some in zip(ids, asked, strict=True)]
            visual = projected
        text = torch.nn.utils.rnn.pad_sequence(found, batch_first=True)[prompts]
        lengths = torch.tensor([len(each) for each in found], device=text.device)[prompts]
        valid = torch.arange(text.shape[1], device=text.device) < lengths[:, None]
        device = features.device
        return Question(visual.to(device).float(), text.to(device).float(), valid.to(device), paired=text_tower is not None)

    return read


class ClipText:
    """The text encoder of a CLIP model, and what brings visual tokens into the same space."""

    def __init__(self, name: str) -> None:
        try:
            self.model: Any = AutoModel.from_pretrained(name).eval()
            self.tokenizer: Any = AutoTokenizer.from_pretrained(name)
        except Exception as error:  # whatever a broken config, tokenizer or weight file leads to
            raise InputError(f"the CLIP model {name!r} cannot be loaded: {first_line(error)}") from error
        if not hasattr(self.model, "visual_projection"):
            raise InputError(f"{name!r} is a {type(self.model).__name__}. text_tower= needs a CLIP model with text and vision.")
        self.name = name

    @staticmethod
    @functools.lru_cache(maxsize=1)
    def load(name: str) -> ClipText:
        """Loaded once for all calls."""
        return ClipText(name)

    def texts(self, model: Any, questions: list[Tensor]) -> list[str]:
        """Questions in words, from token ids of a vision-language model.

        Raises
        ------
        InputError : the tokenizer of the model is not where the model came from.
        """
        try:
            tokenizer: Any = _tokenizer(model.name_or_path)
        except Exception as error:
            raise InputError(
                f"text_tower= has to read the question, and the tokenizer of this model cannot be loaded from "
                f"{model.name_or_path!r}: {first_line(error)}. Load model and tokenizer from the same place."
            ) from error
        return [str(tokenizer.decode(each, skip_special_tokens=True)) for each in questions]

    def embed(self, text: str) -> Tensor:
        """[S, P] a text in segments that are as long as the encoder reads at once."""
        longest = int(self.model.config.text_config.max_position_embeddings)
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        body = longest - len(self.tokenizer("")["input_ids"])
        segments = [self.tokenizer.decode(ids[i : i + body]) for i in range(0, len(ids), body)] or [""]
        inputs = self.tokenizer(segments, padding=True, truncation=True, max_length=longest, return_tensors="pt")
        found = self.model.get_text_features(**inputs)
        return found if isinstance(found, Tensor) else found.pooler_output

    def visual(self, features: Tensor) -> Tensor:
        """[B, N, P] patches of the CLIP encoder in the space that texts are in.

        Raises
        ------
        InputError : they are of another width.
        """
        width = self.model.visual_projection.in_features
        if features.shape[-1] != width:
            raise InputError(
                f"text_tower={self.name!r} belongs to a vision encoder of {width} channels, and the one of this model has "
                f"{features.shape[-1]}. Give the CLIP model whose vision encoder the model uses."
            )
        norm = next(module for name, module in self.model.named_modules() if name.endswith("post_layernorm"))
        projected: Tensor = self.model.visual_projection(norm(features.to("cpu", self.model.dtype)))
        return projected


@functools.lru_cache(maxsize=1)
def _tokenizer(name: str) -> Any:
    return AutoTokenizer.from_pretrained(name)
