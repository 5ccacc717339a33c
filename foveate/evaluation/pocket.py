"""The pocket test set as tasks of lmms-eval: the same scenes and questions as ``foveate compare`` draws."""

from __future__ import annotations

import functools
from random import Random
from typing import Any

import numpy as np
from PIL import Image

from ..lab.claims import GROUPS
from ..lab.testset import SEED, TestSet
from ..pocket.scenes import SIDE, Scene

FRAMES = 4  # more would be longer than the prompts that the model was made for
STEP = 3  # pixels that the camera moves from frame to frame, where a scene has the room
CLIP = "pocket_clip"
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
    task : one of ``TASKS``, or ``CLIP``.
    scenes, seed : of the test set.

    Returns
    -------
    Per question its scene, family, text, answer, and an id that the two questions of a pair share.
    """
    families, pairs = GROUPS[TASKS.get(task, "objects")], task == "pocket_mme"
    if task == CLIP:
        families = tuple(family for family in families if family != "where")  # which changes while the camera moves
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
    """The scene as a clip of ``FRAMES`` frames over which the camera pans; the first frame is the scene itself."""
    scene = _drawn(document["scenes"], document["seed"]).scenes[document["scene"]]
    right, down = pan(scene, Random(f"pan/{document['seed']}/{document['scene']}"))
    margin = STEP * (FRAMES - 1)
    wide = np.pad(scene.image, ((margin, margin), (margin, margin), (0, 0)), mode="edge")
    corners = [(margin + down * frame, margin + right * frame) for frame in range(FRAMES)]
    return [Image.fromarray(wide[top : top + SIDE, left : left + SIDE]) for top, left in corners]


def pan(scene: Scene, random: Random) -> tuple[int, int]:
    """Pixels to the right and down that the camera moves from frame to frame.

    One of eight directions, at ``STEP`` pixels along each of its axes; where things would leave the picture by that, in the
    direction and at the pace that come closest, so that the last frame too shows all of them.
    """
    boxes = np.array([item.box for item in scene.items])  # [I, 4] x, y, width, height
    before, after = boxes[:, :2].min(0), SIDE - (boxes[:, :2] + boxes[:, 2:]).max(0)  # [2] room left and above, right and below

    def pace(direction: tuple[int, int]) -> int:
        rooms = [int((before if sign > 0 else after)[axis]) for axis, sign in enumerate(direction) if sign]
        return min(STEP, min(rooms) // (FRAMES - 1))

    directions = [(x, y) for x in (-1, 0, 1) for y in (-1, 0, 1) if (x, y) != (0, 0)]
    random.shuffle(directions)
    chosen = max(directions, key=pace)
    return pace(chosen) * chosen[0], pace(chosen) * chosen[1]
