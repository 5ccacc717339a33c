"""Question families of the second pocket world: those of the first for pictures, boards and pages, and eight for clips.

============ ===================================================== =========================
family       question                                              mirrors
============ ===================================================== =========================
board        what does the red sign say ?                          TextVQA
page         what number is next to park ?                         DocVQA, OCRBench
moves        what moves ?                                          MVBench, moving objects
direction    where does the red star move ?                        MVBench, moving direction
order        does the star appear before the ring vanishes ?       MVBench, action sequence
first        what comes first , the star or the ring ?             MVBench, action sequence
appearing    how many objects appear ?                             MVBench, action count
before_after what color is the star at the end ?                   MVBench, state change
brief        what does the sign say ? (shown for a few frames)     Video-MME, reading
moment       is there a red star at the start ?                    Video-MME, one moment
============ ===================================================== =========================
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from random import Random
from typing import TypeVar

from ..questions import ASK, READING, WEIGHTS, Facts, PocketQuestion, drawn_questions, place
from ..scenes import SceneItem
from ..vocabulary import COLORS, SHAPES
from .clips import Actor, Clip
from .pictures import Picture

Question = PocketQuestion
F = TypeVar("F")
COLOR_NAMES = tuple(COLORS)
EVENTS = {"appears": ("appear", "appears"), "vanishes": ("vanish", "vanishes"), "changes": ("change color", "changes color")}


class PictureFacts(Facts):
    """What can be asked about a picture."""

    def __init__(self, picture: Picture) -> None:
        super().__init__(picture)
        self.boards = picture.of("board")
        self.rows: list[tuple[SceneItem, SceneItem]] = list(zip(picture.of("key"), picture.of("value"), strict=True))


def spelt(name: str) -> str:
    """A word as it is, a number digit by digit."""
    return " ".join(name) if name.isdigit() else name


def _board(f: PictureFacts, r: Random) -> Question | None:
    if not f.boards:
        return None
    board = r.choice(f.boards)
    return Question("board", f"what does the {board.color} sign say ?", spelt(board.name))


def _page(f: PictureFacts, r: Random) -> Question | None:
    if not f.rows:
        return None
    draw, (key, value) = r.random(), r.choice(f.rows)
    if draw < 0.5:
        return Question("page", f"what number is next to {key.name} ?", spelt(value.name))
    if draw < 0.7:
        if sum(other.name == value.name for _, other in f.rows) > 1:
            return None
        return Question("page", f"what word is next to {spelt(value.name)} ?", key.name)
    if draw < 0.9:
        which, row = r.choice((("first", f.rows[0]), ("last", f.rows[-1])))
        return Question("page", f"what is the {which} word ?", row[0].name)
    return Question("page", "how many words are there ?", str(len(f.rows)))


PICTURE_ASK: dict[str, Callable[[PictureFacts, Random], Question | None]] = {**ASK, "board": _board, "page": _page}
# what is read off a sign is learnt first and asked less often
PICTURE_WEIGHTS = {**WEIGHTS, "word": 3, "number": 3, "digit": 4, "choice": 12, "pair": 8, "board": 25}
PAGE_WEIGHTS = {"page": 20, "count": 1, "existence_random": 1}


class ClipFacts:
    """What can be asked about a clip."""

    def __init__(self, clip: Clip) -> None:
        self.clip, self.actors, self.last = clip, clip.actors, clip.patches - 1
        self.movers = [actor for actor in clip.actors if actor.role == "moves"]
        self.events = [actor for actor in clip.actors if actor.role in EVENTS]


def _called(actor: Actor, r: Random) -> str:
    """By its shape alone, or with its colour where it keeps it."""
    return actor.name if actor.role == "changes" or r.random() < 0.5 else f"{actor.color} {actor.name}"


def _moves(f: ClipFacts, r: Random) -> Question | None:
    if len(f.movers) > 1:
        return None
    return Question("moves", "what moves ?", f"{f.movers[0].color} {f.movers[0].name}" if f.movers else "nothing")


def _direction(f: ClipFacts, r: Random) -> Question | None:
    if not f.movers:
        return None
    actor = r.choice(f.movers)
    return Question("direction", f"where does the {_called(actor, r)} move ?", str(actor.direction))


def _order(f: ClipFacts, r: Random) -> Question | None:
    if len(f.events) < 2:
        return None
    a, b = r.sample(f.events, 2)
    text = f"does the {a.name} {EVENTS[a.role][0]} before the {b.name} {EVENTS[b.role][1]} ?"
    return Question("order", text, "yes" if a.when < b.when else "no")


def _first(f: ClipFacts, r: Random) -> Question | None:
    coming = [actor for actor in f.events if actor.role == "appears"]
    if len(coming) < 2:
        return None
    a, b = r.sample(coming, 2)
    return Question("first", f"what comes first , the {a.name} or the {b.name} ?", a.name if a.when < b.when else b.name)


def _appearing(f: ClipFacts, r: Random) -> Question | None:
    return Question("appearing", "how many objects appear ?", str(sum(actor.role == "appears" for actor in f.actors)))


def _before_after(f: ClipFacts, r: Random) -> Question | None:
    pool = [actor for actor in f.events if actor.role == "changes"]
    if not pool or r.random() < 0.15:
        pool = [actor for actor in f.actors if actor.role in ("stays", "moves")]
    if not pool:
        return None
    actor, (when, patch) = r.choice(pool), r.choice((("start", 0), ("end", f.last)))
    return Question("before_after", f"what color is the {actor.name} at the {when} ?", actor.color_at(patch))


def _brief(f: ClipFacts, r: Random) -> Question | None:
    return None if f.clip.sign is None else Question("brief", "what does the sign say ?", f.clip.sign.word)


def _moment(f: ClipFacts, r: Random) -> Question | None:
    when, patch = r.choice((("start", 0), ("end", f.last)))
    there = [actor for actor in f.actors if actor.seen(patch)]
    draw = r.random()
    if draw < 0.3:
        return Question("moment", f"how many objects are there at the {when} ?", str(len(there)))
    if draw < 0.65 and there:
        actor = r.choice(there)
        answer = place(tuple(actor.centers[0 if patch == 0 else -1]), f.clip.size)
        return Question("moment", f"where is the {actor.name} at the {when} ?", answer) if answer else None
    if r.random() < 0.7:  # also of what comes later, or is gone
        actor = r.choice(f.actors)
        return Question("moment", f"is there a {actor.name} at the {when} ?", "yes" if actor.seen(patch) else "no")
    color, shape = r.choice(COLOR_NAMES), r.choice(SHAPES)
    present = any(actor.name == shape and actor.color_at(patch) == color for actor in there)
    return Question("moment", f"is there a {color} {shape} at the {when} ?", "yes" if present else "no")


CLIP_ASK: dict[str, Callable[[ClipFacts, Random], Question | None]] = {
    "moves": _moves,
    "direction": _direction,
    "order": _order,
    "first": _first,
    "appearing": _appearing,
    "before_after": _before_after,
    "brief": _brief,
    "moment": _moment,
}
CLIP_WEIGHTS = dict(zip(CLIP_ASK, (5, 7, 20, 14, 6, 8, 5, 14), strict=True))
FAMILIES = (*PICTURE_ASK, *CLIP_ASK)
READ = (*READING, "board", "page", "brief")
ONCE = ("word", "number", "digit", "moves", "appearing", "brief")  # there is just one such question


def ask(shown: Picture | Clip, random: Random, number: int) -> list[Question]:
    """Up to ``number`` different questions about a picture or a clip."""
    if isinstance(shown, Clip):
        return drawn_questions(ClipFacts(shown), CLIP_ASK, CLIP_WEIGHTS, random, number)
    facts = PictureFacts(shown)
    return drawn_questions(facts, PICTURE_ASK, PAGE_WEIGHTS if facts.rows else PICTURE_WEIGHTS, random, number)


def exam(shown: Picture | Clip, random: Random) -> list[Question]:
    """The questions of one test picture or clip: every family it allows, twice where two different ones exist; four of a page."""
    if isinstance(shown, Clip):
        return _every(ClipFacts(shown), CLIP_ASK, random)
    facts = PictureFacts(shown)
    return _every(facts, {"page": _page}, random, 4) if facts.rows else _every(facts, PICTURE_ASK, random)


def _every(facts: F, asks: Mapping[str, Callable[[F, Random], Question | None]], random: Random, times: int = 2) -> list[Question]:
    found: dict[str, Question] = {}
    for family, one in asks.items():
        kept = 0
        for _ in range(6 * times):
            question = one(facts, random)
            if question is not None and question.text not in found:
                found[question.text] = question
                kept += 1
            if kept == (1 if family in ONCE else times):
                break
    return list(found.values())
