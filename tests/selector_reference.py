"""Slow references of token selectors, written from their papers, with loops and for one image at a time.

Nothing here is shared with the package.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .reference import attention_row, best


def cosine(a: Tensor, b: Tensor) -> float:
    a, b = a.double(), b.double()
    length = math.sqrt(float((a * a).sum())) * math.sqrt(float((b * b).sum()))
    return float((a * b).sum()) / length if length else 0.0


def cosine_table(vectors: Tensor) -> list[list[float]]:
    return [[cosine(a, b) for b in vectors] for a in vectors]


def first_best(values: dict[int, float]) -> int:
    """The key with the largest value, the smaller key of several."""
    return min(values, key=lambda i: (-values[i], i))


def visionzip(features: Tensor, query: Tensor, keys: Tensor, heads: int, dominant: int, contextual: int):
    """Patches that are dominant, in raster order; then, for each target, its cell and the cells merged into it."""
    scores = attention_row(query, keys, heads, fused=False)
    kept = sorted(best(scores, dominant))
    rest = [n for n in range(len(features)) if n not in kept]
    step = max(1, len(rest) // contextual) if contextual else 1
    targets = [rest[step * i] for i in range(contextual)]
    width = keys.shape[-1] // heads
    metric = [sum(key[h * width : (h + 1) * width].double() for h in range(heads)) / heads for key in keys[1:]]
    groups: dict[int, list[int]] = {target: [] for target in targets}
    for n in rest:
        if targets and n not in targets:
            groups[first_best_of(targets, [cosine(metric[n], metric[t]) for t in targets])].append(n)
    return kept, groups


def first_best_of(items: list[int], values: list[float]) -> int:
    return items[max(range(len(items)), key=lambda i: (values[i], -i))]


def merged(features: Tensor, target: int, group: list[int], normalise: bool) -> Tensor:
    out = features[target].double()
    if group:
        out = out + sum(features[n].double() for n in group) / len(group)
        out = out / 2 if normalise else out
    return out


def divprune(features: Tensor, count: int) -> list[int]:
    """Tokens in the order they are chosen."""
    table, every = cosine_table(features), range(len(features))
    apart = [[1 - table[i][j] for j in every] for i in every]
    chosen: list[int] = []
    while len(chosen) < count:
        others = {i: chosen or [j for j in every if j != i] for i in every if i not in chosen}
        chosen.append(first_best({i: min([apart[i][j] for j in near], default=0.0) for i, near in others.items()}))
    return chosen


def relevance(visual: Tensor, text: list[Tensor], negative: bool) -> list[float]:
    if not text:
        return [1.0] * len(visual)
    mean = [sum(cosine(v, t) for t in text) / len(text) * (-1 if negative else 1) for v in visual]
    low, high = min(mean), max(mean)
    return [(m - low) / (high - low) if high > low else 1.0 for m in mean]


def determinants(vectors: Tensor, weight: list[float], chosen: list[int]) -> dict[int, float]:
    """log det of the kernel of what is chosen and each other token; weights multiply both sides."""
    table = torch.tensor(cosine_table(vectors), dtype=torch.float64)
    scale = torch.tensor(weight, dtype=torch.float64)
    kernel = scale[:, None] * table * scale
    found = {}
    for i in range(len(vectors)):
        if i not in chosen:
            some = torch.tensor([*chosen, i])
            found[i] = float(torch.linalg.det(kernel[some][:, some]))
    return found


def cdpruner(vectors: Tensor, weight: list[float], count: int) -> list[int]:
    chosen: list[int] = []
    while len(chosen) < count:
        chosen.append(first_best(determinants(vectors, weight, chosen)))
    return chosen


def scope_gains(table: list[list[float]], weight: list[float], chosen: list[int]) -> dict[int, float]:
    every = range(len(table))
    covered = [max([0.0, *(table[i][j] for i in chosen)]) for j in every]
    return {i: weight[i] * sum(max(0.0, table[i][j] - covered[j]) for j in every) for i in every if i not in chosen}


def scope(features: Tensor, weight: list[float], count: int) -> list[int]:
    table, chosen = cosine_table(features), []
    while len(chosen) < count:
        chosen.append(first_best(scope_gains(table, weight, chosen)))
    return chosen


def vispruner(features: Tensor, scores: list[float], count: int, important: float, remove: int) -> list[int]:
    table = cosine_table(features)
    order = best(scores, len(scores))
    first = int(count * important)
    left = order[first:]
    while count > first and len(left) > count - first:
        goes = min(remove, len(left) - (count - first))
        even, odd = left[0::2], left[1::2]
        alike = {place: max(table[i][j] for j in odd) for place, i in enumerate(even)}
        ranked = sorted(alike, key=lambda place: (-alike[place], -place))
        left = [even[place] for place in ranked[goes:]] + odd
    return sorted(order[:first] + (left if count > first else []))


def dart(
    hidden: Tensor, keys: Tensor, visual: list[int], question: list[int], count: int, pivots: tuple[int, int], power: int
) -> list[int]:
    """Kept tokens of one image of a prompt without padding. hidden [S, D], keys [G, S, d]."""
    norm = {s: float((keys[:, s].double().abs() ** power).sum()) for s in range(len(hidden))}

    def largest(some: list[int], number: int) -> list[int]:
        return sorted(some, key=lambda s: (-norm[s], s))[:number]

    seen = largest(visual, min(pivots[0], count))
    every = seen + largest(question, pivots[1])
    kept, wanted = set(seen), count - len(seen)
    for number, pivot in enumerate(every):
        share = wanted // len(every) + (number < wanted % len(every))
        pool = sorted((s for s in visual if s not in kept), key=lambda s: (cosine(hidden[pivot], hidden[s]), s))
        kept |= set(pool[:share])
    return sorted(kept)
