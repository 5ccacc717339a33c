"""What ``generate`` is told and what it returns, translated between the full prompt and the short one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel, StoppingCriteriaList


class Settings:
    """Settings of one ``generate`` call: its arguments, then its generation config, then the model's."""

    def __init__(self, model: PreTrainedModel, kwargs: dict[str, Any]) -> None:
        given = kwargs.get("generation_config")
        self._sources = (kwargs, {} if given is None else vars(given), vars(model.generation_config))

    def __getitem__(self, name: str) -> Any:
        return next((source[name] for source in self._sources if source.get(name) is not None), None)

    def _ids(self, name: str) -> list[int]:
        value = self[name]
        return [] if value is None else torch.as_tensor(value).flatten().tolist()

    def infer_mask(self, ids: Tensor) -> Tensor:
        """The attention mask that ``generate`` infers when it gets none: padding is what holds the pad token, unless that also
        ends sequences.
        """
        pad = [token for token in self._ids("pad_token_id") if token not in self._ids("eos_token_id")]
        return torch.ones_like(ids) if not pad else (ids != pad[0]).long()

    def filler(self, ids: Tensor, mask: Tensor) -> Tensor:
        """[B, 1] what to write into padding: the first token of each row, so that penalties on tokens seen stay the same."""
        return ids.gather(1, mask.bool().long().argmax(1, keepdim=True))

    def lengths(self, removed: int) -> dict[str, int]:
        """``max_length`` and ``min_length`` count the prompt: what to pass for a prompt that is shorter by ``removed``."""
        changed = {}
        for name, relative in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
            value = self[name]
            if value is not None and self[relative] is None and (name == "max_length" or value > 0):
                changed[name] = max(0, value - removed)
        return changed


class _OnFullPrompt:
    """A callback of the user that sees sequences with the full prompt."""

    def __init__(self, wrapped: Any, prompt: Tensor, short: int) -> None:
        self.wrapped, self.prompt, self.short = wrapped, prompt, short

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["wrapped"], name)


class _Processor(_OnFullPrompt):
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Any:
        return self.wrapped(full_sequences(input_ids, self.prompt, self.short), scores)


class _Criterion(_OnFullPrompt):
    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Any:
        return self.wrapped(full_sequences(input_ids, self.prompt, self.short), scores, **kwargs)


class _OnFullPromptStreamer:
    """A streamer of the user: what it is given first is the full prompt."""

    def __init__(self, wrapped: Any, prompt: Tensor) -> None:
        self.wrapped, self.prompt, self.first = wrapped, prompt, True

    def put(self, value: Tensor) -> None:
        self.wrapped.put(self.prompt.cpu() if self.first else value)
        self.first = False

    def end(self) -> None:
        self.wrapped.end()


def full_sequences(sequences: Tensor, prompt: Tensor, short: int) -> Tensor:
    """[n * B, short + new] -> [n * B, full + new]: the full prompt [B, full] in front of what was generated."""
    copies = sequences.shape[0] // prompt.shape[0]
    front = prompt.repeat_interleave(copies, 0).to(sequences.device)
    return torch.cat([front, sequences[:, short:]], 1)


def on_full_prompt(kwargs: dict[str, Any], prompt: Tensor, short: int) -> dict[str, Any]:
    """The user's callbacks in ``kwargs``, made to see the full prompt [B, full] in place of the short one."""
    changed: dict[str, Any] = {}
    if kwargs.get("logits_processor"):
        changed["logits_processor"] = LogitsProcessorList(_Processor(f, prompt, short) for f in kwargs["logits_processor"])
    if kwargs.get("stopping_criteria"):
        changed["stopping_criteria"] = StoppingCriteriaList(_Criterion(f, prompt, short) for f in kwargs["stopping_criteria"])
    allowed = kwargs.get("prefix_allowed_tokens_fn")
    if allowed is not None:
        changed["prefix_allowed_tokens_fn"] = lambda row, sequence: allowed(row, torch.cat([prompt[row], sequence[short:]]))
    if kwargs.get("streamer") is not None:
        changed["streamer"] = _OnFullPromptStreamer(kwargs["streamer"], prompt)
    return changed
