"""How right an answer is: scores from 0 to 1 without a judge, for examples of one's own."""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..errors import InputError, first_line
from ..places import user_path

Score = Callable[[str, Sequence[str], Mapping[str, Any]], float]
NUMBERS = {word: str(n) for n, word in enumerate("zero one two three four five six seven eight nine ten".split())} | {"none": "0"}
ARTICLES = frozenset(("a", "an", "the"))
AGREE = 3  # people that have to give an answer for it to count in full, as VQA has it
NEAR = 0.5  # similarity below which ANLS gives nothing
LETTER = re.compile(r"\(?\b([A-Z])\b[).:]?")


def comparable(text: str) -> str:
    """A text as answers are compared: lower case, without punctuation and articles, small numbers as digits."""
    plain = re.sub(r"(?<=\d),(?=\d{3})", "", text.lower())
    words = re.findall(r"\d+\.\d+|[\w'-]+", plain)
    return " ".join(NUMBERS.get(word, word) for word in words if word not in ARTICLES) or " ".join(words)


def begins(text: str, answer: str) -> bool:
    """Whether a text is the answer or begins with its words, whatever the case."""
    words, wanted = (re.findall(r"\w+", each.lower()) for each in (text, answer))
    return words[: len(wanted)] == wanted


def _exact(text: str, answers: Sequence[str], _: Mapping[str, Any]) -> float:
    return float(any(comparable(text) == comparable(answer) for answer in answers))


def _begins(text: str, answers: Sequence[str], _: Mapping[str, Any]) -> float:
    return float(any(begins(text, answer) for answer in answers))


def _contains(text: str, answers: Sequence[str], _: Mapping[str, Any]) -> float:
    found = f" {comparable(text)} "
    return float(any(f" {comparable(answer)} " in found for answer in answers))


def _vqa(text: str, answers: Sequence[str], _: Mapping[str, Any]) -> float:
    """The mean over all answers but one of min(1, people who agree / 3)."""
    found, said = comparable(text), [comparable(answer) for answer in answers]
    if len(said) == 1:
        return float(found == said[0])
    same = sum(answer == found for answer in said)
    return sum(min(1.0, (same - (answer == found)) / AGREE) for answer in said) / len(said)


def _anls(text: str, answers: Sequence[str], _: Mapping[str, Any]) -> float:
    """One minus the edit distance over the longer length, where that is at least a half; the best of all answers."""
    found = " ".join(text.lower().split())
    best = max(_similarity(found, " ".join(answer.lower().split())) for answer in answers)
    return best if best >= NEAR else 0.0


def _similarity(a: str, b: str) -> float:
    row = [*range(len(b) + 1)]
    for i, letter in enumerate(a, 1):
        above, row[0] = row[0], i
        for j, other in enumerate(b, 1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (letter != other))
    return 1 - row[-1] / max(len(a), len(b), 1)


def _choice(text: str, answers: Sequence[str], _: Mapping[str, Any]) -> float:
    """The first letter that stands alone, such as B, (B) or B."""
    found, wanted = LETTER.search(text.strip().upper()), LETTER.search(answers[0].strip().upper())
    return float(found is not None and wanted is not None and found[1] == wanted[1])


SCORES: dict[str, Score] = {
    "exact": _exact,
    "begins": _begins,
    "contains": _contains,
    "vqa": _vqa,
    "anls": _anls,
    "choice": _choice,
}


def score_of(name: str) -> Score:
    """A score by name, or a function of a Python file, as in ``my.py:score``: ``score(text, answers, row)`` in [0, 1].

    Raises
    ------
    InputError : there is no such score, or the file cannot be run. Later, where it returns no number from 0 to 1.
    """
    if name in SCORES:
        return SCORES[name]
    file, _, attribute = name.rpartition(":")
    if not file.endswith(".py"):
        raise InputError(f"unknown score {name!r}; available: {', '.join(SCORES)}, or a function of yours as in my.py:score")
    path = user_path(file)
    spec = importlib.util.spec_from_file_location("foveate_score", path) if path.is_file() else None
    if spec is None or spec.loader is None:
        raise InputError(f"{file} is no Python file. Give a file and a function in it, as in my.py:score.")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        function = getattr(module, attribute)
    except Exception as error:  # whatever somebody's code leads to
        raise InputError(f"{name} cannot be used ({type(error).__name__}: {first_line(error)})") from error
    return lambda text, answers, row: _checked(function, name, text, answers, row)


def _checked(function: Callable[..., Any], name: str, text: str, answers: Sequence[str], row: Mapping[str, Any]) -> float:
    try:
        found = float(function(text, list(answers), dict(row)))
    except Exception as error:  # whatever somebody's code leads to
        raise InputError(f"{name} failed on the answer {text!r} ({type(error).__name__}: {first_line(error)})") from error
    if not (math.isfinite(found) and 0 <= found <= 1):
        raise InputError(f"{name} returned {found} for the answer {text!r}; expected a number from 0 to 1")
    return found
