"""Which words of a question rate visual tokens, as SparseVLM chooses them (arXiv 2410.04417)."""

from __future__ import annotations

import torch
from torch import Tensor

from ...cuts import PromptTokens
from .scoring import question_rows


def raters(tokens: PromptTokens) -> tuple[Tensor, Tensor]:
    """The question's tokens [B, R], and which of them rate [B, R] bool; by the embeddings that entered the decoder."""
    start = tokens.start or tokens
    if "raters" not in vars(start):  # every cut asks the same
        object.__setattr__(start, "raters", _raters(start))
    chosen = vars(start)["raters"]
    rows, real = question_rows(tokens)  # other methods may have removed text since
    mine = chosen.gather(1, tokens.columns.gather(1, rows)) & real
    mine = torch.where(mine.any(1, keepdim=True), mine, real)
    if mine.device.type != "cpu":  # the host would have to wait for a number from the device
        return rows, mine
    width = -(-int(mine.sum(1).max()) // 8) * 8  # products of eight rows and more are the same in every batch
    first = (~mine).long().argsort(dim=1, stable=True)[:, :width]
    return rows.gather(1, first), mine.gather(1, first)


def _raters(start: PromptTokens) -> Tensor:
    """[B, S] bool."""
    words, known = question_rows(start)
    text = start.hidden.gather(1, words[..., None].expand(-1, -1, start.hidden.shape[-1])).float()
    logits = (start.hidden.float() @ text.transpose(1, 2)).masked_fill(~known[:, None], torch.finfo(torch.float32).min)
    share = (logits.softmax(-1) * start.visual[..., None]).sum(1) / start.visual.sum(1, keepdim=True).clamp(min=1)
    mean = share.sum(1, keepdim=True) / known.sum(1, keepdim=True)
    rates = (share >= mean * (1 - 1e-5)) & known
    return torch.zeros_like(start.valid).scatter(1, words, rates)
