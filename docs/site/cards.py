"""The pages of the papers: a card for each method, from its class and the committed measurements."""

from __future__ import annotations

import csv
import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

from foveate.methods.baselines import BASELINES
from foveate.methods.registry import MethodInfo, methods, presets, registered, shipped

RESULTS = Path(__file__).parent.parent / "results" / "comparison.csv"
SECOND = RESULTS.with_name("pocket-qwen.md")
PAGES = {
    "projector": (
        "Methods before the decoder",
        "They act before or after the projector. The vision encoder runs in full (less of it with `pixelprune`).",
    ),
    "encoder": ("Methods inside the vision encoder", "They make the encoder cheaper, too. [How this works](../encoder.md)."),
    "decoder": (
        "Methods inside the decoder",
        "They know the question. The first layers run in full. [How this works](../inside.md).",
    ),
    "trained": ("Methods with weights of their own", "`foveate train` makes the weights. [How to train](../training.md)."),
    "baselines": ("Baselines", "Every method has to beat these at the same cost. Independent benchmarks found that many do not."),
}
SIMPLE = (*BASELINES, "random-cut", "fewer-frames")
SECTION = re.compile(r"^(\w+)\n-+\n", re.MULTILINE)
ENTRY = re.compile(r"^([\w, ]+?) : (.*)$")
CODE = re.compile(r"\b(released|official|code|scripts)\b", re.IGNORECASE)
SENTENCE = re.compile(r"(?<=\.)\s+(?=[A-Z])")


def place_of(info: MethodInfo) -> str:
    """The page on which a method has its card."""
    cls = registered()[info.name]
    if info.name in SIMPLE:
        return "baselines"
    if hasattr(cls, "from_pretrained"):
        return "trained"
    inside = {"inside the vision encoder": "encoder", "before the projector": "projector", "before the vision encoder": "projector"}
    return inside.get(info.stage, "decoder")


def cards_page(place: str) -> str:
    """A page of cards as Markdown."""
    title, about = PAGES[place]
    found = [info for info in methods() if place_of(info) == place]
    rows = [f"| [`{info.name}`](#{anchor(info.name)}) | {info.summary} |" for info in found]
    table = "\n".join(["| method | what it keeps |", "|---|---|", *rows])
    return f"# {title}\n\n{about}\n\n{table}\n\n" + "\n".join(card(info) for info in found)


def anchor(name: str) -> str:
    """The address of a card on its page."""
    return name.replace("+", "-plus")


def card(info: MethodInfo) -> str:
    """One method as Markdown."""
    cls = registered()[info.name]
    text, settings = parts(cls)
    facts = [
        ("acts", info.stage),
        ("needs", needs(cls, info)),
        ("how many stay", "its own rule, or `budget`" if info.adaptive else "`budget`"),
        ("paper", paper(info.paper)),
        ("presets", ", ".join(f"`{info.name}:{name}`" for name in info.presets)),
        ("weights in the package", ", ".join(f"`{info.name}:{name}`" for name in shipped(cls))),
        ("not told by paper or code", cls.reconstruction),
    ]
    lines = [f"## `{info.name}` {{ #{anchor(info.name)} }}", "", text, "", "| | |", "|---|---|"]
    lines += [f"| **{name}** | {value} |" for name, value in facts if value]
    lines += ["", "```python", f"with {call(cls, info)}(model):", "    out = model.generate(**inputs)", "```", ""]
    if settings:
        rows = [f"| `{name}` | {default(cls, name)} | {told} |" for name, told in settings]
        lines += ['??? note "Settings"', "", "    | field | default | |", "    |---|---|---|", *(f"    {row}" for row in rows), ""]
    differs = differences(cls, text)
    if any(CODE.search(told) for _, told in settings):
        differs.append("In the settings, *the code* marks what the released code does.")
    if differs:
        lines += ["**Paper, released code, and here**", "", *(f"- {line}" for line in differs), ""]
    return "\n".join([*lines, measured(info), ""])


def parts(cls: type) -> tuple[str, list[tuple[str, str]]]:
    """The text of a docstring, and its parameters with what is said of each."""
    head, *sections = SECTION.split(inspect.cleandoc(cls.__doc__ or ""))
    found: list[tuple[str, str]] = []
    for title, body in zip(sections[::2], sections[1::2], strict=True):
        for line in body.splitlines() if title == "Parameters" else ():
            entry = ENTRY.match(line)
            if entry:
                found += [(name.strip(), entry[2]) for name in entry[1].split(",")]
            elif found and line.strip():
                found[-1] = (found[-1][0], f"{found[-1][1]} {line.strip()}")
    return head.strip(), [(name, told.replace("|", "\\|")) for name, told in found]


def needs(cls: Any, info: MethodInfo) -> str:
    """What a method reads beside the tokens themselves."""
    found = [
        ("[CLS] attention, or a substitute where the encoder has none", info.reads_cls),
        ("the question", info.reads_question),
        ("features after the projector", getattr(cls, "reads_projected", False)),
        ("a whole video at once; a picture is one of one frame", getattr(cls, "whole_video", False)),
        ("weights", hasattr(cls, "from_pretrained") and info.name != "fovea"),
    ]
    return "; ".join(name for name, wanted in found if wanted) or "nothing beside the tokens"


def paper(address: str) -> str:
    """A link to it."""
    number = address.rpartition("/")[2]
    return f"[arXiv {number}]({address})" if "arxiv.org" in address else "[this project](../fovea.md)"


def call(cls: type, info: MethodInfo) -> str:
    """How it is built."""
    import foveate

    made = f"foveate.{cls.__name__}" if cls.__name__ in foveate.__all__ else "foveate.get"
    fields = [field for field in ("budget=144",) if not info.adaptive]
    if made == "foveate.get":
        name = f"{info.name}:pocket" if "pocket" in shipped(cls) else info.name  # type: ignore[arg-type]
        fields = [f'"{name}"', *fields]
    return f"{made}({', '.join(fields)})"


def default(cls: Any, name: str) -> str:
    """The default of a field, as code."""
    values = {field.name: field.default for field in dataclasses.fields(cls)}
    value = values.get(name, dataclasses.MISSING)
    return "" if value is dataclasses.MISSING else f"`{value!r}`".replace("|", "\\|")


def differences(cls: Any, text: str) -> list[str]:
    """What presets say of themselves, and each sentence that speaks of released code."""
    found = [
        f"`{cls.name}:{name}`: {' '.join(inspect.cleandoc(getattr(cls, name).__doc__ or '').split())}" for name in presets(cls)
    ]
    return found + [sentence.strip() for sentence in SENTENCE.split(" ".join(text.split())) if CODE.search(sentence)]


def rows_of(name: str) -> list[dict[str, str]]:
    """Measured rows of a method and its presets."""
    with RESULTS.open(encoding="utf-8", newline="") as file:
        return [row for row in csv.DictReader(file) if row["method"].partition(":")[0] == name and row["asked"] == "True"]


def measured(info: MethodInfo) -> str:
    """What was measured on the pocket models: answers right, and the difference to all tokens."""
    found = [text for text in (on_first(info), on_second(info)) if text]
    none = "Not in the committed comparisons. [The leaderboard](../leaderboard.md) has the command that adds it."
    return "\n\n".join(found) or none


def on_second(info: MethodInfo) -> str:
    """Its row of the results of the second pocket model, a page of Markdown."""
    lines = SECOND.read_text(encoding="utf-8").splitlines()
    head = next(number for number, line in enumerate(lines) if line.startswith("| method |"))
    row = next((line for line in lines[head + 2 :] if line.startswith(f"| {info.name} |")), None)
    if row is None:
        return ""
    return "\n".join(["On the second pocket model, at shares of the tokens:", "", *lines[head : head + 2], row])


def on_first(info: MethodInfo) -> str:
    """Its rows of the comparison on the first pocket model."""
    rows = rows_of(info.name)
    if not rows:
        return ""
    lines = [
        "| on the pocket model | tokens, mean over layers | answers right, % | minus all tokens, points |",
        "|---|---|---|---|",
    ]
    for row in rows:
        percent = [100 * float(row[key]) for key in ("accuracy", "low", "high", "minus_all", "minus_all_low", "minus_all_high")]
        asked = "own rule" if row["budget"] == "own" else f"budget {row['budget']}"
        right = "{:.1f} [{:.1f}, {:.1f}]".format(*percent[:3])
        minus = "{:+.1f} [{:+.1f}, {:+.1f}]".format(*percent[3:])
        lines.append(f"| `{row['method']}`, {asked} | {float(row['mean_tokens']):.0f} | {right} | {minus} |")
    return "\n".join(lines)
