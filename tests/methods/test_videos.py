"""Methods that decide over a whole video: against loops over frames and tokens, and what their papers promise."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import foveate
from foveate.methods.evs import EVS
from foveate.methods.tools.budgeting import largest_remainders
from foveate.methods.v_cast import VCast
from foveate.methods.vidcom2 import VidCom2
from foveate.tokens import VisualTokens

GRID, CHANNELS, FRAMES = (3, 4), 10, 5
CELLS = GRID[0] * GRID[1]
ALL = FRAMES * CELLS
METHODS = (EVS, VidCom2, VCast)


def video(seed: int = 0, frames: int = FRAMES, rows: int = 1) -> Tensor:
    """[B, T * N, C]: frames that are unlike the one before by different amounts, with tokens of different lengths."""
    random = torch.Generator().manual_seed(seed)
    first = torch.randn(rows, 1, CELLS, CHANNELS, generator=random)
    steps = torch.randn(rows, frames, CELLS, CHANNELS, generator=random) * (
        0.1 + torch.rand(rows, frames, CELLS, 1, generator=random)
    )
    return (first + steps.cumsum(1)).flatten(1, 2)


def tokens(features: Tensor, frames: int = FRAMES) -> VisualTokens:
    return VisualTokens(features, GRID, projected=features, frames=frames)


def kept(method, features: Tensor, frames: int = FRAMES) -> list[set[int]]:
    reduction = method.reduce(tokens(features, frames))
    assert reduction.valid is None
    assert all(row == sorted(set(row)) for row in reduction.index.tolist())
    return [set(row) for row in reduction.index.tolist()]


def cosine(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True)) / max(1e-12, math.hypot(*a) * math.hypot(*b))


def evs_by_hand(features: list[list[float]], count: int) -> set[int]:
    scores = dict.fromkeys(range(CELLS), 9.0)
    scores |= {at: 1 - cosine(features[at], features[at - CELLS]) for at in range(CELLS, len(features))}
    return set(sorted(scores, key=lambda at: (-scores[at], at))[:count])


def vidcom2_by_hand(features: list[list[float]], count: int) -> set[int]:
    number, frames = len(features), len(features) // CELLS
    variance = []
    for channel in range(CHANNELS):
        values = [token[channel] for token in features]
        mean = sum(values) / number
        variance.append(sum((value - mean) ** 2 for value in values) / number)
    low = sorted(range(CHANNELS), key=lambda channel: (variance[channel], channel))[: max(1, CHANNELS // 2)]
    states = []
    for token in features:
        length = math.hypot(*[token[channel] for channel in low])
        states.append([token[channel] / length for channel in low])

    def mean_of(some: list[list[float]]) -> list[float]:
        return [sum(token[channel] for token in some) / len(some) for channel in range(len(low))]

    def alike(x: list[float], c: list[float]) -> float:
        distance = sum((a - b) ** 2 for a, b in zip(x, c, strict=True))
        return sum(math.exp(-distance / (2 * 2.0**k)) for k in range(-3, 2))

    video_centre, redundancy, means = mean_of(states), {}, []
    for frame in range(frames):
        mine = states[frame * CELLS : (frame + 1) * CELLS]
        centre = mean_of(mine)
        for cell, x in enumerate(mine):
            redundancy[frame * CELLS + cell] = alike(x, video_centre) + alike(x, centre)
        means.append(-sum(alike(x, video_centre) for x in mine) / CELLS)
    powers = [math.exp((value - max(means)) / 0.01) for value in means]
    weights = [power / sum(powers) for power in powers]
    share, found = count / number, set()
    for frame in range(frames):
        part = min(1.0, share * (1 + weights[frame] - sum(weights) / frames))
        mine = sorted(range(frame * CELLS, (frame + 1) * CELLS), key=lambda at: (redundancy[at], at))
        found |= set(mine[: min(CELLS, max(1, round(part * CELLS)))])
    while len(found) > count:
        found.remove(max(found, key=lambda at: (redundancy[at], at)))
    while len(found) < count:
        found.add(min(set(range(number)) - found, key=lambda at: (redundancy[at], at)))
    return found


def v_cast_by_hand(features: list[list[float]], count: int) -> set[int]:
    frames = len(features) // CELLS
    means = []
    for frame in range(frames):
        mine = features[frame * CELLS : (frame + 1) * CELLS]
        mean = [sum(token[channel] for token in mine) / CELLS for channel in range(CHANNELS)]
        means.append([value / math.hypot(*mean) for value in mean])
    turns = []
    for frame in range(frames):
        if frame in (0, frames - 1):
            turns.append(1.0)
        else:
            before, after = ([a - b for a, b in zip(means[frame + move], means[frame + move - 1], strict=True)] for move in (0, 1))
            turns.append(1 - cosine(before, after))
    powers = [math.exp(turn / 0.7) for turn in turns]
    wanted = [count * power / sum(powers) for power in powers]
    counts = [min(CELLS, math.floor(value)) for value in wanted]
    while sum(counts) < count:
        short = [frame for frame in range(frames) if counts[frame] < CELLS]
        for frame in sorted(short, key=lambda frame: (-(wanted[frame] - counts[frame]), frame))[: count - sum(counts)]:
            counts[frame] += 1
    found = set()
    for frame in range(frames):
        mine = range(frame * CELLS, (frame + 1) * CELLS)
        norms = [math.hypot(*features[at]) for at in mine]
        scores = {
            at: 1 - cosine(features[at], means[frame]) + (norms[at % CELLS] - min(norms)) / (max(norms) - min(norms)) for at in mine
        }
        found |= set(sorted(mine, key=lambda at: (-scores[at], at))[: counts[frame]])
    return found


BY_HAND = {EVS: evs_by_hand, VidCom2: vidcom2_by_hand, VCast: v_cast_by_hand}


@pytest.mark.parametrize("count", [CELLS, 17, 30, 44, 59])
@pytest.mark.parametrize("kind", METHODS)
def test_they_equal_loops(kind, count):
    features = video(rows=3)
    for row, found in zip(features, kept(kind(budget=count), features), strict=True):
        assert found == BY_HAND[kind](row.double().tolist(), count)


@pytest.mark.parametrize("kind", METHODS)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 99), count=st.integers(1, ALL), frames=st.integers(1, FRAMES))
def test_counts_are_exact_and_rows_are_alone(kind, seed, count, frames):
    features, count = video(seed, frames, rows=2), min(count, frames * CELLS)
    both = kept(kind(budget=count), features, frames)
    assert [len(row) for row in both] == [count, count]
    assert both == [*kept(kind(budget=count), features[:1], frames), *kept(kind(budget=count), features[1:], frames)]


def test_evs_of_a_still_video():
    still = torch.eye(CELLS, CHANNELS).index_fill(0, torch.tensor([CELLS - 2, CELLS - 1]), 1.0)[None].repeat(1, FRAMES, 1)
    assert kept(EVS(budget=CELLS), still) == [set(range(CELLS))]
    assert kept(EVS(budget=CELLS + 3), still) == [set(range(CELLS + 3))], "ties go to earlier tokens"
    for seed in range(5):
        assert kept(EVS(budget=0.4), video(seed))[0] >= set(range(CELLS)), "the first frame is whole"
    few = kept(EVS(budget=4), video())[0]
    assert few < set(range(CELLS))
    assert few == set(foveate.methods.tools.selection.uniform_lattice(*GRID, 4).tolist())


@pytest.mark.parametrize("budget", [0.25, 0.5])
def test_vidcom2_of_frames_in_another_order(budget):
    features, order = video(3), torch.tensor([3, 0, 4, 1, 2])
    shuffled = features.unflatten(1, (FRAMES, CELLS))[:, order].flatten(1, 2)
    moved = {int((order == at // CELLS).nonzero()) * CELLS + at % CELLS for at in kept(VidCom2(budget=budget), features)[0]}
    assert kept(VidCom2(budget=budget), shuffled) == [moved]


def test_vidcom2_gives_unlike_frames_more():
    noise = torch.randn(1, ALL, CHANNELS, generator=torch.Generator().manual_seed(1))
    features = video(frames=1).repeat(1, FRAMES, 1) + 0.01 * noise
    features[:, 2 * CELLS : 3 * CELLS] = video(7, frames=1)
    found = kept(VidCom2(), features)[0]
    number = [sum(at // CELLS == frame for at in found) for frame in range(FRAMES)]
    assert number[2] == max(number)
    assert min(number) >= 1


def test_v_cast_gives_turns_more():
    """A video that moves evenly in one direction and then in another: its middle is the turn."""
    there, back = torch.randn(2, CHANNELS, generator=torch.Generator().manual_seed(5)) * 0.05
    start = torch.randn(CELLS, CHANNELS, generator=torch.Generator().manual_seed(6)) + 1
    path = [start, start + there, start + 2 * there, start + 2 * there + back, start + 2 * there + 2 * back]
    found = kept(VCast(), torch.stack(path)[None].flatten(1, 2))[0]
    number = [sum(at // CELLS == frame for at in found) for frame in range(FRAMES)]
    assert number[2] > max(number[1], number[3])
    still = kept(VCast(budget=25), video(frames=1).repeat(1, FRAMES, 1))[0]
    assert [sum(at // CELLS == frame for at in still) for frame in range(FRAMES)] == [5] * FRAMES


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.integers(0, 60), st.integers(1, 12))
def test_largest_remainders(weights, total, most):
    total = min(total, most * len(weights))
    weights = torch.tensor([weights]) + 1e-6
    counts = largest_remainders(weights / weights.sum(), total, most)[0].tolist()
    assert sum(counts) == total
    assert all(0 <= count <= most for count in counts)
    if max(counts) < most:  # no cap was met
        wanted = (weights / weights.sum()).double()[0] * total
        assert all(abs(count - float(want)) < 1 + 1e-9 for count, want in zip(counts, wanted, strict=True))


@pytest.mark.parametrize(
    ("count", "frames", "rest"),
    [(CELLS, [2], 0), (2 * CELLS, [1, 3], 0), (CELLS + 5, [1], 5), (7, [], 7), (ALL - 1, [*range(4)], 11)],
)
def test_fewer_frames(count, frames, rest):
    (found,) = kept(foveate.get("fewer-frames", budget=count), video())
    number = [sum(at // CELLS == frame for at in found) for frame in range(FRAMES)]
    assert [frame for frame in range(FRAMES) if number[frame] == CELLS] == frames
    assert sum(number) == count
    assert max((value for value in number if value < CELLS), default=0) == rest
