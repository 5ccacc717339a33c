"""The law of QueCC: refits of its own table, tables made from known laws, and what is refused."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from foveate.analysis.law import DRAWS, Law, Points, fit, read_points, study
from foveate.errors import InputError

PUBLISHED = read_points()
REASONING, OCR = PUBLISHED["reasoning"], PUBLISHED["ocr"]
SIZES, TOKENS = (0.5, 1.8, 4.0, 7.0), (1, 4, 16, 36, 64, 144, 576)


def table(law: Law, sizes=SIZES, tokens=TOKENS) -> Points:
    pairs = np.array([(size, count) for size in sizes for count in tokens], float)
    return Points(pairs[:, 0], pairs[:, 1], 1 - law.error(pairs[:, 0], pairs[:, 1]))


def loss(points: Points, alpha: float, beta: float) -> float:
    """Of the best a and floor, the floor at least 0, by numpy's solver."""
    powers = np.array([size**-alpha * count**-beta for size, count in points.pairs])
    both, one = np.stack([powers, np.ones(len(points))], 1), powers[:, None]
    found = [(matrix, np.linalg.lstsq(matrix, points.errors, rcond=None)[0]) for matrix in (both, one)]
    return min(((matrix @ x - points.errors) ** 2).sum() for matrix, x in found if x.min() >= 0)


def written(tmp_path, content):
    path = tmp_path / "mine.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def rows(points: Points) -> list[dict[str, float]]:
    each = zip(points.sizes.tolist(), points.tokens.tolist(), points.scores.tolist(), strict=True)
    return [{"size": size, "tokens": tokens, "score": score} for size, tokens, score in each]


def test_the_published_tables():
    assert (len(REASONING), len(OCR)) == (28, 27)  # the cell of OCR at 7B and 576 repeats another one, and is left out
    assert REASONING.pairs[-1] == (7.0, 576.0)
    assert REASONING.scores[-1] == 0.5354
    assert (7.0, 576.0) not in OCR.pairs


def test_the_refit():
    law = fit(REASONING)
    assert (law.alpha, law.beta, law.a) == pytest.approx((0.0709, 0.0151, 0.5908), abs=2e-4)
    assert law.floor == 0
    assert study(REASONING, draws=1).rmse == pytest.approx(0.0037, abs=5e-5)


@pytest.mark.parametrize("points", [REASONING, OCR], ids=["reasoning", "ocr"])
def test_no_other_law_is_closer(points):
    law = fit(points)
    least = loss(points, law.alpha, law.beta)
    assert ((law.error(points.sizes, points.tokens) - points.errors) ** 2).sum() == pytest.approx(least, rel=1e-9)
    for far in (1e-4, 1e-3, 1e-2, 0.1):
        for angle in np.linspace(0, 2 * math.pi, 24, endpoint=False):
            assert loss(points, law.alpha + far * math.cos(angle), law.beta + far * math.sin(angle)) > least


def test_the_optimum_does_not_depend_on_the_floor():
    laws = [fit(REASONING, floor) for floor in (0, 0.1, 0.2)]
    assert [law.floor for law in laws] == [0, 0.1, 0.2]
    assert all(13.3 <= law.optimum(50) <= 13.7 for law in laws)
    assert laws[2].alpha - laws[0].alpha > 0.03  # which itself depends on it much


def test_the_optimum():
    law = fit(REASONING)
    assert law.optimum(0) == 1
    assert law.optimum(1e-6) == 1
    assert law.optimum(200) == pytest.approx(4 * law.optimum(50))
    assert Law(0.6, 0.077, 0.015, 0.03).optimum(50) == pytest.approx(12.1, abs=0.05)  # the constants printed in the paper's figure
    # at a fixed cost N (Q + V), found by looking at all V
    counts = np.linspace(1, 200, 20_000)
    assert counts[law.error(400 / (50 + counts), counts).argmin()] == pytest.approx(law.optimum(50), abs=0.02)


def test_ocr_has_no_optimum_below_all_tokens():
    found = study(OCR, draws=20)
    assert found.law.beta > found.law.alpha
    assert found.law.optimum(50) == found.law.optimum(0) == math.inf
    assert found.optimum_interval(50) == (math.inf, math.inf)


@pytest.mark.parametrize(
    "law", [Law(0.591, 0.0709, 0.0151, 0.0), Law(0.4, 0.2, 0.05, 0.1), Law(0.5, 0.03, 0.3, 0.25), Law(0.3, 0.4, -0.02, 0.3)]
)
def test_a_known_law_is_recovered(law):
    found = fit(table(law))
    assert (found.a, found.alpha, found.beta, found.floor) == pytest.approx((law.a, law.alpha, law.beta, law.floor), abs=1e-3)


def test_a_size_that_was_left_out():
    errors = study(REASONING, draws=1).left_out()
    assert list(errors) == list(SIZES)
    assert errors[7.0] < 0.015
    assert max(errors.values()) < 0.02
    law = fit(REASONING.without(7.0))
    held = REASONING.sizes == 7
    far = [abs(law.error(7, count) / (1 - score) - 1) for count, score in zip(TOKENS, REASONING.scores[held], strict=True)]
    assert errors[7.0] == pytest.approx(max(far))
    assert study(table(Law(0.5, 0.1, 0.02, 0.1), (1, 2)), draws=1).left_out() == {}


def test_scaling_the_error_changes_a_and_the_floor_only():
    law = Law(0.4, 0.2, 0.05, 0.1)
    noise = np.random.default_rng(3).normal(0, 0.002, 28)
    one = table(law)
    one = Points(one.sizes, one.tokens, one.scores + noise)
    two = Points(one.sizes, one.tokens, 1 - 0.5 * one.errors)
    first, second = fit(one), fit(two)
    assert (second.alpha, second.beta) == pytest.approx((first.alpha, first.beta), abs=1e-6)
    assert (second.a, second.floor) == pytest.approx((first.a / 2, first.floor / 2), abs=1e-5)
    assert first.floor > 0.05


def test_the_order_of_rows_is_irrelevant():
    order = np.random.default_rng(1).permutation(len(REASONING))
    mixed = Points(REASONING.sizes[order], REASONING.tokens[order], REASONING.scores[order])
    assert fit(mixed) == fit(REASONING)
    assert study(mixed, draws=5).draws == study(REASONING, draws=5).draws


def test_the_bootstrap():
    """Seeded; the true law is inside, and intervals shrink with the noise."""
    true, random = Law(0.55, 0.08, 0.02, 0.0), np.random.default_rng(5)
    widths = []
    for noise in (0.004, 0.001):
        exact = table(true)
        found = study(Points(exact.sizes, exact.tokens, exact.scores + random.normal(0, noise, 28)), draws=60)
        low, high = found.optimum_interval(50)
        assert low < true.optimum(50) < high
        widths.append(high - low)
    assert widths[1] < widths[0] / 2
    one, two = study(REASONING, draws=8, seed=1), study(REASONING, draws=8, seed=2)
    assert one.draws == study(REASONING, draws=8, seed=1).draws != two.draws
    whole = study(REASONING)
    assert len(whole.draws) == DRAWS
    low, high = whole.optimum_interval(50)
    assert 11.5 < low < 13.5 < high < 15.5
    assert whole.interval("floor")[1] > 0.1, "the floor is not identified"


def test_the_best_measured_point():
    """As the notes of the paper have them, without a fit."""
    best = {budget: REASONING.pairs[REASONING.best(0, budget)] for budget in (10, 50, 200, 400)}
    assert best == {10: (7, 1), 50: (7, 4), 200: (7, 16), 400: (7, 36)}
    best = {budget: REASONING.pairs[REASONING.best(50, budget)] for budget in (50, 100, 200, 400, 1000)}
    assert best == {50: (0.5, 36), 100: (1.8, 4), 200: (1.8, 36), 400: (7, 4), 1000: (7, 64)}
    assert REASONING.best(50, 25) is None


def test_what_sizes_can_afford():
    law = fit(REASONING)
    found = law.affordable((0.5, 1.8, 7, 14), 50, 400, 576)
    assert [(size, count) for size, count, _ in found] == [(0.5, 576), (1.8, 172), (7, 7)]
    assert found[2][2] == law.error(7, 7)
    assert law.affordable((7,), 50, 7 * 51, 576)[0][1] == 1


# -- what is refused


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("{", "is no JSON"),
        ("[" * 100_000, "nested too deeply"),
        ("[]", "has no tasks"),
        ('{"tasks": {}}', "has no tasks"),
        ('{"tasks": {"a": {}}}', "list of points"),
        ('{"tasks": {"a": [1]}}', "point 1: expected an object with size, tokens and score"),
        ('{"tasks": {"a": [{"size": 1, "tokens": 2}]}}', "expected an object with size, tokens and score"),
        ('{"tasks": {"a": [{"size": 1, "tokens": 2, "score": NaN}]}}', "score is nan; expected a finite number"),
        ('{"tasks": {"a": [{"size": 1, "tokens": 2, "score": null}]}}', "score is None; expected a finite number"),
        ('{"tasks": {"a": [{"size": true, "tokens": 2, "score": 0.5}]}}', "size is True"),
        ('{"tasks": {"a": [{"size": "7B", "tokens": 2, "score": 0.5}]}}', "size is '7B'"),
        ('{"tasks": {"a": [{"size": 0, "tokens": 2, "score": 0.5}]}}', "size 0"),
        ('{"tasks": {"a": [{"size": 1, "tokens": 0, "score": 0.5}]}}', "tokens from 1 to"),
        ('{"tasks": {"a": [{"size": 1, "tokens": 2, "score": 53.5}]}}', "percent: divide all scores by 100"),
        ('{"tasks": {"a": [{"size": 1, "tokens": 2, "score": 1442}]}}', "expected 0 to 1. Give mean scores as shares"),
        ('{"tasks": {"a": [{"size": 1, "tokens": 2, "score": -0.1}]}}', "expected 0 to 1"),
        ('{"tasks": {"a": [{"size": 1, "tokens": 2, "score": 0.5, "score": 0.6}]}}', "is there twice"),
        ('{"tasks": {"a": []}}', "all points have one size"),
    ],
)
def test_files_that_are_refused(tmp_path, content, match):
    with pytest.raises(InputError, match=match):
        read_points(written(tmp_path, content))


def test_tables_that_are_refused(tmp_path):
    law = Law(0.5, 0.1, 0.02, 0.1)
    pairs = rows(table(law))
    one_size = [row for row in pairs if row["size"] == 7]
    one_count = [row for row in pairs if row["tokens"] == 36]
    for few, match in (
        (one_size, "one size, so that nothing tells"),
        (one_count, "one number of tokens"),
        ([pairs[0], *pairs[-3:]], "4 points for a law of four numbers"),
        ([{**row, "score": 0.5} for row in pairs], "all scores are the same"),
        ([*pairs, pairs[3]], "size 0.5 with 36 tokens is there twice"),
    ):
        with pytest.raises(InputError, match=match):
            read_points(written(tmp_path, {"tasks": {"mine": few}}))
    with pytest.raises(InputError, match="cannot be read"):
        read_points(tmp_path / "none.json")
    with pytest.raises(InputError, match="cannot be read"):
        read_points(tmp_path)


def test_a_table_of_your_own(tmp_path):
    law = Law(0.4, 0.2, 0.05, 0.1)
    found = read_points(written(tmp_path, {"source": "mine", "tasks": {"vqa": rows(table(law)), "ocr": rows(OCR)}}))
    assert list(found) == ["vqa", "ocr"]
    assert fit(found["vqa"]).alpha == pytest.approx(0.2, abs=1e-3)
    assert fit(found["ocr"]) == fit(OCR)


def test_a_table_without_a_best_law_comes_to_an_end():
    """Errors that jump to a floor at once have their best alpha at infinity."""
    pairs = np.array([(size, count) for size in (1, 10, 100) for count in (1, 4)], float)
    jump = fit(Points(pairs[:, 0], pairs[:, 1], np.where(pairs[:, 0] == 1, 0.2, 0.6)))
    assert 3 <= jump.alpha <= 5
    assert jump.floor == pytest.approx(0.4, abs=1e-3)
    rising = fit(Points(pairs[:, 0], pairs[:, 1], 0.5 + 0.001 * pairs[:, 0]))  # larger models are better ever faster
    assert rising.alpha > 0
    falling = fit(Points(pairs[:, 0], pairs[:, 1], 0.5 - 0.001 * pairs[:, 0]))
    assert falling.alpha < 0
    assert falling.optimum(50) == math.inf
