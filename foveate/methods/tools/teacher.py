"""Which visual tokens an answer of the model hangs on: attention times its gradient, the teacher of learnt scorers."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import InputError
from ..base import KeepAll

IGNORED = -100  # the label of what is no answer


@dataclass(frozen=True)
class Lessons:
    """What T answers about B pictures hang on.

    Attributes
    ----------
    row : [T] the picture.
    ids : [T, S] text after the picture: one question and its answer.
    asked : [T, S] bool, what of it is the question.
    worth : [T, N] of each visual token, at least 0.
    """

    row: Tensor
    ids: Tensor
    asked: Tensor
    worth: Tensor


def lessons(model: Any, batch: dict[str, Any]) -> Lessons:
    """How much each answer hangs on each visual token of its picture: the sum of max(0, -A dL/dA).

    A is the attention of the text after the picture to the tokens of the picture, L the loss of the answer; the sum runs over
    layers, heads and text. (Chefer et al. 2021, arXiv 2103.15679, weigh attention by its gradient, too.) The picture is read once,
    without gradients, and each turn of a conversation is asked about it as if it were the first.

    Parameters
    ----------
    model : a Hugging Face model. Whatever is attached to it, it keeps all tokens here.
    batch : arguments of its forward, with ``labels``. Each of B rows has one picture of N tokens.

    Raises
    ------
    InputError : rows have no picture, or pictures of different numbers of tokens; or nothing is answered.
    """
    ids = batch["input_ids"]
    mask = batch.get("attention_mask", torch.ones_like(ids))
    columns = _columns(model, ids)
    begin = columns[:, -1] + 1
    row, text, labels, real = _turns(ids, batch["labels"], mask, columns)
    cut = int(begin.max())
    media = {name: value for name, value in batch.items() if name not in ("input_ids", "attention_mask", "labels")}
    before = mask[:, :cut] * (torch.arange(cut, device=ids.device) < begin[:, None])  # no text that a longer prefix brings along
    with KeepAll()(model), _eager(model):
        with torch.no_grad():
            cache = model(input_ids=ids[:, :cut], attention_mask=mask[:, :cut], use_cache=True, **media).past_key_values
        cache.batch_select_indices(row)
        after = {"input_ids": text, "attention_mask": torch.cat([before[row], real], 1), _name_of_cache(model): cache}
        with torch.enable_grad(), _differentiable(model):
            out = model(**after, use_cache=True, output_attentions=True)
            loss = F.cross_entropy(out.logits[:, :-1].float().transpose(1, 2), labels[:, 1:], reduction="sum")
            gradients = torch.autograd.grad(loss, out.attentions)
    worth, width = torch.zeros(len(row), columns.shape[1], device=ids.device), cut + text.shape[1]
    for attention, gradient in zip(out.attentions, gradients, strict=True):
        part = (attention.detach() * -gradient).clamp(min=0).sum((1, 2), dtype=torch.float32)
        worth += F.pad(part, (width - part.shape[1], 0)).gather(1, columns[row])  # a sliding window keeps the last columns
    return Lessons(row, text, real.bool() & (labels == IGNORED), worth)


def _columns(model: Any, ids: Tensor) -> Tensor:
    """[B, N] where the visual tokens are."""
    visual = ids == model.config.image_token_id
    counts = visual.sum(1)
    if not bool((counts == counts[0]).all()) or not int(counts[0]):
        raise InputError(
            f"the rows of a batch have {counts.tolist()} visual tokens. A scorer learns from conversations with one picture each, "
            "and in a batch from pictures of one size."
        )
    return visual.nonzero()[:, 1].view(len(ids), -1)


def _turns(ids: Tensor, labels: Tensor, mask: Tensor, columns: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """[T] the row of each turn, and [T, S] its text, labels, and what is no padding.

    A later turn begins as the first one did before the picture (``user:``); that is left out, as it stands there already.
    """
    rows, texts, answers = [], [], []
    for b in range(len(ids)):
        start, first = int(columns[b, -1]) + 1, int(columns[b, 0])
        head = ids[b, :first][mask[b, :first].bool()].tolist()
        answered = labels[b] != IGNORED
        ends = (answered & ~F.pad(answered, (0, 1))[1:]).nonzero()[:, 0] + 1
        for turn, end in enumerate(ends[ends > start].tolist()):
            said = ids[b, start:end].tolist() if turn else []
            same = next((n for n in range(len(head), 0, -1) if said[:n] == head[-n:]), 0)
            rows.append(b)
            texts.append(ids[b, start + same : end])
            answers.append(labels[b, start + same : end])
            start = end
    if set(rows) != set(range(len(ids))):
        raise InputError("a conversation has no answer after its picture, and there is nothing to learn from it")
    real = [torch.ones_like(text) for text in texts]
    parts = [torch.nn.utils.rnn.pad_sequence(each, True, fill) for each, fill in ((texts, 0), (answers, IGNORED), (real, 0))]
    return torch.tensor(rows, device=ids.device), parts[0], parts[1], parts[2]


def _name_of_cache(model: Any) -> str:
    """Newer transformers call it otherwise."""
    return "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"


@contextmanager
def _eager(model: Any) -> Iterator[None]:
    """Attention that gives its weights."""
    decoder = model.get_decoder()
    before = decoder.config._attn_implementation
    decoder.set_attn_implementation("eager")
    try:
        yield
    finally:
        decoder.set_attn_implementation(before)


@contextmanager
def _differentiable(model: Any) -> Iterator[None]:
    """Gradients begin at the embeddings, also of a model that is frozen."""
    handle = model.get_input_embeddings().register_forward_hook(lambda _, __, output: output.requires_grad_())
    try:
        yield
    finally:
        handle.remove()
