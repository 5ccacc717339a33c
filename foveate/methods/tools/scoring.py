"""How important a visual token is: scores [B, N] in float32."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ...cuts import DecoderTap, PromptTokens
from ...errors import FoveateError
from ...tokens import EncoderTap

Heads = Literal["per_head_mean", "fused"]


@torch.no_grad()
def cls_attention(tap: EncoderTap, heads: Heads = "per_head_mean") -> Tensor:
    """Attention of [CLS] to the patches, at O(N): only this row of the attention matrix is computed.

    Where the encoder has no [CLS], the mean attention that each patch receives stands for it (``received_attention``).

    Parameters
    ----------
    tap : queries and keys of one encoder layer.
    heads : "per_head_mean" is the encoder's own attention, averaged over its heads; "fused" takes all channels as one head
        with scale ``C ** -0.5``, as the code released with PruMerge does.

    Returns
    -------
    [B, N] float32; with the weight of [CLS] itself, which is left out, each row sums to 1.
    """
    if tap.query is None:
        return received_attention(tap, heads)
    return cls_attention_by_head(tap, heads).mean(1)


def cls_attention_by_head(tap: EncoderTap, heads: Heads = "per_head_mean") -> Tensor:
    """[B, H, N] float32 attention of [CLS] to the patches in each head."""
    if tap.query is None:
        raise FoveateError("the encoder has no [CLS] token. This is a fault of the method.")
    # sums of products, and no matrix product: as fast for one row, and the same to the last bit in every batch
    products = tap.keys.float() * tap.query[:, None].float()
    products = products.unflatten(-1, (tap.heads if heads == "per_head_mean" else 1, -1)).sum(-1)
    return _softmax(products.transpose(1, 2)[:, :, None], tap)[:, :, 0, 1:]


@torch.no_grad()
def received_attention(tap: EncoderTap, heads: Heads = "per_head_mean", *, cls_looks: bool = False, block: int = 64) -> Tensor:
    """[B, N] float32 attention that each patch receives, averaged over heads and over the patches that look, with ``cls_looks``
    [CLS] among them. Computed for ``block`` queries at a time: O(N) memory.
    """
    if tap.queries is None:
        raise FoveateError("the queries of the encoder layer were not recorded. This is a fault of the engine.")
    first = 0 if cls_looks else tap.lead
    queries, keys = _by_head(tap.queries[:, first:], tap, heads), _by_head(tap.keys, tap, heads).transpose(2, 3).contiguous()
    real = torch.ones_like(queries[:, :1, :, 0]) if tap.bias is None else torch.isfinite(tap.bias[:, None, first:]).float()
    total = torch.zeros_like(keys[:, :, 0])
    for rows, looks in zip(queries.split(block, 2), real.split(block, 2), strict=True):
        total += (looks[:, :, None] @ _softmax(rows @ keys, tap))[:, :, 0]
    return total.mean(1)[:, tap.lead :] / real.sum(2)


def _by_head(channels: Tensor, tap: EncoderTap, heads: Heads) -> Tensor:
    """[B, R, C] -> [B, H, R, d] float32."""
    return channels.float().unflatten(-1, (tap.heads if heads == "per_head_mean" else 1, -1)).transpose(1, 2)


def _softmax(products: Tensor, tap: EncoderTap) -> Tensor:
    """[B, H, R, L + N] attention from products of queries and keys."""
    logits = products * (tap.keys.shape[-1] // products.shape[1]) ** -0.5
    return (logits if tap.bias is None else logits + tap.bias.float()[:, None, None]).softmax(-1)


def prompt_attention(tokens: PromptTokens, rows: Tensor) -> Tensor:
    """Attention of a few tokens to all tokens of the call, as the decoder layer computes it: O(N) for each row.

    Parameters
    ----------
    tokens : with the queries and keys of the layer.
    rows : [B, R] tokens of this call that look.

    Returns
    -------
    [B, H, R, S] float32; with the weight of what a cache holds of earlier turns, which is left out, each row sums to 1.
    """
    tap = tokens.tap
    if tap is None:
        raise FoveateError("a method that reads nothing has no attention. This is a fault of the method.")
    batch, heads, _, width = tap.query.shape
    query = tap.query.gather(2, rows[:, None, :, None].expand(-1, heads, -1, width))
    return _weights(tap, query.view(batch, tap.keys.shape[1], -1, rows.shape[1], width), tap.keys, rows).flatten(1, 2)


def _weights(tap: DecoderTap, query: Tensor, keys: Tensor, rows: Tensor, temperature: float = 1.0) -> Tensor:
    """[B, G, P, R, S] attention to the tokens of the call of queries [B, G, P, R, d] at ``rows``, P of them for each key head.

    ``keys`` [B, G, K, d] may be some heads of the tap only.
    """
    logits = query.float() @ keys[:, :, None].float().transpose(3, 4) * tap.scale
    if tap.softcap is not None:
        logits = tap.softcap * (logits / tap.softcap).tanh()
    hidden = ~tap.visible(rows)[:, None, None]
    weights = (logits / temperature).masked_fill(hidden, torch.finfo(torch.float32).min).softmax(-1)
    return weights[..., -tap.query.shape[2] :]


def cls_likeness(tap: EncoderTap, kind: Literal["cosine", "dot"]) -> Tensor:
    """[B, N] float32 likeness of what a layer put out for [CLS] and for the patches.

    Where the encoder has no [CLS], the mean of the patches stands for it.
    """
    if tap.states is None:
        raise FoveateError("the encoder layer has no output recorded. This is a fault of the engine.")
    states = tap.states.float()
    if tap.query is None:
        states = torch.cat([states.mean(1, keepdim=True), states], 1)
    if kind == "cosine":
        states = states / states.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    return (states[:, 1:] * states[:, :1]).sum(-1)


def question_rows(tokens: PromptTokens) -> tuple[Tensor, Tensor]:
    """Where the question is, [B, R], and which of these are real, [B, R] bool; the last token where a row has no question."""
    question = tokens.question
    count = max(1, int(question.sum(1).max()))
    rows = (~question).long().argsort(dim=1, stable=True)[:, :count]
    real = question.gather(1, rows)
    alone = ~real.any(1, keepdim=True)
    first = torch.arange(count, device=rows.device) == 0
    rows = torch.where(alone & first, tokens.last[:, None], rows)
    return rows, real | (alone & first)


def mean_attention(tokens: PromptTokens, rows: Tensor) -> Tensor:
    """[B, R, S] ``prompt_attention`` averaged over heads, some rows at a time so that the weights of single heads stay small."""
    batch, heads = len(tokens.valid), tokens.tap.query.shape[1] if tokens.tap is not None else 1
    at_once = max(1, 2**25 // (batch * heads * max(1, tokens.valid.shape[1])))
    return torch.cat([prompt_attention(tokens, part).mean(1) for part in rows.split(at_once, dim=1)], 1)


def question_attention(tokens: PromptTokens) -> Tensor:
    """[B, S] attention that a token gets from the question, averaged over heads and over the question's tokens after it.

    A token after the whole question gets 0.
    """
    rows, real = question_rows(tokens)
    attention = mean_attention(tokens, rows)
    after = (rows[..., None] > torch.arange(attention.shape[-1], device=rows.device)) & real[..., None]
    return (attention * after).sum(1) / after.sum(1).clamp(min=1)


def page_rank(tokens: PromptTokens, temperature: float, steps: int) -> Tensor:
    """[B, S] root mean square over heads of where a walk along attention ends that starts everywhere alike.

    Heads are taken in groups, so that no more than 64 million weights exist at a time, or those of one key head.
    """
    tap = tokens.tap
    if tap is None:
        raise FoveateError("a method that reads nothing has no attention. This is a fault of the method.")
    length, total = tap.query.shape[2], torch.zeros_like(tokens.hidden[..., 0], dtype=torch.float32)
    share = tap.query.shape[1] // tap.keys.shape[1]
    at_once = max(1, 2**26 // (len(tokens.valid) * share * length * tap.keys.shape[2]))
    begin = tokens.valid.float() / tokens.valid.sum(1, keepdim=True)
    query, rows = tap.query.unflatten(1, (-1, share)), torch.arange(length, device=begin.device).expand_as(tokens.valid)
    for first in range(0, tap.keys.shape[1], at_once):
        some = slice(first, first + at_once)
        walk = _weights(tap, query[:, some], tap.keys[:, some], rows, temperature).flatten(1, 2)
        mass = begin[:, None, None].expand(-1, walk.shape[1], -1, -1)
        for _ in range(steps):
            mass = mass @ walk
        total = total + mass[:, :, 0].square().sum(1)
    return (total / tap.query.shape[1]).sqrt()
