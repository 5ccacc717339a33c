"""Judge-free scores of open questions about videos."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def normalised(text: str) -> str:
    """A text as VQA compares answers: lower case, without punctuation and articles, numbers as digits."""
    from lmms_eval.tasks._task_utils.vqa_eval_metric import EvalAIAnswerProcessor

    found: str = EvalAIAnswerProcessor()(text)
    return " ".join(found.split())


def question_text(document: Mapping[str, Any], options: Mapping[str, str]) -> str:
    """The prompt of a question."""
    question = document["question"].strip().rstrip("?").strip()
    return f"{question[:1].upper()}{question[1:]}?{options['post_prompt']}"


def video(document: Mapping[str, Any]) -> list[str]:
    """The file that a question is about."""
    return [document["video"]]


def score(document: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Two scores of one answer, 0 or 1.

    ``exact_match``: it is the expected answer. ``contains``: the words of the expected answer stand in it, in a row. Both after
    ``normalised``; neither knows synonyms or other forms of a word, as judges do.
    """
    said, expected = normalised(results[0]), normalised(document["answer"])
    return {"exact_match": float(said == expected), "contains": float(f" {expected} " in f" {said} ")}
