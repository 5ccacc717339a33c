"""FlashVID against loops over frames and tokens, written from the paper."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import foveate
from foveate.errors import InputError
from foveate.methods.flashvid import FlashVID
from foveate.methods.tools.scoring import cls_attention
from foveate.tokens import EncoderTap, Reduction, VisualTokens

GRID, CHANNELS, FRAMES = (3, 4), 6, 7
CELLS = GRID[0] * GRID[1]
Vector = list[float]


def video(seed: int, frames: int = FRAMES, rows: int = 1, moves: float = 0.35) -> VisualTokens:
    """Things that stand and things that move to another cell, and attention that differs."""
    random = torch.Generator().manual_seed(seed)
    states = [torch.randn(rows, CELLS, CHANNELS, generator=random) + 0.7]
    for _ in range(frames - 1):
        turned = torch.randperm(CELLS, generator=random)
        noise = torch.randn(rows, CELLS, CHANNELS, generator=random)
        strength = moves * 2 * torch.rand(rows, CELLS, 1, generator=random)
        states.append(states[-1][:, turned] + strength * noise)
    features = torch.stack(states, 1).flatten(1, 2)
    width = 8
    keys = torch.randn(rows * frames, 1 + CELLS, width, generator=random)
    tap = EncoderTap(2 * torch.randn(rows * frames, width, generator=random), keys, 2)
    return VisualTokens(features, GRID, {"aligned": tap}, projected=features, frames=frames)


def alone(tokens: VisualTokens, row: int) -> VisualTokens:
    tap, some = tokens.taps["aligned"], slice(row * tokens.frames, (row + 1) * tokens.frames)
    assert tap.query is not None
    features = tokens.features[row : row + 1]
    mine = EncoderTap(tap.query[some], tap.keys[some], tap.heads)
    return VisualTokens(features, GRID, {"aligned": mine}, projected=features, frames=tokens.frames)


def dot(a: Vector, b: Vector) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def cosine(a: Vector, b: Vector) -> float:
    return dot(a, b) / math.sqrt(dot(a, a) * dot(b, b))


def mean(vectors: list[Vector]) -> Vector:
    return [sum(column) / len(vectors) for column in zip(*vectors, strict=True)]


def shared(weights: Vector, total: int, most: list[int]) -> list[int]:
    wanted = [weight * total for weight in weights]
    counts = [min(top, math.floor(value)) for value, top in zip(wanted, most, strict=True)]
    while sum(counts) < total:
        short = [at for at in range(len(counts)) if counts[at] < most[at]]
        for at in sorted(short, key=lambda at: (counts[at] - wanted[at], at))[: total - sum(counts)]:
            counts[at] += 1
    return counts


def scenes_by_hand(means: list[Vector], threshold: float, least: int) -> list[list[int]]:
    alike = {frame: cosine(means[frame], means[frame + 1]) for frame in range(len(means) - 1)}
    ends = {frame for frame, value in alike.items() if value < threshold}
    for frame in sorted(alike, key=lambda frame: (alike[frame], frame)):
        if len(ends) + 1 < least:
            ends.add(frame)
    found: list[list[int]] = [[]]
    for frame in range(len(means)):
        found[-1].append(frame)
        if frame in ends:
            found.append([])
    return found


def chosen_by_hand(frame: list[Vector], attention: Vector, event: Vector, count: int) -> list[int]:
    weight = [a * max(0.0, dot(x, event)) for a, x in zip(attention, frame, strict=True)]
    found: list[int] = []
    for _ in range(count):
        others = found or None
        worth = {}
        for at in range(len(frame)):
            if at not in found:
                rivals = others or [other for other in range(len(frame)) if other != at]
                far = max(0.0, min(1 - cosine(frame[at], frame[other]) for other in rivals))
                worth[at] = far * weight[at] if weight[at] else -1.0
        found.append(max(worth, key=lambda at: (worth[at], -at)))
    return found


def centres_by_hand(means: list[Vector], count: int) -> tuple[list[int], list[int]]:
    """Which are centres, and the centre of each."""
    apart = [[math.sqrt(sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) / CHANNELS) for b in means] for a in means]
    near = min(count, 7)
    density = [math.exp(-sum(d * d for d in sorted(row)[:near]) / near) for row in apart]
    top = max(max(row) for row in apart)
    scores = []
    for at, mine in enumerate(density):
        denser = [other for other, theirs in enumerate(density) if (theirs, -other) > (mine, -at)]
        scores.append(mine * min((apart[at][other] for other in denser), default=top))
    centres = sorted(range(len(means)), key=lambda at: (-scores[at], at))[:count]
    owner = [at if at in centres else min(centres, key=lambda centre: (apart[at][centre], centre)) for at in range(len(means))]
    return centres, owner


def by_hand(method: FlashVID, states: list[list[Vector]], attention: list[Vector], count: int) -> dict[int, Vector]:
    """The cell of the video at which each output stands, and the output."""
    frames = len(states)
    means = [mean(frame) for frame in states]
    even = [1 / frames] * frames
    some = shared(even, math.ceil(method.chosen * count - 1e-9), [CELLS] * frames)
    least = shared(even, count, [CELLS] * frames)
    outputs: dict[int, Vector] = {}
    trees: dict[int, dict[int, list[Vector]]] = {frame: {} for frame in range(frames)}
    share = [0.0] * frames
    for scene in scenes_by_hand(means, method.scene, method.scenes):
        event = mean([means[frame] for frame in scene])
        free: dict[int, set[int]] = {}
        for frame in scene:
            chosen = chosen_by_hand(states[frame], attention[frame], event, some[frame])
            free[frame] = set(range(CELLS)) - set(chosen)
            outputs |= {frame * CELLS + at: states[frame][at] for at in chosen}
        links: dict[tuple[int, int], tuple[float, int]] = {}
        for before, frame in itertools.pairwise(scene):
            for at in free[frame]:
                if free[before]:
                    alike = {other: cosine(states[frame][at], states[before][other]) for other in free[before]}
                    partner = max(alike, key=lambda other: (alike[other], -other))
                    if alike[partner] > method.link:
                        links[frame, at] = alike[partner], partner
        room = len(scene) * CELLS - sum(least[frame] for frame in scene)
        kept = sorted(links, key=lambda place: (-links[place][0], place))[:room]
        links = {place: links[place] for place in kept}
        for frame in scene:
            for at in free[frame]:
                root = frame, at
                while root in links:
                    root = root[0] - 1, links[root][1]
                trees[root[0]].setdefault(root[1], []).append(states[frame][at])
        begun = sum(len(trees[frame]) for frame in scene)
        for frame in scene:
            share[frame] = len(scene) / frames * len(trees[frame]) / max(1, begun)
    counts = shared([part / max(1e-12, sum(share)) for part in share], count - sum(some), [len(trees[f]) for f in range(frames)])
    for frame in range(frames):
        roots = sorted(trees[frame])
        if counts[frame]:
            tree_means = [mean(trees[frame][root]) for root in roots]
            centres, owner = centres_by_hand(tree_means, counts[frame])
            for centre in centres:
                members = [tree_means[at] for at in range(len(roots)) if owner[at] == centre]
                outputs[frame * CELLS + roots[centre]] = mean(members)
    return outputs


def check(method: FlashVID, tokens: VisualTokens, count: int) -> Reduction:
    found = method.reduce(tokens)
    rows, frames = len(tokens.features), tokens.frames
    assert found.valid is None
    attention = cls_attention(tokens.taps["aligned"]).double().view(rows, frames, CELLS)
    states = tokens.features.double().view(rows, frames, CELLS, CHANNELS)
    outputs = found.apply(tokens.features)
    for row in range(rows):
        expected = by_hand(method, states[row].tolist(), attention[row].tolist(), count)
        assert found.index[row].tolist() == sorted(expected)
        wanted = torch.tensor([expected[at] for at in sorted(expected)], dtype=torch.double)
        torch.testing.assert_close(outputs[row].double(), wanted, atol=1e-5, rtol=1e-5)
    return found


@pytest.mark.parametrize("count", [1, 6, 14, 21, 42, 70, FRAMES * CELLS])
@pytest.mark.parametrize(
    "fields",
    [{}, {"scenes": 2}, {"scenes": 1, "scene": -1}, {"scenes": 3, "link": 0.4}, {"chosen": 0, "scenes": 2}, {"chosen": 1.0}],
    ids=str,
)
def test_it_equals_loops(fields: dict[str, Any], count: int) -> None:
    check(FlashVID(budget=count, **fields), video(1, rows=3), count)


def test_trees_are_found_where_things_move() -> None:
    """Without noise every token of a later frame is one of the first: all trees begin there."""
    tokens = video(2, moves=0.0)
    found = FlashVID(budget=20, chosen=0, scenes=1, scene=-1, link=0.9).reduce(tokens)
    assert int((found.index < CELLS).sum()) == CELLS  # as many as begin there; the rest had to stay without a link


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 99), count=st.integers(1, FRAMES * CELLS), frames=st.integers(1, FRAMES), scenes=st.integers(1, 9))
def test_counts_are_exact_and_rows_are_alone(seed: int, count: int, frames: int, scenes: int) -> None:
    tokens, count = video(seed, frames, rows=2), min(count, frames * CELLS)
    method = FlashVID(budget=count, scenes=scenes)
    both = method.reduce(tokens)
    assert both.index.shape == (2, count)
    for row in range(2):
        found = method.reduce(alone(tokens, row))
        assert found.index.tolist() == both.index[row : row + 1].tolist()
        torch.testing.assert_close(found.matrix(tokens.number), both.matrix(tokens.number)[row : row + 1])
        assert all(line == sorted(set(line)) for line in found.index.tolist())
        sums = found.matrix(tokens.number).sum(-1)
        torch.testing.assert_close(sums, torch.ones_like(sums))


def test_tokens_of_negative_relevance_come_last() -> None:
    tokens = video(3, frames=1)
    against = tokens.features.clone()
    against[:, :4] = -5.0 * tokens.features.mean(1, keepdim=True) + 0.01 * tokens.features[:, 4:8]
    against[:, 4:] += 3 * tokens.features.mean(1, keepdim=True)
    found = FlashVID(budget=8, chosen=1.0).reduce(VisualTokens(against, GRID, tokens.taps, projected=against))
    assert found.index.min() >= 4


def test_they_come_after_equal_tokens_too() -> None:
    random = torch.Generator().manual_seed(4)
    features = (torch.randn(1, 4, CHANNELS, generator=random) + 1).repeat(1, 3, 1)
    features[:, 0] = -features[:, 1:].mean(1)
    found = FlashVID(budget=11, chosen=1.0).reduce(VisualTokens(features, GRID, video(3, 1).taps, projected=features))
    assert found.index.tolist() == [[*range(1, 12)]]


@pytest.mark.parametrize("fields", [{"chosen": 1.1}, {"chosen": -0.1}, {"scenes": 0}, {"link": -2}, {"chosen": float("nan")}])
def test_wrong_fields_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        FlashVID(**fields)


def test_ragged_scenes_in_a_batch() -> None:
    """One video stands still, the other one changes: each has the scenes that it has alone."""
    still, moving = video(5, moves=0.0), video(6, moves=3.0)
    features = torch.cat([still.features, moving.features])
    taps = [each.taps["aligned"] for each in (still, moving)]
    query: Tensor = torch.cat([tap.query for tap in taps if tap.query is not None])
    both = VisualTokens(
        features, GRID, {"aligned": EncoderTap(query, torch.cat([tap.keys for tap in taps]), 2)}, projected=features, frames=FRAMES
    )
    check(FlashVID(budget=25, scenes=1), both, 25)


def test_it_is_registered() -> None:
    assert isinstance(foveate.get("flashvid"), FlashVID)
