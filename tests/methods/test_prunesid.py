"""PruneSID: against the released code's steps, written as loops, and what depends on the picture."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import foveate
from foveate.methods.prunesid import PruneSID, quotas
from foveate.tokens import EncoderTap, VisualTokens

from .. import zoo

GRID, CHANNELS = (6, 8), 24
N = GRID[0] * GRID[1]


def pictures(number: int = 3, seed: int = 0, things: int = 5) -> VisualTokens:
    """Tokens of a few kinds, so that some are alike."""
    random = torch.Generator().manual_seed(seed)
    kinds = torch.randn(number, things, CHANNELS, generator=random) + 0.5
    which = torch.randint(things, (number, N), generator=random)
    features = kinds.gather(1, which[..., None].expand(-1, -1, CHANNELS)) + 0.7 * torch.randn(number, N, CHANNELS, generator=random)
    tap = EncoderTap(
        torch.randn(number, CHANNELS, generator=random), torch.randn(number, N + 1, CHANNELS, generator=random), 4, features
    )
    return VisualTokens(features, GRID, {"aligned": tap})


def by_hand(features: Tensor, attention: list[float], need: int) -> set[int]:
    """The steps of the code for one picture, without [CLS]."""
    count = len(features)
    states = features.double().sigmoid().T  # [C, N]
    states = states - states.mean(0)
    vectors = torch.linalg.svd(states, full_matrices=False)[2][: max(1, need // 4)]
    group = vectors.abs().argmax(0).tolist()
    number = max(1, need // 4)
    unit = torch.nn.functional.normalize(features.double(), dim=-1)
    alike = unit @ unit.T
    mean = sum(float(alike[i, j]) for i in range(count) for j in range(i + 1, count)) / (count * (count - 1) / 2)
    order: dict[int, list[int]] = {}
    survivors = []
    for one in range(number):
        left = {at: attention[at] for at in range(count) if group[at] == one}
        mine, first = list(left), []
        while left:
            best = max(left, key=lambda at: (left[at], -at))
            first.append(best)
            left = {at: value for at, value in left.items() if at != best and alike[best, at] <= need / 32 * mean}
        survivors.append(len(first))
        order[one] = first + sorted(set(mine) - set(first), key=lambda at: (-attention[at], at))
    sizes = [len(order[one]) for one in range(number)]
    lower = [min(1, size) for size in sizes]
    upper = [min(5 * math.ceil(need / 64), size, alive) for size, alive in zip(sizes, survivors, strict=True)]
    while sum(upper) < need:
        upper = [min(value + 1, size) for value, size in zip(upper, sizes, strict=True)]
    rest, total, done, quota = need - sum(lower), 0, 0, []
    for one in range(number):
        total += survivors[one]
        now = round(total / sum(survivors) * rest)
        quota.append(min(now - done + lower[one], upper[one]))
        done = now
    for one in sorted(range(number), key=lambda one: -survivors[one]):
        quota[one] += min(upper[one] - quota[one], need - sum(quota))
    return {at for one in range(number) for at in order[one][: quota[one]]}


@pytest.mark.parametrize("count", [4, 8, 13, 20, 33, 47])
@pytest.mark.parametrize("seed", range(3))
def test_it_equals_the_codes_steps(count, seed):
    tokens = pictures(seed=seed)
    reduction = PruneSID(budget=count).reduce(tokens)
    assert bool(reduction.mask().all())
    for row, (index, scores) in enumerate(zip(reduction.index, reduction.scores, strict=True)):
        assert index.tolist() == sorted(index.tolist())
        assert set(index.tolist()) == by_hand(tokens.features[row], scores.tolist(), count)


def test_nothing_alike_is_kept_twice():
    """Three kinds of equal tokens: as long as there are as many groups, one token of each kind comes first."""
    tokens = pictures(1, things=3)
    same = tokens.features.new_tensor([[3.0] * 8 + [-1.0] * 16, [-1.0] * 8 + [3.0] * 8 + [-1.0] * 8, [-1.0] * 16 + [3.0] * 8])
    which = torch.arange(N) % 3
    exact = VisualTokens(same[which][None], GRID, tokens.taps)
    kept = PruneSID(budget=12).reduce(exact).index[0] % 3
    assert set(kept.tolist()) == {0, 1, 2}


def test_counts_by_picture():
    tokens = pictures(4, things=3)
    unit = torch.nn.functional.normalize(tokens.features, dim=-1)
    features = tokens.features.clone()
    features[0] = features[0].mean(0) + 0.05 * features[0]  # a picture of much the same
    tokens = VisualTokens(features, GRID, tokens.taps)
    unit = torch.nn.functional.normalize(features, dim=-1)
    means = [float((unit[row] @ unit[row].T).sum() - N) / (N * (N - 1)) for row in range(4)]
    method = PruneSID(goal=16, typical=sum(means[1:]) / 3)
    reduction = method.reduce(tokens)
    counts = reduction.mask().sum(1).tolist()
    assert counts == [max(1, min(N, round(16 * (1 - mean) / (1 - method.typical)))) for mean in means]
    assert counts[0] < min(counts[1:])
    assert max(counts) > 16, "unlike pictures have more than a typical one"
    for row, count in enumerate(counts):  # as with that budget
        alone = VisualTokens(
            features[row : row + 1], GRID, {"aligned": EncoderTap(*(part[row : row + 1] for part in _parts(tokens)), 4)}
        )
        fixed = PruneSID(budget=count).reduce(alone).index[0]
        assert torch.equal(reduction.index[row][reduction.mask()[row]], fixed)


def _parts(tokens: VisualTokens) -> tuple[Tensor, Tensor]:
    tap = tokens.taps["aligned"]
    return tap.query, tap.keys


def test_quotas():
    sizes, survivors = torch.tensor([[10, 3, 0, 20]]), torch.tensor([[2, 1, 0, 9]])
    for count in (5, 12, 30, 33):
        found = quotas(sizes, survivors, count)
        assert int(found.sum()) == count
        assert bool((found <= sizes).all())
    assert quotas(sizes, survivors, 5).tolist() == [[1, 1, 0, 3]]


def test_on_a_model():
    model, inputs = zoo.load(), zoo.batch()
    for typical in (0.2, 0.9):  # with which pictures have fewer than the goal, and more
        with foveate.get("prunesid", goal=16, typical=typical)(model) as session:
            model(**inputs)
        assert len(set(session.report.after)) > 1
        assert (max(session.report.after) > 16) == (typical > 0.5)
    assert foveate.get("prunesid", goal=16, typical=0.2).with_budget(9).goal is None
    for wrong in ({"goal": 16}, {"typical": 0.3, "budget": 5}, {"goal": 16, "typical": 1.0}, {"goal": 0, "typical": 0.2}):
        with pytest.raises(foveate.InputError, match=r"typical|goal"):
            PruneSID(**wrong)
    with pytest.raises(foveate.InputError, match=r"typical=0\.2; goal goes with"):
        PruneSID(goal=16, typical=0.2, budget=4)
