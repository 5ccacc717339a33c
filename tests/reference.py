"""Slow references, written from the papers and the descriptions of the released code, with loops and for one image at a time.

Nothing here is shared with the package.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor


def attention_row(query: Tensor, keys: Tensor, heads: int, fused: bool) -> list[float]:
    """[CLS] attention to the patches of one image. query [C], keys [1 + N, C]."""
    channels = query.shape[0]
    heads = 1 if fused else heads
    width = channels // heads
    total = [0.0] * (len(keys) - 1)
    for h in range(heads):
        part = slice(h * width, (h + 1) * width)
        logits = [float((query[part].double() * key[part].double()).sum()) / math.sqrt(width) for key in keys]
        top = max(logits)
        exps = [math.exp(x - top) for x in logits]
        for n in range(len(total)):
            total[n] += exps[n + 1] / sum(exps) / heads
    return total


def row_end(values: Tensor, inputs: dict[str, Tensor], row: int, count: int) -> Tensor:
    """The last ``count`` real tokens of a row. Padding at the end of a row stays there; all other padding stands before the row."""
    padding = int(inputs["attention_mask"][row].flip(0).argmax())
    end = values.shape[1] - padding
    return values[row, end - count : end]


def outliers(scores: list[float], factor: float = 1.5) -> int:
    q1, q3 = np.percentile(scores, 25), np.percentile(scores, 75)
    return sum(s > q3 + factor * (q3 - q1) for s in scores)


def best(scores: list[float], count: int) -> list[int]:
    """Indices of the highest scores, best first, ties to the earlier one."""
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count]


def similarities(keys: Tensor, i: int, cosine: bool) -> list[float]:
    found = []
    for key in keys.double():
        a, b = keys[i].double(), key
        value = float((a * b).sum())
        if cosine:
            value /= max(float(a.norm()), 1e-12) * max(float(b.norm()), 1e-12)
        found.append(value)
    return found


def merged(
    features: Tensor, keys: Tensor, scores: list[float], i: int, pool: list[int], k: int, *, cosine: bool, normalise: bool
) -> Tensor:
    """Token i and its k nearest tokens of the pool, weighted by attention."""
    similar = similarities(keys, i, cosine)
    near = sorted((j for j in pool if j != i), key=lambda j: -similar[j])[:k]
    total, weight = features[i].double().clone(), 1.0
    for j in near:
        total += scores[j] * features[j].double()
        weight += scores[j]
    return total / weight if normalise else total


def rest(features: Tensor, scores: list[float], kept: list[int]) -> Tensor:
    total = torch.zeros_like(features[0], dtype=torch.float64)
    for j in range(len(features)):
        if j not in kept:
            total += scores[j] * features[j].double()
    return total


def released_plus_pattern(number: int, count: int) -> list[int]:
    """The uniform tokens of the released PruMerge+ for ``count`` outliers of ``number`` tokens: from the ratio, not truncated."""
    step_length = int(1 / (count / number))
    return list(range(0, number - 1, max(1, int(step_length / 3))))


def released(features: Tensor, query: Tensor, keys: Tensor, heads: int, plus: bool, k: int = 32) -> tuple[list[int], Tensor]:
    """The released procedure for one image: kept indices in output order, and output tokens [m + 1, C]."""
    scores = attention_row(query, keys, heads, fused=True)
    patch_keys, number = keys[1:], len(features)
    found = max(1, outliers(scores))
    kept = best(scores, max(1, int(number * (found / number))))
    if plus:
        kept = kept + [j for j in released_plus_pattern(number, found) if j not in kept]
    everything = list(range(number))
    tokens = [merged(features, patch_keys, scores, i, everything, min(k, number - 1), cosine=True, normalise=False) for i in kept]
    return kept, torch.stack([*tokens, rest(features, scores, kept)])


def paper(
    features: Tensor, query: Tensor, keys: Tensor, last_keys: Tensor, heads: int, plus_pattern: list[int] | None, k: int = 32
) -> tuple[list[int], Tensor]:
    """Algorithm 1, with similarity from the keys of the last layer: kept indices in raster order, and output tokens."""
    scores = attention_row(query, keys, heads, fused=False)
    patch_keys, number = last_keys[1:], len(features)
    centres = best(scores, max(1, outliers(scores)))
    kept = sorted(set(centres) | set(plus_pattern or []))
    pruned = [j for j in range(number) if j not in kept]
    tokens = [
        merged(features, patch_keys, scores, i, pruned, k, cosine=False, normalise=False) if i in centres else features[i].double()
        for i in kept
    ]
    return kept, torch.stack(tokens)


def plain(
    features: Tensor, query: Tensor, keys: Tensor, heads: int, pattern: list[int], k: int, minimum: int
) -> tuple[list[int], Tensor]:
    """The plain constructors: like the paper, with cosine similarity, weights that sum to 1, and all kept tokens merging."""
    scores = attention_row(query, keys, heads, fused=False)
    patch_keys, number = keys[1:], len(features)
    kept = sorted(set(best(scores, max(minimum, outliers(scores)))) | set(pattern))
    pruned = [j for j in range(number) if j not in kept]
    return kept, torch.stack([merged(features, patch_keys, scores, i, pruned, k, cosine=True, normalise=True) for i in kept])


def spliced_embeddings(model, inputs: dict[str, Tensor], row: int, kept: list[list[int]], embeds: list[Tensor], image: int):
    """One row of a batch without padding, its placeholders replaced by reduced tokens: embeddings [1, T', D] and the position of
    each of them in the full prompt [1, T']."""
    ids = inputs["input_ids"][row][inputs["attention_mask"][row].bool()].tolist()
    table = model.get_input_embeddings()
    parts, places, at, number = [], [], 0, 0
    while at < len(ids):
        if ids[at] == image:
            run = at
            while at < len(ids) and ids[at] == image:
                at += 1
            parts += list(embeds[number])
            places += [run + cell for cell in kept[number]]
            number += 1
        else:
            parts.append(table(torch.tensor(ids[at])))
            places.append(at)
            at += 1
    return torch.stack(parts)[None], torch.tensor([places])


def causal_mask(model, length: int) -> Tensor | dict[str, Tensor]:
    """A 4-D mask by hand: causal, and windows of sliding layers counted in columns."""
    config = model.config.get_text_config()
    ones = torch.ones(length, length, dtype=torch.bool).tril()
    window = getattr(config, "sliding_window", None)
    near = ones & ones.tril(0).triu(-(window - 1)) if window else ones

    def form(mask: Tensor) -> Tensor:
        mask = mask[None, None]
        return mask if config._attn_implementation == "sdpa" else torch.where(mask, 0.0, torch.finfo(torch.float32).min)

    if config.model_type == "mistral":
        return form(near)
    if config.model_type == "qwen2":
        return {"full_attention": form(ones), "sliding_attention": form(near)}
    return form(ones)


@torch.no_grad()
def run_spliced(model, embeddings: Tensor, positions: Tensor, tokens: list[int]) -> Tensor:
    """Logits [len(tokens), V] before each of ``tokens`` is generated: no cache, no generate, one forward per step."""
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    found = []
    for token in tokens:
        mask = causal_mask(model, embeddings.shape[1])
        hidden = decoder(inputs_embeds=embeddings, position_ids=positions, attention_mask=mask, use_cache=False).last_hidden_state
        found.append(head(hidden[0, -1]))
        new = model.get_input_embeddings()(torch.tensor([[token]]))
        embeddings = torch.cat([embeddings, new], 1)
        positions = torch.cat([positions, positions[:, -1:] + 1], 1)
    return torch.stack(found)


@dataclass
class RowCut:
    """What one row keeps from a layer on: columns, and tokens that become a sum of others {column: {column: weight}}."""

    left: list[int]
    mixes: dict[int, dict[int, float]] = field(default_factory=dict)


def overheard(kind, monkeypatch) -> list:
    """What a decoder reducer is asked and what it answers, in the order of its layers."""
    heard, ask = [], kind.cut

    def cut(self, tokens):
        answer = ask(self, tokens)
        heard.append((tokens, answer))
        return answer

    monkeypatch.setattr(kind, "cut", cut)
    return heard


def stays(method, tokens, cut) -> Tensor:
    """[B, S] what is left: text is the engine's business, unless the method may remove it."""
    text = tokens.valid & ~tokens.visual
    left = (cut.keep & tokens.valid) | tokens.protected if method.removes_text else (cut.keep & tokens.visual) | text
    return left.scatter(1, tokens.last[:, None], True)  # from which the answer is predicted, a visual one too


def strongest(attention: Tensor) -> list[int]:
    """The output [M] that each cell [N] gives most to, -1 where that is at most half of an even share."""
    found = []
    for column in attention.T.tolist():
        best = max(range(len(column)), key=column.__getitem__)
        found.append(best if column[best] > 1 / (2 * attention.shape[1]) else -1)
    return found


def cuts_of_row(heard, row: int, offset: int) -> dict[int, RowCut]:
    """For ``Masked``: the cuts of one row, whose prompt begins at column ``offset``. Text is recognised without the method."""
    found = {}
    for tokens, cut in heard:
        words = tokens.valid & ~tokens.visual
        named = (cut.keep & words)[row].any()  # only a method that removes text says anything of it
        left = ((cut.keep & tokens.valid) | tokens.protected) if named else ((cut.keep & tokens.visual) | words)
        left = left.scatter(1, tokens.last[:, None], True)  # a visual one, where a prompt ends with its picture
        columns = (tokens.columns[row] - offset).tolist()
        mixes = {}
        if cut.mix is not None:
            for place, weights in zip(cut.target[row].tolist(), cut.mix[row], strict=True):
                if weights.any():
                    mixes[columns[place]] = {columns[at]: float(weights[at]) for at in weights.nonzero().flatten().tolist()}
        found[tokens.layer] = RowCut([columns[at] for at in left[row].nonzero().flatten().tolist()], mixes)
    return found


class Masked:
    """An unmodified model in which visual tokens are hidden as keys from a layer on, and keep running.

    Parameters
    ----------
    kept : {layer: columns of the prompt that are left from there on}.
    compact : from a cut on, what is left of the prompt is numbered anew.
    """

    def __init__(self, model, kept: dict[int, list[int] | RowCut], prompt: int, compact: bool) -> None:
        self.model, self.prompt, self.compact = model, prompt, compact
        self.cuts = {at: cut if isinstance(cut, RowCut) else RowCut(cut) for at, cut in kept.items()}
        self.kept = {at: cut.left for at, cut in self.cuts.items()}
        self.decoder = model.get_decoder()
        self.hidden: dict[int, Tensor] = {}

    def _before(self, layer: int, module, args, kwargs):
        start = max((at for at in self.kept if at <= layer), default=None)
        self.hidden[layer] = args[0] if args else kwargs["hidden_states"]
        if start is None:
            return None
        if start == layer and self.cuts[layer].mixes:
            mixed = self.hidden[layer].clone()
            for column, weights in self.cuts[layer].mixes.items():
                mixed[0, column] = sum(w * self.hidden[layer][0, at] for at, w in weights.items())
            self.hidden[layer] = mixed
            args, kwargs = ((mixed, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": mixed})
        length = self.hidden[layer].shape[1]
        left = [*self.kept[start], *range(self.prompt, length)]
        gone = torch.ones(length, dtype=torch.bool)
        gone[left] = False
        hide = gone & ~torch.eye(length, dtype=torch.bool)  # a dropped token sees itself, or its softmax is not a number
        mask = kwargs["attention_mask"].masked_fill(hide, torch.finfo(self.hidden[layer].dtype).min)
        changed = {"attention_mask": mask}
        if self.compact:
            places = torch.zeros(1, length, dtype=torch.long)
            places[0, left] = torch.arange(len(left))
            kind = getattr(self.decoder.config, "layer_types", None)
            extra = (kind[layer],) if self.decoder.config.model_type.startswith("gemma3") else ()
            changed["position_embeddings"] = self.decoder.rotary_emb(self.hidden[layer], places, *extra)
            changed["position_ids"] = places
        return args, {**kwargs, **changed}

    @torch.no_grad()
    def logits(self, embeddings: Tensor, tokens: list[int], places: Tensor | None = None) -> Tensor:
        """Logits [len(tokens), V] before each of ``tokens``: full forwards, no cache; ``places`` [1, T] are position ids."""
        table, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        handles = [
            module.register_forward_pre_hook(lambda m, a, k, number=number: self._before(number, m, a, k), with_kwargs=True)
            for number, module in enumerate(self.decoder.layers)
        ]
        try:
            found = []
            places = torch.arange(embeddings.shape[1])[None] if places is None else places
            for token in tokens:
                ones = torch.ones(embeddings.shape[:2], dtype=torch.long)  # else gaps in positions look like packed prompts
                output = self.decoder(inputs_embeds=embeddings, position_ids=places, attention_mask=ones, use_cache=False)
                hidden = output.last_hidden_state[0, -1]
                found.append(head(hidden))
                embeddings = torch.cat([embeddings, table(torch.tensor([[token]]))], 1)
                places = torch.cat([places, places[:, -1:] + 1], 1)
            return torch.stack(found)
        finally:
            for handle in handles:
                handle.remove()
