"""Files of rows, and what comes of them."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from foveate.serving.batch import offline
from foveate.serving.batch.rows import AnswerSettings, Source

QUESTIONS = ("what color is the star ?", "how many objects are there ?", "is there a red circle ?")


def written(folder: Path, documents: list, name: str = "questions.jsonl") -> Path:
    """A file of rows; texts are lines as they are."""
    lines = [each if isinstance(each, str) else json.dumps(each) for each in documents]
    (folder / name).write_text("".join(f"{line}\n" for line in lines))
    return folder / name


def mixed(pictures: Path, number: int = 12) -> list[dict]:
    """Rows with one picture, with two, and without."""
    found = []
    for n in range(number):
        row: dict = {"id": f"r{n}", "question": QUESTIONS[n % 3]}
        if n % 4 == 2:
            row["images"] = [str(pictures / f"{n % 3}.png"), str(pictures / f"{(n + 1) % 3}.png")]
        elif n % 4 != 3:
            row["image"] = str(pictures / f"{n % 4}.png")
        found.append(row)
    return found


def answers(path: Path) -> dict:
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({row["id"] for row in found}) == len(found)
    return {row["id"]: row for row in found}


def alone(engine, source: Source, wanted: AnswerSettings | None = None) -> dict:
    """Rows of the output when each row is a batch."""
    found = offline.answered(source, source.lines(), wanted or AnswerSettings(), engine, 1)
    return {row["id"]: row for batch in found for row in batch}


BAD = {
    "no such file": ({"image": "missing.png", "question": "q"}, "there is no file"),
    "no picture": ({"image": "words.png", "question": "q"}, "not a picture"),
    "truncated": ({"image": "half.png", "question": "q"}, "is damaged"),
    "no JSON": ('{"image": "0.png", "question', "no JSON"),
    "no object": ("[1, 2]", "no JSON object"),
    "deep": ("[" * 200_000, "no JSON"),
    "bytes": ("\udcff\udcfe", "no JSON"),
    "no question": ({"image": "0.png"}, "no question"),
    "empty question": ({"image": "0.png", "question": " "}, "no question"),
    "both": ({"image": "0.png", "images": ["0.png"], "question": "q"}, "both"),
    "number": ({"image": 3, "question": "q"}, "path of a picture"),
    "id": ({"id": 1.5, "question": "q"}, "the id 1.5"),
    "placeholder": ({"question": "what is <image> ?"}, "'<image>'"),
    "network": ({"image": "https://example.org/a.png", "question": "q"}, "Download"),
    "data URL": ({"image": "data:image/png;base64,####", "question": "q"}, "base64"),
    "data": ({"image": "data:image/png;base64,aGVsbG8=", "question": "q"}, "not a picture"),
    "long": ({"image": "0.png", "question": "red " * 4100}, "the model takes 4096"),
    "long text": ({"question": "red " * 4100}, "the model takes 4096"),
    "method": ({"image": "0.png", "question": "q", "method": "magic"}, "magic"),
    "budget": ({"image": "0.png", "question": "q", "budget": "many"}, "'budget' a number"),
    "negative": ({"image": "0.png", "question": "q", "budget": -3}, "budget"),
    "no tokens": ({"question": "q", "max_new_tokens": 0}, "expected 1 or more"),
    "tokens": ({"question": "q", "max_new_tokens": "3"}, "no whole number"),
    "body": ({"custom_id": "x", "body": 3}, "'body'"),
    "no messages": ({"custom_id": "x", "body": {}}, "'messages'"),
    "role": ({"custom_id": "x", "body": {"messages": [{"role": "king", "content": "q"}]}}, "role"),
    "part": ({"custom_id": "x", "body": {"messages": [{"role": "user", "content": [{"type": "audio"}]}]}}, "a part"),
    "tools": ({"custom_id": "x", "body": {"messages": [{"role": "user", "content": "q"}], "tools": []}}, "'tools'"),
    "n": ({"custom_id": "x", "body": {"messages": [{"role": "user", "content": "q"}], "n": 2}}, "n=2"),
    "hot": ({"custom_id": "x", "body": {"messages": [{"role": "user", "content": "q"}], "temperature": -1}}, "temperature"),
    "method of no text": ({"image": "0.png", "question": "q", "method": []}, "'method' is a name"),
    "method that is false": ({"image": "0.png", "question": "q", "method": False}, "'method' is a name"),
    "other settings": (
        {"custom_id": "x", "body": {"messages": [{"role": "user", "content": "q"}], "foveate": 0}},
        "'foveate'",
    ),
    "endless": ({"question": "q", "max_new_tokens": 10**20}, "at most"),
    "huge": ({"image": "0.png", "question": "q", "budget": 10**400}, "too large a number"),
    "boiling": ('{"body": {"messages": [{"role": "user", "content": "q"}], "temperature": 1' + "0" * 400 + "}}", "too large"),
    "elsewhere": ({"custom_id": "x", "url": "/v1/embeddings", "body": {"input": "q"}}, "/v1/embeddings"),
    "NaN": ({"image": "white.png", "question": "q", "method": "full"}, "NaN"),
    "NaN merged": ({"image": "white.png", "question": "q"}, ""),
}
GOOD = 8  # rows between them


def white_is_nan(model) -> list:
    """A white picture gives features that are no numbers."""

    def spoil(module, inputs):
        pixels = inputs[0]
        white = (pixels == pixels.amax()).flatten(1).all(1)
        return (torch.where(white[:, None, None, None], torch.nan, pixels),)

    found = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    return [each.register_forward_pre_hook(spoil) for each in found]


def broken(pictures: Path, folder: Path) -> tuple[Path, dict]:
    """Good rows between bad ones, and what is said of the bad ones by their ids."""
    for file in pictures.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "words.png").write_text("words")
    (folder / "half.png").write_bytes((pictures / "0.png").read_bytes()[:300])
    good = mixed(pictures, GOOD)
    documents, said = [], {}
    for bad, message in BAD.values():
        documents += [*good[:1], bad]
        del good[:1]
        said[len(documents)] = message
        if isinstance(bad, dict) and "custom_id" in bad:
            bad["custom_id"] = f"bad {len(documents)}"
            said[bad["custom_id"]] = said.pop(len(documents))
    path = folder / "questions.jsonl"
    lines = [each if isinstance(each, str) else json.dumps(each) for each in documents]
    path.write_bytes("".join(f"{line}\n" for line in lines).encode("utf-8", "surrogateescape"))
    return path, said
