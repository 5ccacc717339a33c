"""Question families of the pocket world; each mirrors a benchmark of the field.

====================== ============================================= ======================
family                 question                                      mirrors
====================== ============================================= ======================
existence_random       is there a red star in the image ?            POPE, random negatives
existence_adversarial  the same, negatives share shape or colour     POPE, adversarial
color, shape           what color is the star ?                      VQAv2
count                  how many red objects are there ?              VQAv2
where, relation        where is the red star ? (3 x 3 places)        VQAv2, GQA
word, number, digit    what does the sign say ?                      TextVQA
choice                 four options, answer with the letter          MMBench
pair                   one true and one false statement of a scene   MME
====================== ============================================= ======================
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random
from typing import Protocol, TypeVar

from .scenes import Scene, SceneItem, draw_scene
from .vocabulary import COLORS, COLUMNS, LETTERS, ROWS, SHAPES, WORDS

QUESTION_KINDS = (
    "existence_random",
    "existence_adversarial",
    "color",
    "shape",
    "count",
    "where",
    "relation",
    "word",
    "number",
    "digit",
    "choice",
    "pair",
)
READING = ("word", "number", "digit")
MARGIN = 4  # pixels: nobody is asked on which side of a border something 1 pixel away from it lies
RELATION_GAP = 24  # pixels between centres
COLOR_NAMES = tuple(COLORS)


@dataclass(frozen=True)
class PocketQuestion:
    family: str
    text: str
    answer: str


F = TypeVar("F")


class Drawn(Protocol):
    """A picture of the pocket world."""

    @property
    def size(self) -> tuple[int, int]: ...

    def of(self, kind: str) -> list[SceneItem]: ...


class Facts:
    """What can be asked about a scene without ambiguity."""

    def __init__(self, scene: Drawn) -> None:
        self.size = scene.size
        self.shapes = scene.of("shape")
        names, colors = Counter(i.name for i in self.shapes), Counter(i.color for i in self.shapes)
        self.pairs = Counter((i.color, i.name) for i in self.shapes)
        self.one_of_shape = [i for i in self.shapes if names[i.name] == 1]
        self.one_of_color = [i for i in self.shapes if colors[i.color] == 1]
        self.unique = [i for i in self.shapes if self.pairs[i.color, i.name] == 1]
        self.signs = {kind: next(iter(scene.of(kind)), None) for kind in READING}


def place(center: tuple[float, float], size: tuple[int, int]) -> str | None:
    """Give one of nine places, "top left" to "bottom right", or None within ``MARGIN`` pixels of a border between two thirds.

    Parameters
    ----------
    center : x and y in pixels.
    size : width and height of the picture.
    """
    if any(abs(c - border * side / 3) < MARGIN for c, side in zip(center, size, strict=True) for border in (1, 2)):
        return None
    column, row = (int(3 * c / side) for c, side in zip(center, size, strict=True))
    return f"{ROWS[row]} {COLUMNS[column]}"


def _similar_word(word: str, random: Random) -> str:
    """A word that shares as many letters as possible with ``word``."""
    others = [w for w in WORDS if w != word]
    shared = [sum(a == b for a, b in zip(w, word, strict=False)) - abs(len(w) - len(word)) for w in others]
    best = max(shared)
    return random.choice([w for w, s in zip(others, shared, strict=True) if s >= best - 1])


def _existence_random(f: Facts, r: Random) -> PocketQuestion | None:
    if r.random() < 0.5:
        if not f.shapes:
            return None
        item = r.choice(f.shapes)
        color, shape, answer = item.color, item.name, "yes"
    else:
        color, shape, answer = r.choice(COLOR_NAMES), r.choice(SHAPES), "no"
    if r.random() < 0.3:
        present = any(i.name == shape for i in f.shapes)
        return PocketQuestion("existence_random", f"is there a {shape} in the image ?", "yes" if present else "no")
    if answer == "no" and f.pairs[color, shape]:
        return None
    return PocketQuestion("existence_random", f"is there a {color} {shape} in the image ?", answer)


def _existence_adversarial(f: Facts, r: Random) -> PocketQuestion | None:
    sign, positive = f.signs["word"], r.random() < 0.5
    if sign and r.random() < 0.2:
        word = sign.name if positive else _similar_word(sign.name, r)
        return PocketQuestion("existence_adversarial", f"is there a sign that says {word} ?", "yes" if positive else "no")
    if not f.shapes:
        return None
    item = r.choice(f.shapes)
    if positive:
        return PocketQuestion("existence_adversarial", f"is there a {item.color} {item.name} in the image ?", "yes")
    color, shape = item.color, item.name
    if r.random() < 0.5:  # the colour of another object half of the time, where there is one
        color = r.choice(f.shapes).color if r.random() < 0.5 else r.choice(COLOR_NAMES)
    else:
        shape = r.choice(f.shapes).name if r.random() < 0.5 else r.choice(SHAPES)
    if f.pairs[color, shape]:
        return None
    return PocketQuestion("existence_adversarial", f"is there a {color} {shape} in the image ?", "no")


def _color(f: Facts, r: Random) -> PocketQuestion | None:
    if not f.one_of_shape:
        return None
    item = r.choice(f.one_of_shape)
    return PocketQuestion("color", f"what color is the {item.name} ?", str(item.color))


def _shape(f: Facts, r: Random) -> PocketQuestion | None:
    if not f.one_of_color:
        return None
    item = r.choice(f.one_of_color)
    return PocketQuestion("shape", f"what shape is the {item.color} object ?", item.name)


def _count(f: Facts, r: Random) -> PocketQuestion | None:
    draw = r.random()
    present = r.choice(f.shapes) if f.shapes and r.random() < 0.85 else None
    if draw < 0.4:
        name = present.name if present else r.choice(SHAPES)
        return PocketQuestion("count", f"how many {name} objects are there ?", str(sum(i.name == name for i in f.shapes)))
    if draw < 0.8:
        color = present.color if present else r.choice(COLOR_NAMES)
        return PocketQuestion("count", f"how many {color} objects are there ?", str(sum(i.color == color for i in f.shapes)))
    return PocketQuestion("count", "how many objects are there ?", str(len(f.shapes)))


def _where(f: Facts, r: Random) -> PocketQuestion | None:
    if not f.unique:
        return None
    item = r.choice(f.unique)
    answer = place(item.center, f.size)
    return PocketQuestion("where", f"where is the {item.color} {item.name} ?", answer) if answer else None


def _relation(f: Facts, r: Random) -> PocketQuestion | None:
    if len(f.unique) < 2:
        return None
    a, b = r.sample(f.unique, 2)
    dx, dy = a.center[0] - b.center[0], a.center[1] - b.center[1]
    if max(abs(dx), abs(dy)) < RELATION_GAP:
        return None
    first, phrase = r.choice(
        ((dx < 0, "to the left of"), (dx > 0, "to the right of")) if abs(dx) > abs(dy) else ((dy < 0, "above"), (dy > 0, "below"))
    )
    text = f"is the {a.color} {a.name} {phrase} the {b.color} {b.name} ?"
    return PocketQuestion("relation", text, "yes" if first else "no")


READ = {
    "word": "what does the sign say ?",
    "number": "what number is written ?",
    "digit": "what digit is handwritten ?",
}


def _reading(kind: str) -> Callable[[Facts, Random], PocketQuestion | None]:
    def ask(f: Facts, r: Random) -> PocketQuestion | None:
        sign = f.signs[kind]
        if sign is None:
            return None
        return PocketQuestion(kind, READ[kind], " ".join(sign.name) if kind == "number" else sign.name)

    return ask


def _choice(f: Facts, r: Random) -> PocketQuestion | None:
    draw, sign = r.random(), f.signs["word"]
    pool: tuple[str, ...] | list[str]
    if draw < 0.45 and f.one_of_shape:
        item = r.choice(f.one_of_shape)
        text, truth, pool = f"what color is the {item.name} ?", str(item.color), COLOR_NAMES
    elif draw < 0.75 and f.one_of_color:
        item = r.choice(f.one_of_color)
        text, truth, pool = f"what shape is the {item.color} object ?", item.name, SHAPES
    elif sign:
        text, truth, pool = READ["word"], sign.name, WORDS
    else:
        return None
    options = [*r.sample([x for x in pool if x != truth], 3)]
    right = r.randrange(4)
    options.insert(right, truth)
    listed = " ".join(f"{letter} {option}" for letter, option in zip(LETTERS, options, strict=True))
    return PocketQuestion("choice", f"{text} {listed}", LETTERS[right])


def _pair(f: Facts, r: Random) -> PocketQuestion | None:
    if not f.one_of_shape:
        return None
    item, truth = r.choice(f.one_of_shape), r.random() < 0.5
    color = item.color if truth else r.choice([c for c in COLOR_NAMES if c != item.color])
    return PocketQuestion("pair", f"is the {item.name} {color} ?", "yes" if truth else "no")


ASK: dict[str, Callable[[Facts, Random], PocketQuestion | None]] = {
    "existence_random": _existence_random,
    "existence_adversarial": _existence_adversarial,
    "color": _color,
    "shape": _shape,
    "count": _count,
    "where": _where,
    "relation": _relation,
    "word": _reading("word"),
    "number": _reading("number"),
    "digit": _reading("digit"),
    "choice": _choice,
    "pair": _pair,
}
WEIGHTS = dict(zip(QUESTION_KINDS, (7, 9, 8, 7, 11, 13, 13, 8, 8, 7, 9, 4), strict=True))


def ask(scene: Scene, random: Random, number: int) -> list[PocketQuestion]:
    """Up to ``number`` different questions about a scene, families drawn by ``WEIGHTS``; fewer where the scene has less to ask."""
    return drawn_questions(Facts(scene), ASK, WEIGHTS, random, number)


def drawn_questions(
    facts: F,
    asks: Mapping[str, Callable[[F, Random], PocketQuestion | None]],
    weights: Mapping[str, float],
    random: Random,
    number: int,
) -> list[PocketQuestion]:
    """Up to ``number`` different questions of families that are drawn by ``weights``."""
    found: dict[str, PocketQuestion] = {}
    families, shares = list(weights), list(weights.values())
    for _ in range(number * 4):
        if len(found) == number:
            break
        question = asks[random.choices(families, shares)[0]](facts, random)
        if question is not None:
            found.setdefault(question.text, question)
    return list(found.values())


def exam(scene: Scene, random: Random) -> list[PocketQuestion]:
    """The questions of one test scene: every family that the scene allows, twice where two different ones exist (reading: once).

    The two of ``pair`` are about the same object, one true and one false, as MME scores them.
    """
    facts = Facts(scene)
    found: dict[str, PocketQuestion] = {}
    for family in QUESTION_KINDS:
        if family == "pair":
            continue
        kept = 0
        for _ in range(12):
            question = ASK[family](facts, random)
            if question is not None and question.text not in found:
                found[question.text] = question
                kept += 1
            if kept == (1 if family in READING else 2):
                break
    if facts.one_of_shape:
        item = random.choice(facts.one_of_shape)
        wrong = random.choice([c for c in COLOR_NAMES if c != item.color])
        for color, answer in ((item.color, "yes"), (wrong, "no")):
            found[f"is the {item.name} {color} ?"] = PocketQuestion("pair", f"is the {item.name} {color} ?", answer)
    return list(found.values())


def example(level: int, seed: int) -> tuple[Scene, PocketQuestion]:
    """A scene of the test split of a level, and one question about it."""
    random = Random(f"demo/{seed}/{level}")
    wanted = ("color", "where", "word")[level % 3]
    while True:
        scene = draw_scene(random, split="test", level=level)
        matching = [question for question in exam(scene, random) if question.family == wanted]
        if matching:
            return scene, matching[0]
