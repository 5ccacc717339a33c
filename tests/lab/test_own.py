"""Examples of one's own, and the table of methods on them."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

import foveate
from foveate.lab.compare import compare
from foveate.lab.exam import as_shown
from foveate.lab.own import OwnRunner, drawn_examples, read_examples
from foveate.lab.runner import Runner
from foveate.lab.scoring import score_of
from foveate.lab.tables import files
from foveate.lab.testset import TestSet
from foveate.loading import load

SCENES, EACH, SEED = 10, 2, 11


@pytest.fixture(scope="module")
def pocket():
    return load("pocket")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The first scenes of a test set as files."""
    place = tmp_path_factory.mktemp("own")
    data = TestSet.draw(SCENES, SEED, "test").picked(EACH, SEED)
    rows = []
    for number, question in data.asked:
        as_shown(data.scenes[number]).save(place / f"{number}.png")
        rows.append({"image": f"{number}.png", "question": question.text, "answer": question.answer, "kind": question.family})
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


def write(folder, name: str, rows: list) -> object:
    (folder / name).write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return folder / name


def test_the_table_is_that_of_the_test_set(folder, pocket):
    """The same scenes as files and as drawn: every answer is as right, whatever way it was asked."""
    own = OwnRunner(read_examples(folder / "rows.jsonl", pocket), score_of("exact"), "exact", None, pocket, longest=5)
    drawn = Runner(SCENES, EACH, SEED, model=pocket)
    assert own.scores.families.tolist() == drawn.scores.families.tolist()
    assert len(set(own.scores.scene.tolist())) == SCENES
    for method in (None, foveate.get("divprune", budget=0.1), foveate.get("fastv", budget=0.3), foveate.get("prumerge")):
        mine, theirs = own.outcome(method), drawn.outcome(method)
        assert mine.right.tolist() == theirs.right.tolist()
        assert mine.layers == pytest.approx(theirs.layers)
    assert own.total == drawn.total == 576


def test_the_report_says_what_it_is_about(folder, pocket, tmp_path):
    examples = read_examples(folder / "rows.jsonl", pocket, limit=8)
    runner = OwnRunner(examples, score_of("exact"), "exact", tmp_path / "store.jsonl", pocket, longest=5)
    report = compare(runner, ("spatial", "quecc"), (0.25,), own=False)
    text = files({"command": "foveate compare ...", **report})["comparison.md"]
    assert "Methods on rows.jsonl" in text
    assert "8 questions about 4 pictures and videos of rows.jsonl" in text
    assert "weights of the pocket model" not in text
    assert [entry["method"] for entry in report["missing"]] == ["quecc"]
    assert "weights" in report["missing"][0]["reason"]
    before = (tmp_path / "store.jsonl").read_bytes()
    again = OwnRunner(examples, score_of("exact"), "exact", tmp_path / "store.jsonl", pocket, longest=5)
    assert compare(again, ("spatial", "quecc"), (0.25,), own=False) == report
    assert (tmp_path / "store.jsonl").read_bytes() == before


def test_without_answers_the_own_ones_are_right(folder, pocket, tmp_path):
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    path = write(folder, "bare.jsonl", [{name: row[name] for name in ("image", "question")} for row in rows[:8]])
    runner = OwnRunner(read_examples(path, pocket), score_of("exact"), "exact", None, pocket, longest=5)
    assert runner.outcome(None).right.tolist() == [1.0] * 8
    assert runner.outcome(foveate.get("random", budget=2)).right.mean() < 1


def test_rows_that_cannot_be_used_are_counted(folder, pocket):
    good = {"image": "0.png", "question": "what ?", "answer": "x"}
    rows = [
        good,
        {**good, "image": "gone.png"},
        {"question": "what ?", "answer": "x"},
        {**good, "answer": ""},
        {**good, "question": 3},
        "no json",
        {**good, "kind": 3},
        {**good, "image": "https://example.com/a.png"},
        {**good, "question": "<image> what ?"},
        {**good, "answers": ["x", "y"]},
        {"images": ["0.png", "1.png"], "question": "what ?", "answer": 3},
        {**good, "video": "a.mp4"},
    ]
    found = read_examples(write(folder, "mixed.jsonl", rows), pocket)
    assert [item.line for item in found.items] == [1, 10, 11]
    assert [item.answers for item in found.items] == [("x",), ("x", "y"), ("3",)]
    assert set(found.skipped) == {2, 3, 4, 5, 6, 7, 8, 9, 12}
    assert "9 of 12 rows cannot be used and are left out (line 2: there is no file" in found.notes()[0]
    assert found.items[2].prompt().images[1].size == Image.open(folder / "1.png").size


def test_half_of_the_answers_are_missing(folder, pocket):
    rows = [{"image": "0.png", "question": "what ?", "answer": "x"}] * 3 + [{"image": "0.png", "question": "what ?"}] * 2
    with pytest.raises(foveate.InputError, match=r"2 of 5 rows of .* have no answer \(lines 4, 5\)"):
        read_examples(write(folder, "half.jsonl", rows), pocket)
    with pytest.raises(foveate.InputError, match="none of the 1 rows"):
        read_examples(write(folder, "none.jsonl", [{"image": "gone.png", "question": "q"}]), pocket)


def test_what_an_answer_depends_on(folder, pocket, tmp_path):
    """Another picture under the same name is another example."""
    picture = tmp_path / "a.png"
    Image.new("RGB", (192, 192), "red").save(picture)
    path = write(tmp_path, "rows.jsonl", [{"image": "a.png", "question": "what ?", "answer": "x"}])
    one = read_examples(path, pocket)
    Image.new("RGB", (192, 192), "blue").save(picture)
    other = read_examples(path, pocket)
    assert one.items[0].digest != other.items[0].digest
    assert one.items[0].group != other.items[0].group
    assert one.digest != other.digest


def test_drawn_scenes(pocket):
    examples = drawn_examples(pocket, 6, 1)
    again = drawn_examples(pocket, 6, 1)
    assert [item.digest for item in examples.items] == [item.digest for item in again.items]
    assert len({item.group for item in examples.items}) == 6
    assert np.array_equal(np.asarray(examples.items[0].prompt().images[0]), np.asarray(again.items[0].prompt().images[0]))
    assert {item.digest for item in drawn_examples(pocket, 6, 2).items}.isdisjoint(item.digest for item in examples.items)
