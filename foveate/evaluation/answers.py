"""One answer of a benchmark, and what it cost."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CostedAnswer:
    """One answer, and what it cost.

    Attributes
    ----------
    text : the answer.
    items : pictures and videos of the prompt.
    before : visual tokens of the prompt before reduction.
    tokens : visual tokens on average over decoder layers.
    flops : of the decoder's prefill.
    seconds : share of this prompt in the time of its batch, from pixels to the last token.
    prompt, written : tokens of the shortened prompt, and of the answer.
    """

    text: str
    items: int
    before: int
    tokens: float
    flops: int
    seconds: float
    prompt: int
    written: int
