"""What the words of a question mean in its picture or clip: targets of an auxiliary loss of the decoder.

An answer alone teaches slowly where it needs two things compared: whether "left of" is true says nothing before both are found. So
each word that names a thing is asked what and where that is, and how it stands to the thing that was named before it.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..batches import BINS
from ..questions import PocketQuestion
from ..rows import IGNORE, Targets
from ..scenes import SceneItem
from ..vocabulary import COLORS, LETTERS, SHAPES, WORDS
from .clips import Actor, Clip
from .pictures import Picture
from .vocabulary import DIRECTIONS

# with how many classes; "after", "below" and "later": than the thing that was named before
GROUNDING = {
    "column": BINS,
    "row": BINS,
    "present": 2,
    "begin": BINS,
    "end": BINS,
    "motion": 1 + len(DIRECTIONS),
    "color": len(COLORS),
    "shape": len(SHAPES),
    "word": len(WORDS),
    "tens": 10,
    "ones": 11,
    "count": BINS,
    "when": BINS,
    "after": 2,
    "below": 2,
    "later": 2,
}
CLEAR = 6  # pixels by which one thing is beside or below another
COLOR_NAMES = tuple(COLORS)
THINGS = ("object", "objects")
Shown = Picture | Clip
Facts = dict[str, int]


def bins(center: Sequence[float], size: tuple[int, int]) -> tuple[int, int]:
    """Column and row of a point, of ``BINS`` each."""
    column, row = (min(BINS - 1, max(0, int(c * BINS / side))) for c, side in zip(center, size, strict=True))
    return column, row


def written(text: str) -> Facts:
    """What a sign says: a word, or the tens and ones of a number (ones are 10 where it has one digit)."""
    if text.isdigit():
        return {"tens": int(text[0]), "ones": int(text[1]) if len(text) > 1 else 10}
    return {"word": WORDS.index(text)}


def _looks(item: SceneItem) -> Facts:
    found = {} if item.color is None else {"color": COLOR_NAMES.index(item.color)}
    if item.kind == "shape":
        return found | {"shape": SHAPES.index(item.name)}
    return found if item.kind == "digit" else found | written(item.name)


def _meant(picture: Picture, word: str, before: str) -> list[SceneItem] | None:
    """The things that a word names, None where it names none."""
    if word == "sign" and before in COLORS:
        return [board for board in picture.of("board") if board.color == before]
    if word in WORDS:
        return [item for item in picture.items if item.name == word]
    if word == "objects" and before == "many":
        return picture.of("shape")
    if word in COLORS and before in SHAPES:  # is the star red ?
        word, before = before, word
    if word in SHAPES or (word in THINGS and before in COLORS):
        colors = (before,) if before in COLORS else COLOR_NAMES
        return [item for item in picture.of("shape") if word in (item.name, *THINGS) and item.color in colors]
    return None


def _in_picture(picture: Picture, word: str, before: str) -> tuple[Facts, SceneItem | None]:
    """Targets of a word, and the thing that it names if there is just one."""
    meant = _meant(picture, word, before)
    if meant is None:
        return {}, None
    facts = {"present": int(bool(meant)), "count": min(BINS - 1, len(meant))}
    if len(meant) != 1:
        return facts, None
    item = meant[0]
    facts |= dict(zip(("column", "row"), bins(item.center, picture.size), strict=True)) | _looks(item)
    if item.kind == "key":  # what stands next to it
        facts |= written(picture.of("value")[picture.of("key").index(item)].name)
    return facts, item


def _beside(item: SceneItem, other: SceneItem) -> Facts:
    steps = {name: a - b for name, a, b in zip(("after", "below"), item.center, other.center, strict=True)}
    return {name: int(step > 0) for name, step in steps.items() if abs(step) > CLEAR}


def _in_clip(clip: Clip, word: str) -> tuple[Facts, Actor | None]:
    if word not in SHAPES:
        return {}, None
    actor = next((actor for actor in clip.actors if actor.name == word), None)
    if actor is None:
        return {"present": 0}, None
    facts = {"present": 1, "shape": SHAPES.index(word), "motion": 1 + DIRECTIONS.index(actor.direction) if actor.direction else 0}
    if not actor.direction:
        facts |= dict(zip(("column", "row"), bins(actor.centers[0], clip.size), strict=True))
    if actor.role != "changes":
        facts["color"] = COLOR_NAMES.index(actor.color)
    if actor.when:
        facts["when"] = actor.when * BINS // clip.patches
    begin = actor.when if actor.role == "appears" else 0
    end = actor.when if actor.role in ("vanishes", "changes") else clip.patches
    return facts | {"begin": begin * BINS // clip.patches, "end": min(BINS - 1, end * BINS // clip.patches)}, actor


def grounding(question: PocketQuestion, shown: Shown) -> Targets:
    """Classes of ``GROUNDING`` for each word of a question, IGNORE where it is not asked."""
    words, found = question.text.split(), []
    last: SceneItem | Actor | None = None
    for word, before in zip(words, ["", *words[:-1]], strict=True):
        facts: Facts
        thing: SceneItem | Actor | None
        if before in LETTERS:  # an option
            facts, thing = {"present": int(before == question.answer)}, None
        elif isinstance(shown, Clip):
            facts, thing = _in_clip(shown, word)
            if isinstance(thing, Actor) and isinstance(last, Actor) and thing.when and last.when and thing.when != last.when:
                facts["later"] = int(thing.when > last.when)
        else:
            facts, thing = _in_picture(shown, word, before)
            if isinstance(thing, SceneItem) and isinstance(last, SceneItem) and thing is not last:
                facts |= _beside(thing, last)
        last = thing or last
        found.append(tuple(facts.get(name, IGNORE) for name in GROUNDING))
    return found
