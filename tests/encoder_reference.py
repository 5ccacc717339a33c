"""A vision encoder written out: one image, float64, loops, and the encoder reducers from their papers in the same way.

Nothing here is shared with the package. A step gets the tokens of one block behind its attention and says which inputs each output
is made of, as {input: weight}, and at whose place it stands.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class Inside:
    """What a step sees: everything [CLS] first, then patches; ``attention`` [H, n, n] of the block."""

    query: Tensor
    keys: Tensor
    values: Tensor
    attention: Tensor
    heads: int
    sizes: list[int]
    goal: int
    lead: int = 1  # 0 without [CLS]


@dataclass
class Step:
    made_of: list[dict[int, float]]  # per output patch: weights of input patches, counted from 0 without [CLS]
    place: list[int]  # per output patch: the input patch at whose place it stands
    into: list[int]  # per input patch: the output that it went to, -1 = dropped


def encode(tower, pixels: Tensor, depth: int, plan: dict[int, int], step, proportional: bool, lead: int = 1):
    """The features [1 + m, C] of one picture [3, H, W], the cell of each patch, and per cell the output it went to."""
    tower = tower.double()
    embeddings = tower.embeddings(pixels[None].double())
    states = tower.pre_layrnorm(embeddings)[0] if hasattr(tower, "pre_layrnorm") else embeddings[0]
    heads = tower.config.num_attention_heads
    cells = list(range(len(states) - lead))
    owner, sizes, counts = list(cells), [1] * len(cells), []
    for number, block in enumerate(tower.encoder.layers[:depth]):
        normed = block.layer_norm1(states)
        query, keys, values = (getattr(block.self_attn, f"{name}_proj")(normed) for name in "qkv")
        width = query.shape[1] // heads
        outputs, maps = [], []
        for h in range(heads):
            part = slice(h * width, (h + 1) * width)
            logits = query[:, part] @ keys[:, part].T / math.sqrt(width)
            if proportional:
                logits = logits + torch.tensor([1] * lead + sizes).double().log()
            maps.append(logits.softmax(-1))
            outputs.append(maps[-1] @ values[:, part])
        states = states + block.self_attn.out_proj(torch.cat(outputs, 1))
        if number in plan:
            made = step(Inside(query, keys, values, torch.stack(maps), heads, sizes, plan[number], lead))
            patches = states[lead:]
            merged = [sum(w * patches[i] for i, w in parts.items()) for parts in made.made_of]
            states = torch.cat([states[:lead], torch.stack(merged)])
            owner = [-1 if at < 0 else made.into[at] for at in owner]
            cells = [cells[at] for at in made.place]
            sizes = [owner.count(at) for at in range(len(cells))]
        states = states + block.mlp(block.layer_norm2(states))
        counts.append(len(cells))
    return states, cells, owner, counts


def _metric(inside: Inside) -> Tensor:
    """[n, d] keys of the patches, averaged over heads."""
    keys = inside.keys[inside.lead :]
    return torch.stack([key.view(inside.heads, -1).mean(0) for key in keys])


def _cosine(a: Tensor, b: Tensor) -> float:
    return float(F.cosine_similarity(a, b, dim=0))


def tome(inside: Inside) -> Step:
    """Tokens are numbered, with [CLS] as 0 where there is one: even ones look, odd ones are found."""
    metric, number, lead = _metric(inside), len(inside.sizes), inside.lead
    numbers = range(lead, number + lead)
    even, odd = ([t - lead for t in numbers if t % 2 == part] for part in (0, 1))
    best = {}
    for a in even:
        near = max(odd, key=lambda b: _cosine(metric[a], metric[b]))
        best[a] = (near, _cosine(metric[a], metric[near]))
    gone = sorted(even, key=lambda a: -best[a][1])[: number - inside.goal]
    place = [a for a in even if a not in gone] + odd
    members = {p: [p] for p in place}
    for a in gone:
        members[best[a][0]].append(a)
    total = {p: sum(inside.sizes[i] for i in members[p]) for p in place}
    made = [{i: inside.sizes[i] / total[p] for i in members[p]} for p in place]
    into = [next(o for o, p in enumerate(place) if i in members[p]) for i in range(number)]
    return Step(made, place, into)


def _cls(inside: Inside) -> list[float]:
    return inside.attention[:, 0, 1:].mean(0).tolist()


def evit(inside: Inside, fuse: bool = True, ordered: bool = False) -> Step:
    """``ordered`` leaves descending attention."""
    scores = _cls(inside)
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    kept, gone = order[: inside.goal - fuse], order[inside.goal - fuse :]
    kept = kept if ordered else sorted(kept)
    if not fuse:
        return Step([{i: 1.0} for i in kept], kept, [kept.index(i) if i in kept else -1 for i in range(len(scores))])
    made = [{i: 1.0} for i in kept] + [{i: scores[i] for i in gone}]
    into = [kept.index(i) if i in kept else len(kept) for i in range(len(scores))]
    return Step(made, [*kept, gone[0]], into)


def ats_official(inside: Inside, ordered: bool = False) -> Step:
    """Ascending significance, curve from 0 to 1, points from its first step on."""
    scores = [a * float(v.norm()) for a, v in zip(_cls(inside), inside.values[1:], strict=True)]
    order = sorted(range(len(scores)), key=lambda i: scores[i])
    curve, total = [], 0.0
    for i in order:
        total += scores[i] / sum(scores)
        curve.append(total)
    curve = [(c - curve[0]) / (curve[-1] - curve[0]) for c in curve]
    first = min(c for c in curve if c > 0)
    points = [first + k * (1 - first) / (inside.goal - 1) for k in range(inside.goal)]
    chosen = {order[min(range(len(curve)), key=lambda j: abs(curve[j] - y))] for y in points}
    return _sampled(chosen, scores, ascending=ordered)


def ats_haurum(inside: Inside) -> Step:
    """Raster order, points in the middle of equal parts, significance summed over heads."""
    values = inside.values[1:]
    width = values.shape[1] // inside.heads
    scores = [0.0] * len(values)
    for h in range(inside.heads):
        for i, value in enumerate(values):
            scores[i] += float(inside.attention[h, 0, i + 1] * value[h * width : (h + 1) * width].norm())
    curve, total = [], 0.0
    for score in scores:
        total += score / sum(scores)
        curve.append(total)
    points = [(2 * k + 1) / (2 * inside.goal) for k in range(inside.goal)]
    return _sampled({min(range(len(curve)), key=lambda j: abs(curve[j] - y)) for y in points}, scores)


def _sampled(chosen: set[int], scores: list[float], least: int = 8, ascending: bool = False) -> Step:
    if len(chosen) < least:
        chosen = set(sorted(range(len(scores)), key=lambda i: -scores[i])[:least])
    kept = sorted(chosen, key=lambda i: scores[i]) if ascending else sorted(chosen)
    return Step([{i: 1.0} for i in kept], kept, [kept.index(i) if i in chosen else -1 for i in range(len(scores))])


def crossget(inside: Inside, importance: list[float] | None = None) -> Step:
    metric, number = _metric(inside), len(inside.sizes)
    similar = [[-math.inf if i == j else _cosine(metric[i], metric[j]) for j in range(number)] for i in range(number)]
    ranked = sorted(range(number), key=lambda i: -max(similar[i]))
    rank = {i: n for n, i in enumerate(ranked)}
    behind = [max((similar[i][j] for j in range(number) if rank[j] > rank[i]), default=-math.inf) for i in range(number)]
    if importance is None:
        importance = (inside.attention[:, :, 1:].mean(0).mean(0) + inside.attention[:, 0, 1:].mean(0)).tolist()
    gone = sorted(range(number), key=lambda i: importance[i] - behind[i])[: number - inside.goal]
    kept = [i for i in range(number) if i not in gone]
    goes = {i: max(kept, key=lambda j: similar[i][j]) for i in gone}
    share = dict.fromkeys(kept, 1.0)
    for i, j in goes.items():
        weight = math.exp(importance[i]) / (math.exp(importance[i]) + math.exp(importance[j]))
        share[i] = 2 * weight
        share[j] += 2 * (1 - weight) - 1
    members = {j: [j, *(i for i in gone if goes[i] == j)] for j in kept}
    total = {j: sum(inside.sizes[i] for i in members[j]) for j in kept}
    made = [{i: share[i] * inside.sizes[i] / total[j] for i in members[j]} for j in kept]
    return Step(made, kept, [kept.index(goes.get(i, i)) for i in range(number)])
