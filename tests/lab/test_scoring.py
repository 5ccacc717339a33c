"""Scores of answers, against values worked out by hand."""

from __future__ import annotations

import itertools

import pytest

import foveate
from foveate.lab.scoring import SCORES, comparable, score_of


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Red star.", "red star"),
        ("Two  dogs!", "2 dogs"),
        ("1,200 km", "1200 km"),
        ("3.5", "3.5"),
        ("none", "0"),
        ("(a)", "a"),
        ("", ""),
        ("Größe", "größe"),
        ("don't", "don't"),
    ],
)
def test_normalised(text, expected):
    assert comparable(text) == expected


@pytest.mark.parametrize(
    ("name", "text", "answers", "expected"),
    [
        ("exact", "A red star", ["red star"], 1),
        ("exact", "red stars", ["red star"], 0),
        ("exact", "blue", ["red", "Blue."], 1),
        ("exact", "(a)", ["(b)"], 0),
        ("begins", "No, there is not.", ["no"], 1),
        ("begins", "Nothing", ["no"], 0),
        ("contains", "It is a red star indeed", ["red star"], 1),
        ("contains", "credible", ["red"], 0),
        ("anls", "hello", ["hello"], 1),
        ("anls", "helo", ["hello"], 0.8),
        ("anls", "abc", ["xyz", "abcd"], 0.75),
        ("anls", "h", ["hello"], 0),
        ("choice", "B", ["B"], 1),
        ("choice", "(b) the dog", ["B"], 1),
        ("choice", "The answer is C.", ["c"], 1),
        ("choice", "dog", ["B"], 0),
        ("vqa", "red", ["red"], 1),
        ("vqa", "red", ["red"] * 4 + ["blue"] * 6, 1),
        ("vqa", "red", ["blue"] * 10, 0),
    ],
)
def test_scores(name, text, answers, expected):
    assert score_of(name)(text, answers, {}) == pytest.approx(expected)


@pytest.mark.parametrize("agree", range(11))
def test_soft_accuracy_is_the_mean_over_all_nines(agree):
    """The rule of VQA, written out: each answer is left out once."""
    answers = ["red"] * agree + ["blue"] * (10 - agree)
    each = [min(1, nine.count("red") / 3) for nine in (list(nine) for nine in itertools.combinations(answers, 9))]
    assert score_of("vqa")("Red", answers, {}) == pytest.approx(sum(each) / 10)


def test_a_function_of_ones_own(tmp_path):
    file = tmp_path / "my.py"
    file.write_text(
        "def score(text, answers, row):\n    return float(row['weight'] if text in answers else 0)\n"
        "def wild(text, answers, row):\n    return 2\n"
        "def broken(text, answers, row):\n    raise KeyError('x')\n"
    )
    assert score_of(f"{file}:score")("a", ["a"], {"weight": 0.5}) == 0.5
    for name, match in (("wild", "expected a number from 0 to 1"), ("broken", "failed on the answer 'a'")):
        with pytest.raises(foveate.InputError, match=match):
            score_of(f"{file}:{name}")("a", ["a"], {})
    for name, match in ((f"{file}:none", "cannot be used"), ("gone.py:score", "is no Python file"), ("f1", "unknown score 'f1'")):
        with pytest.raises(foveate.InputError, match=match):
            score_of(name)
    (tmp_path / "bad.py").write_text("1 / 0")
    with pytest.raises(foveate.InputError, match="ZeroDivisionError"):
        score_of(f"{tmp_path / 'bad.py'}:score")


def test_all_are_between_nothing_and_all():
    for score in SCORES.values():
        for text, answer in itertools.product(("", "a", "(B) x", "zwölf"), ("a", "B", "12")):
            assert 0 <= score(text, [answer], {}) <= 1
