"""Scenes to show a pocket model at work."""

from __future__ import annotations

from random import Random

from PIL import Image

from ..loading import Loaded
from ..pocket.native import questions as native
from ..pocket.native.clips import Clip, draw_clip
from ..pocket.native.pictures import Picture, draw_picture
from ..pocket.questions import PocketQuestion, example
from ..pocket.scenes import LEVELS
from ..pocket.worlds import world_of
from ..video import Video
from .exam import as_shown

Example = tuple[str, Image.Image | Video, PocketQuestion]


def examples(loaded: Loaded, seed: int) -> list[Example]:
    """Three scenes of the test split, with a name and a question each.

    From plain to crowded; of the second pocket world a picture, a page and a clip.
    """
    if world_of(loaded.processor) == "native":
        return [_native(name, seed) for name in ("picture", "page", "clip")]
    found = [(name, *example(level, seed)) for level, name in enumerate(LEVELS)]
    return [(name, as_shown(scene), question) for name, scene, question in found]


def _native(name: str, seed: int) -> Example:
    random = Random(f"demo/native/{seed}/{name}")
    wanted = {"picture": "color", "page": "page", "clip": "direction"}[name]
    while True:
        if name == "clip":
            scene: Clip | Picture = draw_clip(random, (6, 144, 112), split="test")
        else:
            size, style = ((320, 240), "things") if name == "picture" else ((224, 288), "page")
            scene = draw_picture(random, size, split="test", style=style)
        for question in native.exam(scene, random):
            if question.family == wanted:
                return name, as_shown(scene), question
