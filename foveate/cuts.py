"""What a method inside the decoder sees (``PromptTokens``) and what it returns (``Cut``)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class DecoderTap:
    """Queries and keys of one decoder layer as its attention uses them: rotated, not scaled.

    Attributes
    ----------
    query : [B, H, S, d] of the tokens of this call.
    keys : [B, G, K, d], G heads that share queries evenly. The last S are the tokens of this call, before them is what a cache
        holds of earlier turns.
    scale : of the products.
    softcap : bound of the scaled products (Gemma 2), None = unbounded.
    columns : [B, K] where each key stands in the prompt, -1 = padding; the order of causality.
    window : how far back the layer sees, in columns; None = everything.
    seen : [B, S, K] bool, which keys each token of this call sees; None = those before it, as far as the window.
    """

    query: Tensor
    keys: Tensor
    scale: float
    softcap: float | None
    columns: Tensor
    window: int | None
    seen: Tensor | None = None

    def visible(self, rows: Tensor) -> Tensor:
        """[B, R, K] bool, which keys the tokens at ``rows`` [B, R] of this call may see."""
        if self.seen is not None:
            return self.seen.expand(len(rows), -1, -1).gather(1, rows[..., None].expand(-1, -1, self.seen.shape[-1]))
        current = self.columns[:, -self.query.shape[2] :]
        at = current.gather(1, rows)[..., None]
        seen = (self.columns >= 0)[:, None] & (self.columns[:, None] <= at)
        return seen if self.window is None else seen & (self.columns[:, None] > at - self.window)


@dataclass(frozen=True)
class PromptTokens:
    """The tokens of B prompts that are about to enter a decoder layer. Rows of a batch are padded to S tokens.

    Attributes
    ----------
    hidden : [B, S, D].
    image : [B, S] the image of its row that a visual token belongs to, counted from 0; -1 for text and padding.
    valid : [B, S] bool, no padding.
    question : [B, S] bool, text after the first visual token of its row, up to the end of the prompt, without special tokens.
    prompt_text : [B, S] bool, the same with special tokens.
    protected : [B, S] bool, text that is never removed: special tokens, everything before the first image, the last token.
    last : [B] the last token of the prompt. In training, the last one before the answer.
    columns : [B, S] where the token was in ``start``.
    initial : [B, I] visual tokens that each image had before the first layer; 0 where a row has fewer images.
    layer, layers : the layer the tokens enter, of how many.
    tap : queries and keys the method reads; None in ``start`` or if it reads nothing.
    start : the same prompt before the first layer.
    """

    hidden: Tensor
    image: Tensor
    valid: Tensor
    question: Tensor
    protected: Tensor
    last: Tensor
    columns: Tensor
    initial: Tensor
    layer: int
    layers: int
    tap: DecoderTap | None = None
    start: PromptTokens | None = None
    prompt_text: Tensor = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.prompt_text is None:  # made by hand
            object.__setattr__(self, "prompt_text", self.question)

    @property
    def visual(self) -> Tensor:
        """[B, S] bool."""
        return self.image >= 0

    @property
    def of_image(self) -> Tensor:
        """[B, I, S] bool, which tokens each image still has."""
        numbers = torch.arange(self.initial.shape[1], device=self.image.device)
        return self.image[:, None] == numbers[:, None]


@dataclass(frozen=True)
class Cut:
    """Which tokens stay before a decoder layer: what ``DecoderReducer.cut`` returns.

    Attributes
    ----------
    keep : [B, S] bool. Text and padding are ignored, unless the method removes text.
    scores : [B, S] importance, for reports and pictures, or None.
    target, mix : [B, R] and [B, R, S]: the kept token at ``target[b, r]`` becomes ``mix[b, r] @ hidden[b]``; rows of zeros change
        nothing. None: no token changes.
    """

    keep: Tensor
    scores: Tensor | None = None
    target: Tensor | None = None
    mix: Tensor | None = None


@dataclass(frozen=True)
class Pattern:
    """Which parts of the computation decoder layers leave out for visual tokens while a prompt is read. The tokens stay.

    Attributes
    ----------
    window : a visual token sees only those visual tokens of its image that are at most (window - 1) / 2 rows and columns away,
        before and after it. None = all that causality allows.
    heads : for each decoder layer, the key heads that visual tokens take part in. In the others nobody attends to visual tokens,
        and visual tokens get nothing. None = all heads.
    neurons : the share of the MLP that visual tokens run: its first neurons.
    """

    window: int | None = None
    heads: tuple[tuple[bool, ...], ...] | None = None
    neurons: float = 1.0
