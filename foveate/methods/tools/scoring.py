"""How important a visual token is: scores [B, N] in float32."""

from __future__ import annotations

import math
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
    return token_attention(tap, tap.query, heads)[..., 1 : tap.end]


def token_attention(tap: EncoderTap, query: Tensor, heads: Heads = "per_head_mean") -> Tensor:
    """[B, H, n] float32 attention of one token, with the query [B, C], to all tokens of a layer in each head."""
    # sums of products, and no matrix product: as fast for one row, and the same to the last bit in every batch
    split, query = (tap.heads if heads == "per_head_mean" else 1, -1), query[:, None].float()
    some = tap.keys.split(_at_once(tap.keys, 2**18, tap.keys[:, :1].numel()), 1)
    products = torch.cat([(keys.float() * query).unflatten(-1, split).sum(-1) for keys in some], 1)
    return _softmax(products.transpose(1, 2)[:, :, None], tap)[:, :, 0]


def _at_once(values: Tensor, limit: int, each: int) -> int:
    """How many pieces of ``each`` numbers to work on at a time: on CPUs as many as a cache holds, elsewhere all."""
    return max(1, limit // each) if values.device.type == "cpu" else max(1, values.numel())


@torch.no_grad()
def received_attention(tap: EncoderTap, heads: Heads = "per_head_mean", *, cls_looks: bool = False, block: int = 512) -> Tensor:
    """[B, N] float32 attention that each patch receives, averaged over heads and over the patches that look, with ``cls_looks``
    [CLS] among them. Computed for ``block`` queries at a time: O(N) memory.
    """
    if tap.queries is None:
        raise FoveateError("the queries of the encoder layer were not recorded. This is a fault of the engine.")
    look = slice(0 if cls_looks else tap.lead, tap.end)
    queries, keys = _by_head(tap.queries[:, look], tap, heads), _by_head(tap.keys, tap, heads)
    real = torch.ones_like(queries[..., 0]) if tap.bias is None else torch.isfinite(tap.bias[:, None, look]).float()
    bias = torch.zeros_like(tap.keys[..., 0], dtype=torch.float32) if tap.bias is None else tap.bias.float()
    batch, number = queries.shape[:2]
    pairs = [each.expand(batch, number, -1).flatten(0, 1) for each in (real[:, :1], bias[:, None])]
    queries, keys, total = (queries * queries.shape[-1] ** -0.5).flatten(0, 1), keys.flatten(0, 1), []
    rows = max(1, min(block, 2**19 // keys.shape[1]))
    at_once = _at_once(keys, 2**19, rows * keys.shape[1])
    for q, k, looks, add in zip(*(each.split(at_once) for each in (queries, keys, *pairs)), strict=True):
        found = torch.zeros_like(k[:, None, :, 0])
        for some, counts in zip(q.split(rows, 1), looks.split(rows, 1), strict=True):
            found += counts[:, None] @ torch.baddbmm(add[:, None], some, k.transpose(1, 2)).softmax(-1)
        total.append(found[:, 0])
    return torch.cat(total).unflatten(0, (batch, number)).mean(1)[:, tap.lead : tap.end] / real[:, 0].sum(1, keepdim=True)


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
    query = tap.query.gather(2, rows[:, None, :, None].expand(-1, tap.query.shape[1], -1, tap.query.shape[3]))
    return _weights(tap, query, tap.keys, tap.visible(rows))[..., -tap.query.shape[2] :]


def _weights(tap: DecoderTap, query: Tensor, keys: Tensor, visible: Tensor, temperature: float = 1.0) -> Tensor:
    """[B, H, R, K] attention of queries [B, H, R, d] to keys [B, G, K, d], of which they see ``visible`` [B, R, K]."""
    (batch, heads, rows, width), (groups, length) = query.shape, keys.shape[1:3]
    query = (query * tap.scale if query.dtype == torch.float32 else query.float() * tap.scale).reshape(batch * groups, -1, width)
    keys = keys.flatten(0, 1)
    if keys.dtype == torch.float32:
        logits = query @ keys.transpose(1, 2)
    else:  # the wide copy of some keys at a time stays in a cache
        at_once = _at_once(keys, 2**18, keys[0].numel())
        pairs = zip(query.split(at_once), keys.split(at_once), strict=True)
        logits = torch.cat([some @ others.float().transpose(1, 2) for some, others in pairs])
    logits = logits.view(batch, heads, rows, length)
    if tap.softcap is not None:
        logits = tap.softcap * (logits / tap.softcap).tanh()
    logits = logits if temperature == 1.0 else logits / temperature
    return logits.masked_fill_(~visible[:, None], torch.finfo(torch.float32).min).softmax(-1)


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
    at_once = max(8, 2**24 // (batch * heads * max(1, tokens.valid.shape[1])))
    return torch.cat([prompt_attention(tokens, part).mean(1) for part in rows.split(at_once, dim=1)], 1)


def question_attention(tokens: PromptTokens) -> Tensor:
    """[B, S] attention that a token gets from the question, averaged over heads and over the question's tokens after it.

    A token after the whole question gets 0.
    """
    rows, real = question_rows(tokens)
    attention = mean_attention(tokens, rows)
    after = (rows[..., None] > torch.arange(attention.shape[-1], device=rows.device)) & real[..., None]
    return (attention * after).sum(1) / after.sum(1).clamp(min=1)


@torch.no_grad()
def page_rank(tokens: PromptTokens, temperature: float, steps: int, block: int = 128) -> Tensor:
    """[B, S] root mean square over heads of where a walk along attention ends that starts everywhere alike.

    Some heads of a prompt at a time, as many as a cache holds, or one. ``block`` rows at a time see what is before them, so that
    half of the matrix is never computed nor held.
    """
    tap = tokens.tap
    if tap is None:
        raise FoveateError("a method that reads nothing has no attention. This is a fault of the method.")
    (batch, heads, length, _), keys = tap.query.shape, tap.keys
    before, device = keys.shape[2] - length, keys.device
    rows = torch.arange(length, device=device).expand(batch, -1).split(block, 1)
    # causality alone hides all that comes after the last row of a block
    reach = [keys.shape[2] if tap.seen is not None else before + min(length, end) for end in range(block, length + block, block)]
    visible = [tap.visible(some)[..., :end] for some, end in zip(rows, reach, strict=True)]
    begin, query, found = tokens.valid.float() / tokens.valid.sum(1, keepdim=True), tap.query.flatten(0, 1), []
    at_once = max(1, (2**21 if device.type == "cpu" else 2**26) // (length * keys.shape[2]))
    at_once = math.gcd(heads, 2 ** int(math.log2(at_once)))  # heads of one row, so that no group depends on the batch
    walk = [begin.new_empty(at_once, some.shape[1], end - before) for some, end in zip(rows, reach, strict=True)]
    for some in torch.arange(batch * heads, device=device).split(at_once):
        row, of = some // heads, some % heads // (heads // keys.shape[1])
        mine, theirs = query[some][:, None], keys[row, of].float()[:, None]
        for weights, look, sight in zip(walk, mine.split(block, 2), visible, strict=True):
            weights.copy_(_weights(tap, look, theirs[:, :, : sight.shape[2]], sight[row], temperature)[:, 0, :, before:])
        mass = begin[row][:, None]
        for _ in range(steps):
            parts, mass = mass.split(block, 2), torch.zeros_like(mass)
            for part, weights in zip(parts, walk, strict=True):
                mass[..., : weights.shape[2]] += part @ weights
        found.append(mass[:, 0].square())
    return torch.cat(found).view(batch, heads, length).mean(1).sqrt()
