"""The pocket test set as tasks of lmms-eval: the same scenes and questions as ``foveate compare`` draws."""

from __future__ import annotations

import functools
from random import Random
from typing import Any

from PIL import Image

from ..pocket.claims import GROUPS
from ..pocket.evaluate import SEED, TestSet

FRAMES = 4  # more would be longer than the prompts that the model was made for
TASKS = {  # task: the families of questions that mirror a benchmark
    "pocket_vqav2": "objects",
    "pocket_textvqa": "reading",
    "pocket_pope": "existence",
    "pocket_mme": "pair",
    "pocket_mmbench": "choice",
}


@functools.lru_cache(maxsize=1)
def _drawn(scenes: int, seed: int) -> TestSet:
    return TestSet.draw(scenes, seed)


def questions(task: str, scenes: int, seed: int = SEED) -> list[dict[str, Any]]:
    """All questions of a task in an order that is random but for pairs, which stay together: the first ones are of many scenes.

    Parameters
    ----------
    task : one of ``TASKS``.
    scenes, seed : of the test set.

    Returns
    -------
    Per question its scene, family, text, answer, and an id that the two questions of a pair share.
    """
    families, pairs = GROUPS[TASKS[task]], task == "pocket_mme"
    groups: list[list[dict[str, Any]]] = []
    for scene, asked in enumerate(_drawn(scenes, seed).questions):
        mine = [question for question in asked if question.family in families]
        for number in range(0, len(mine), 2 if pairs else 1):
            together = mine[number : number + (2 if pairs else 1)]
            identity = {"scenes": scenes, "seed": seed, "scene": scene, "question_id": f"{scene}-{number}", "category": "color"}
            groups.append([{**identity, "family": q.family, "question": q.text, "answer": q.answer} for q in together])
    Random(seed).shuffle(groups)
    return [question for group in groups for question in group]


def documents(drawn: Any) -> Any:
    """Replace a data set of one row, which says what to draw, by the questions."""
    from datasets import Dataset

    return Dataset.from_list(questions(**drawn[0]))


def picture(document: dict[str, Any]) -> list[Image.Image]:
    """The scene that a question is about."""
    return [Image.fromarray(_drawn(document["scenes"], document["seed"]).scenes[document["scene"]].image)]


def clip(document: dict[str, Any]) -> list[Image.Image]:
    """The scene as a clip of ``FRAMES`` frames in which nothing moves."""
    return picture(document) * FRAMES
