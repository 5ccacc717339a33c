"""What a sample says of a mean loss, against enumeration, simulation and what is known of binomials."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from foveate.tuning.bounds import (
    LEVEL,
    Guess,
    Losses,
    _statistic,
    betting_p_value,
    exact_p_value,
    falling,
    fewest,
    hopeless,
    p_value,
    upper_bound,
)


def losses(lost: int, gained: int, number: int) -> Losses:
    values = np.zeros(number)
    values[:lost], values[lost : lost + gained] = 1, -1
    return Losses(values, np.arange(number))


def test_nothing_lost_is_a_binomial():
    """Without gains the worst case is that none are possible: then no loss in n examples has the chance (1 - t)^n."""
    for number, tolerance in ((59, 0.05), (58, 0.05), (299, 0.01), (14, 0.2)):
        assert exact_p_value(0, 0, number, tolerance) == pytest.approx((1 - tolerance) ** number, rel=1e-6)
    assert fewest(0.05) == 59
    assert fewest(0.01) == 299


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (1, 0), (1, 2), (3, 3), (4, 0)])
def test_the_exact_test_by_enumeration(lost, gained):
    """Every table of ten examples, one by one, at the same chances of gains."""
    number, tolerance, worst = 10, 0.3, 0.0
    found = float(_statistic(np.array(float(lost)), np.array(float(gained)), number, tolerance))
    for step in range(32):
        gain = (1 - tolerance) / 2 * (step / 32) ** 2
        loss, total = gain + tolerance, 0.0
        for a, g in itertools.product(range(number + 1), repeat=2):
            same = number - a - g
            if same < 0 or float(_statistic(np.array(float(a)), np.array(float(g)), number, tolerance)) < found - 1e-9:
                continue
            ways = math.factorial(number) / math.factorial(a) / math.factorial(g) / math.factorial(same)
            total += ways * loss**a * gain**g * (1 - loss - gain) ** same
        worst = max(worst, total)
    assert exact_p_value(lost, gained, number, tolerance) == pytest.approx(min(1.0, worst), abs=1e-9)


@pytest.mark.parametrize(("number", "tolerance", "gain"), [(100, 0.05, 0.0), (100, 0.05, 0.05), (300, 0.02, 0.01), (60, 0.1, 0.2)])
def test_no_more_than_a_twentieth_is_accepted_wrongly(number, tolerance, gain):
    """At a loss that is exactly the tolerance, which is the hardest case."""
    random = np.random.default_rng(1)
    tables = random.multinomial(number, [gain + tolerance, gain, 1 - 2 * gain - tolerance], size=3000)
    wrong = np.mean([exact_p_value(int(a), int(g), number, tolerance) <= LEVEL for a, g, _ in tables])
    assert wrong <= LEVEL + 3 * math.sqrt(LEVEL * (1 - LEVEL) / 3000)


def test_groups_are_not_counted_as_many():
    """Ten questions about each picture that are all answered alike tell as much as one."""
    random = np.random.default_rng(2)
    wrong = []
    for _ in range(400):
        once = random.choice([1.0, 0.0], size=40, p=[0.1, 0.9])
        wrong.append(p_value(Losses(np.repeat(once, 10), np.repeat(np.arange(40), 10)), 0.1) <= LEVEL)
    assert np.mean(wrong) <= LEVEL + 0.03
    alone = Losses(np.zeros(300), np.arange(300))
    assert alone.is_plain
    assert not Losses(np.zeros(300), np.arange(300) // 2).is_plain
    assert p_value(alone, 0.02) < p_value(Losses(np.zeros(300), np.arange(300) // 10), 0.02)


def test_shares_of_an_answer_are_bet_on():
    """A soft score loses a third at a time: the exact test knows no such values."""
    values = np.zeros(2000)
    values[:60] = 1 / 3
    mine = Losses(values[np.random.default_rng(0).permutation(2000)], np.arange(2000))
    assert not mine.is_plain
    assert p_value(mine, 0.05) <= LEVEL
    assert betting_p_value(mine, mine.mean) > 0.2
    assert mine.mean < upper_bound(mine) < 0.03


def test_the_bound_is_where_the_test_turns():
    mine = losses(3, 1, 200)
    bound = upper_bound(mine)
    assert p_value(mine, bound) <= LEVEL < p_value(mine, bound - 2e-4)
    assert upper_bound(losses(0, 0, 200)) < bound < upper_bound(losses(6, 1, 200))


def test_what_can_no_longer_pass():
    assert hopeless(losses(4, 0, 50), 0.02, 200)
    assert not hopeless(losses(0, 0, 50), 0.02, 200)
    assert not hopeless(losses(1, 0, 50), 0.02, 1000)


def test_guesses():
    lucky, many = Guess.of(losses(0, 0, 50)), Guess.of(losses(0, 0, 400))
    assert lucky.power(100, 0.05) < many.power(100, 0.05)
    assert many.power(58, 0.05) == 0  # which nothing passes
    assert Guess.of(losses(0, 0, 50), 0.1).mean > 0.03  # others lose a tenth: half of that is believed
    assert Guess.of(losses(30, 0, 100)).surely_loses(0.05)
    assert not Guess.of(losses(6, 0, 100)).surely_loses(0.05)
    assert Guess.of(losses(30, 0, 100)).needed(0.05) is None
    few = Guess.of(losses(4, 3, 400)).needed(0.03)
    assert few is not None
    assert few >= fewest(0.03)
    tables = np.random.default_rng(3).multinomial(few, [0.01, 0.0075, 0.9825], 300)
    passed = np.mean([exact_p_value(int(a), int(g), few, 0.03) <= LEVEL for a, g, _ in tables])
    assert 0.6 <= passed <= 0.95  # four in five, by its own guess of the losses


def test_values_that_never_rise():
    assert falling([3.0, 1.0, 2.0, 2.0, 0.0], [1.0] * 5) == pytest.approx([3, 5 / 3, 5 / 3, 5 / 3, 0])
    assert falling([1.0, 2.0], [1.0, 3.0]) == pytest.approx([1.75, 1.75])
    assert falling([], []) == []
