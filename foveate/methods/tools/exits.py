"""What becomes of answers when visual tokens leave a decoder early: exits that are tried, for labels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORE = -100  # labels outside the answers
AGREEMENT, RATIO = 0.99, 1.03  # of DyVTE's label


@contextmanager
def outputs_of(layers: nn.ModuleList) -> Iterator[list[Any]]:
    """Within this, what each decoder layer gives is kept."""
    made: list[Any] = [None] * len(layers)

    def keep(number: int) -> Any:
        return lambda _, __, output: made.__setitem__(number, output)

    handles = [layer.register_forward_hook(keep(number)) for number, layer in enumerate(layers)]
    try:
        yield made
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def recalled(layers: Any, made: list[Any]) -> Iterator[None]:
    """Within this, decoder layers give what they gave before, and compute nothing."""
    before = [layer.__dict__.get("forward") for layer in layers]
    for layer, output in zip(layers, made, strict=False):
        layer.forward = lambda *_, output=output, **__: output
    try:
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            del layer.forward
            if forward is not None:
                layer.forward = forward


def answers(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """[B, S, V] logits -> [B, S - 1] the likeliest next words, and [B] mean loss of each row's answer."""
    wanted = labels[:, 1:].to(logits.device)
    ahead = logits[:, -labels.shape[1] : -1].float()
    loss = F.cross_entropy(ahead.transpose(1, 2), wanted, reduction="none", ignore_index=IGNORE)
    return ahead.argmax(-1), loss.sum(1) / (wanted != IGNORE).sum(1).clamp(min=1)


def agreement(words: Tensor, others: Tensor, labels: Tensor) -> Tensor:
    """[B] share of an answer's places at which the likeliest words [B, S - 1] are the same."""
    taught = labels[:, 1:].to(words.device) != IGNORE
    return ((words == others) & taught).sum(1) / taught.sum(1).clamp(min=1)


def is_safe(agree: Tensor, loss: Tensor, floor: float) -> Tensor:
    """[B, L - 1] bool: the exit changes at most 1 % of the likeliest words of an answer, and its loss hardly grows.

    Parameters
    ----------
    agree, loss : [B, L] of the answers, with all tokens first.
    floor : by how much a loss may grow, however small it is; 0 as in the paper.
    """
    full = loss[:, :1]
    return (agree[:, 1:] > AGREEMENT) & (loss[:, 1:] < torch.maximum(RATIO * full, full + floor))


def correct(words: Tensor, labels: Tensor) -> Tensor:
    """[B] bool, whether every word of the answer is the likeliest one."""
    wanted = labels[:, 1:].to(words.device)
    return ((words == wanted) | (wanted == IGNORE)).all(1)


def smallest_threshold(leave: Tensor, right: Tensor, tolerance: float) -> float:
    """The smallest threshold from 0.5 on at which no more than a share of all answers is lost; 1 where there is none.

    Parameters
    ----------
    leave : [B, L - 1] probabilities of leaving before layers 1 to L - 1; the first one above the threshold decides.
    right : [B, L] bool, the answers with all tokens first, then after each exit.
    tolerance : share of the answers that may become wrong, less those that become right.
    """
    for threshold in torch.linspace(0.5, 0.999, 500).tolist():
        fires = leave > threshold
        first = torch.where(fires.any(1), 1 + fires.int().argmax(1), 0)  # 0 = never
        lost = int(right[:, 0].sum()) - int(right.gather(1, first[:, None]).sum())
        if lost <= tolerance * len(right):
            return round(threshold, 3)
    return 1.0
