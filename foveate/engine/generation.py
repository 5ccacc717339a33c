"""What ``generate`` is told and what it returns, translated between the full prompt and the short one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel, StoppingCriteriaList


class GenerateSettings:
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

    def lengths(self, removed: int) -> dict[str, int]:
        """``max_length`` and ``min_length`` count the prompt: what to pass for a prompt that is shorter by ``removed``."""
        changed = {}
        for name, relative in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
            value = self[name]
            if value is not None and self[relative] is None and (name == "max_length" or value > 0):
                changed[name] = max(0, value - removed)
        return changed


@dataclass(frozen=True)
class FullPrompt:
    """The prompt [B, full] as the user gave it, where the sequences of ``generate`` begin with one of ``short`` tokens."""

    ids: Tensor
    short: int

    def sequences(self, sequences: Tensor) -> Tensor:
        """[n * B, short + new] -> [n * B, full + new]: the full prompt before what was generated."""
        copies = sequences.shape[0] // self.ids.shape[0]
        front = self.ids.repeat_interleave(copies, 0).to(sequences.device)
        return torch.cat([front, sequences[:, self.short :]], 1)


class _OnFullPrompt:
    """A callback of the user that sees sequences with the full prompt."""

    def __init__(self, wrapped: Any, prompt: FullPrompt) -> None:
        self.wrapped, self.prompt = wrapped, prompt

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["wrapped"], name)


class _Processor(_OnFullPrompt):
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Any:  # transformers reads this signature
        return self.wrapped(self.prompt.sequences(input_ids), scores)


class _Criterion(_OnFullPrompt):
    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Any:
        return self.wrapped(self.prompt.sequences(input_ids), scores, **kwargs)


class _Processors(LogitsProcessorList):
    prompt: FullPrompt
    wrap = _Processor


class _Criteria(StoppingCriteriaList):
    prompt: FullPrompt
    wrap = _Criterion


def merged_with_callbacks(merge: Any, default_list: Any, custom_list: Any) -> Any:
    """The list that ``generate`` makes of its own callbacks and the user's, with the user's seeing the full prompt.

    Wrapped only here, after the merge: a callback of the user replaces one of ``generate`` of the same type.
    """
    merged = merge(default_list, custom_list)
    if not isinstance(custom_list, _Processors | _Criteria):
        return merged
    custom = {id(callback) for callback in custom_list}
    wrap, prompt = custom_list.wrap, custom_list.prompt
    return type(default_list)(wrap(callback, prompt) if id(callback) in custom else callback for callback in merged)


class _Streamer:
    """A streamer of the user: what it is given first is the full prompt."""

    def __init__(self, wrapped: Any, prompt: Tensor) -> None:
        self.wrapped, self.prompt, self.first = wrapped, prompt, True

    def put(self, value: Tensor) -> None:
        self.wrapped.put(self.prompt.repeat_interleave(len(value) // len(self.prompt), 0).cpu() if self.first else value)
        self.first = False

    def end(self) -> None:
        self.wrapped.end()


def on_full_prompt(kwargs: dict[str, Any], prompt: FullPrompt, sequences: int) -> dict[str, Any]:
    """The user's callbacks in ``kwargs``, made to see the full prompt.

    Parameters
    ----------
    kwargs : arguments of ``generate``.
    prompt : in place of the short one.
    sequences : rows per prompt that ``prefix_allowed_tokens_fn`` counts on their own.
    """
    changed: dict[str, Any] = {}
    for name, kind in (("logits_processor", _Processors), ("stopping_criteria", _Criteria)):
        if kwargs.get(name):
            changed[name] = kind(kwargs[name])
            changed[name].prompt = prompt
    allowed = kwargs.get("prefix_allowed_tokens_fn")
    if allowed is not None:
        changed["prefix_allowed_tokens_fn"] = lambda row, sequence: allowed(
            row, torch.cat([prompt.ids[row // sequences], sequence[prompt.short :]])
        )
    if kwargs.get("streamer") is not None:
        changed["streamer"] = _Streamer(kwargs["streamer"], prompt.ids)
    return changed
