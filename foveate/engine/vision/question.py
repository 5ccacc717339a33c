"""What is asked about each image, in the space that a method compares it with visual tokens in."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModel, AutoTokenizer

from ...errors import InputError, first_line
from ...tokens import Question
from ..model.anatomy import Anatomy


def question_tokens(ids: Tensor, real: Tensor, visual: Tensor, special: tuple[int, ...]) -> Tensor:
    """[B, S] bool, text after the first visual token of its row, without special tokens; all text where none is after.

    A single token between two visual ones is a break in a picture, and none of the question.
    """
    lone = torch.nn.functional.pad(visual, (1, 0))[:, :-1] & torch.nn.functional.pad(visual, (0, 1))[:, 1:]
    text = real & ~visual & ~lone & ~torch.isin(ids, torch.tensor(special, device=ids.device, dtype=ids.dtype))
    after = text & ((real & visual).long().cumsum(1) > 0)
    return torch.where(after.any(1, keepdim=True), after, text)


@dataclass(frozen=True)
class Asking:
    """How a method gets its question.

    Attributes
    ----------
    parts : where the parts of the model are.
    text_tower : Hub id or folder of the CLIP model whose text encoder reads it; None = the decoder's own input embeddings.
    ids, asked : [B, S] tokens of the prompts, and which of them are the question (``question_tokens``).
    real : [B, S] bool, no padding.
    """

    parts: Anatomy
    text_tower: str | None
    ids: Tensor
    asked: Tensor
    real: Tensor

    @torch.no_grad()
    def __call__(self, features: Tensor, projected: Tensor | None, prompts: list[int], state: bool = False) -> Question:
        """The question of each image.

        Parameters
        ----------
        features, projected : [B, N, C] and [B, N, D] of the images; None where the method does not read what is projected.
        prompts : the prompt of each image.
        state : whether the method reads what the decoder makes of the question alone.
        """
        visual = projected
        if self.text_tower is not None:
            clip = ClipText.load(self.text_tower)
            texts = clip.texts(self.parts.model, [row[some] for row, some in zip(self.ids, self.asked, strict=True)])
            found, visual = [clip.embed(text) for text in texts], clip.visual(features)
        else:
            table = self.parts.model.get_input_embeddings()
            found = [table(row[some]) for row, some in zip(self.ids, self.asked, strict=True)]
        text = pad_sequence(found, batch_first=True)[prompts]
        lengths = torch.tensor([len(each) for each in found], device=text.device)[prompts]
        valid = torch.arange(text.shape[1], device=text.device) < lengths[:, None]
        device = features.device
        return Question(
            None if visual is None else visual.to(device).float(),
            text.to(device).float(),
            valid.to(device),
            paired=self.text_tower is not None,
            state=self.states[prompts].to(device).float() if state else None,
        )

    @functools.cached_property
    @torch.no_grad()
    def states(self) -> Tensor:
        """[B, D] hidden state of each question's last token after the final norm, where the decoder reads the questions alone.

        A question begins with the token that begins texts where its prompt does. An empty one has zeros.
        """
        alone = self._alone
        lengths = torch.tensor([len(each) for each in alone], device=self.ids.device)
        ids = pad_sequence([each if len(each) else self.ids.new_zeros(1) for each in alone], batch_first=True)
        if self.parts.family.two_way:  # whose decoder makes no mask without padding, and reads in both directions then
            ids = torch.nn.functional.pad(ids, (0, 1))
        mask = (torch.arange(ids.shape[1], device=ids.device) < lengths.clamp(min=1)[:, None]).long()
        output = self.parts.decoder(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        last = (lengths - 1).clamp(min=0)[:, None, None].expand(-1, 1, output.shape[-1]).to(output.device)
        states: Tensor = output.gather(1, last)[:, 0] * self.asked.any(1, keepdim=True).to(output.device)
        return states

    @functools.cached_property
    def _alone(self) -> list[Tensor]:
        """What the decoder reads of each prompt."""
        first = self.real.long().argmax(1, keepdim=True)
        begins = torch.zeros_like(self.asked).scatter(1, first, self.ids.gather(1, first) == self.parts.first_token)
        return [row[some] for row, some in zip(self.ids, (self.asked | begins) & self.real, strict=True)]

    @property
    def tokens_read(self) -> int:
        """How many tokens the decoder has read for ``states``; 0 = nobody asked."""
        return sum(len(each) for each in self._alone) if "states" in vars(self) else 0


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
