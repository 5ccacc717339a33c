"""Intervals: right at their ends and for few questions, and those of resampled scenes elsewhere."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from foveate.lab.scores import FEW, Scores, few_values


def scores(scene):
    scene = np.asarray(scene)
    number = int(scene.max()) + 1
    drawn = np.random.default_rng(0).multinomial(number, np.full(number, 1 / number), size=2000)
    return Scores(np.full(len(scene), "color"), scene, drawn)


def test_one_question_says_next_to_nothing():
    """Wilson's interval of one success, and none, from tables."""
    one = scores([0])
    assert one.interval(np.array([True])) == pytest.approx((1.0, 0.2065, 1.0), abs=1e-3)
    assert one.interval(np.array([False])) == pytest.approx((0.0, 0.0, 0.7935), abs=1e-3)
    assert few_values(np.array([1.0] * 9 + [0.0]), 10, paired=False) == pytest.approx((0.5958, 0.9821), abs=1e-3)


@pytest.mark.parametrize("right", [True, False])
def test_all_alike(right):
    """The rule of three: with 300 scenes and no failure, about one in 80 may still fail."""
    mean, low, high = scores(range(300)).interval(np.full(300, right))
    assert mean == float(right)
    assert high - low == pytest.approx(0.0126, abs=1e-3)


def test_equal_answers_are_not_proven_equal():
    some = np.arange(20) % 2 == 0
    mean, low, high = scores(range(20)).difference(some, some)
    assert mean == 0
    assert -0.2 < low < -0.05
    assert high == pytest.approx(-low)
    many = np.arange(2000) % 2 == 0
    assert scores(range(2000)).difference(many, many)[2] < 0.002


@given(st.integers(1, 60), st.integers(0, 60), st.integers(0, 2**31))
def test_intervals_hold_their_mean(number, right, seed):
    values = np.random.default_rng(seed).permutation(np.arange(number) < right)
    mean, low, high = scores(range(number)).interval(values)
    assert 0 <= low <= mean + 1e-9
    assert mean - 1e-9 <= high <= 1
    assert low < high


def test_how_often_few_questions_are_right():
    """In 95 % of draws, more or less, the interval holds the true share."""
    random = np.random.default_rng(3)
    for share in (0.5, 0.9, 0.98):
        for number in (5, 20):
            draws = random.random((2000, number)) < share
            found = [few_values(row.astype(float), number, paired=False) for row in draws]
            assert np.mean([low <= share <= high for low, high in found]) > 0.9


def test_many_scenes_are_resampled():
    """As before: questions of a scene belong together, so that intervals are wider than of as many single ones."""
    scene = np.repeat(np.arange(FEW * 5), 4)
    values = np.repeat(np.arange(FEW * 5) % 10 < 9, 4)
    mean, low, high = scores(scene).interval(values)
    assert mean == pytest.approx(0.9)
    assert high - low == pytest.approx(2 * 1.96 * (0.09 / (FEW * 5)) ** 0.5, rel=0.1)
