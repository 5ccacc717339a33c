"""Files of training data: the formats that people have, and what is wrong with them, by line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from foveate.errors import InputError
from foveate.training.conversations import read_conversations

LLAVA = {
    "id": "1",
    "image": "a.png",
    "conversations": [
        {"from": "human", "value": "<image>\nwhat is this ?"},
        {"from": "gpt", "value": "a star"},
        {"from": "human", "value": "and its color ?"},
        {"from": "gpt", "value": "red"},
    ],
}
TRL = {
    "images": ["a.png", "b.png"],
    "messages": [
        {"role": "system", "content": "be short"},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "or"}, {"type": "image"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "the second"}]},
    ],
}
PLAIN = {"image": "b.png", "question": "what is this ?", "answer": "a sign"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    return tmp_path


def written(folder: Path, entries: list, *, lines: bool = True) -> Path:
    path = folder / "data.jsonl"
    path.write_text("\n".join(json.dumps(entry) for entry in entries) if lines else json.dumps(entries))
    return path


def words(message) -> list[str]:
    return [part.get("text", "<picture>") for part in message["content"]]


@pytest.mark.parametrize("lines", [True, False])
def test_formats(folder, lines):
    found, broken = read_conversations(written(folder, [LLAVA, TRL, PLAIN], lines=lines))
    assert broken == []
    assert [row.pictures for row in found] == [(folder / "a.png",), (folder / "a.png", folder / "b.png"), (folder / "b.png",)]
    llava, trl, plain = ([(message["role"], *words(message)) for message in row.messages] for row in found)
    assert llava == [
        ("user", "<picture>", "what is this ?"),
        ("assistant", "a star"),
        ("user", "and its color ?"),
        ("assistant", "red"),
    ]
    assert trl == [("system", "be short"), ("user", "<picture>", "or", "<picture>"), ("assistant", "the second")]
    assert plain == [("user", "<picture>", "what is this ?"), ("assistant", "a sign")]
    assert found[2].where == f"{'line' if lines else 'entry'} 3 of {folder / 'data.jsonl'}"


def test_single_turns(folder):
    """Each question with all pictures and the system's words."""
    two, one = (row.single_turns() for row in read_conversations(written(folder, [LLAVA, TRL]))[0])
    assert [[words(message) for message in row.messages] for row in two] == [
        [["<picture>", "what is this ?"], ["a star"]],
        [["<picture>", "and its color ?"], ["red"]],
    ]
    assert [message["role"] for message in one[0].messages] == ["system", "user", "assistant"]
    assert words(one[0].messages[1]) == ["<picture>", "<picture>", "or"]


def test_pictures_elsewhere(folder, tmp_path_factory):
    place = tmp_path_factory.mktemp("elsewhere")
    path = written(place, [PLAIN])
    assert read_conversations(path, folder)[0][0].pictures == (folder / "b.png",)
    with pytest.raises(InputError, match="there is no picture"):
        read_conversations(path)


def test_questions_alone(folder):
    """Where answers are not needed, a conversation may end with a question, and gets its answer later."""
    question = {name: PLAIN[name] for name in ("image", "question")}
    path = written(folder, [question, PLAIN])
    with pytest.raises(InputError, match=r"line 1 of .*ends with a question"):
        read_conversations(path)
    first, second = read_conversations(path, answers=False)[0]
    assert not first.answered
    assert second.answered
    assert words(first.with_answer("a star").messages[-1]) == ["a star"]


BROKEN = {
    "no JSON": "{",
    "no object": [1],
    "strange": {"text": "hello"},
    "twice": '{"image": "a.png", "image": "b.png", "question": "?", "answer": "!"}',
    "missing picture": {**PLAIN, "image": "c.png"},
    "a number for a picture": {**PLAIN, "image": 3},
    "an empty answer": {**PLAIN, "answer": " "},
    "no text": {**PLAIN, "question": 5},
    "a role of its own": {**LLAVA, "conversations": [{"from": "tool", "value": "x"}]},
    "no value": {**LLAVA, "conversations": [{"from": "human"}]},
    "the assistant first": {**LLAVA, "conversations": LLAVA["conversations"][1:]},
    "two questions": {**LLAVA, "conversations": LLAVA["conversations"][::2]},
    "places for two": {**LLAVA, "conversations": [{"from": "human", "value": "<image> <image>"}, LLAVA["conversations"][1]]},
    "a place, no picture": {**LLAVA, "image": None},
    "a sound": {**TRL, "messages": [{"role": "user", "content": [{"type": "audio"}]}, TRL["messages"][2]]},
    "nothing said": {**TRL, "messages": []},
    "a picture in an answer": {
        **TRL,
        "images": ["a.png"],
        "messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": [{"type": "image"}]}],
    },
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_entries(folder, name):
    entry = BROKEN[name]
    path = folder / "data.jsonl"
    path.write_text("\n".join([json.dumps(LLAVA), entry if isinstance(entry, str) else json.dumps(entry), json.dumps(PLAIN)]))
    with pytest.raises(InputError, match=r"line 2 of .*Nothing was trained"):
        read_conversations(path)
    found, broken = read_conversations(path, skip_broken=True)
    assert len(found) == 2
    assert len(broken) == 1
    assert broken[0].startswith(f"line 2 of {path}: ")


def test_files_that_cannot_be_read(folder):
    for text, message in (("", "holds no conversation"), ("[1,", "no JSON list")):
        (folder / "data.jsonl").write_text(text)
        with pytest.raises(InputError, match=message):
            read_conversations(folder / "data.jsonl")
    (folder / "data.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="UTF-8"):
        read_conversations(folder / "data.jsonl")
    with pytest.raises(InputError, match="cannot be read"):
        read_conversations(folder / "none.jsonl")
