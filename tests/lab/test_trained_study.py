"""Trained methods side by side: which model a row runs on, and questions that are not those of the prompt."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

import foveate
from foveate.lab.studies.trained import main, other_questions, place, row_of, turned
from foveate.tokens import Question

from .. import zoo


def test_rows_name_methods_and_models():
    assert row_of("full") == (None, "pocket")
    method, model = row_of("pool budget=36 @ pocket+pool-36")
    assert (method.name, method.budget, model) == ("pool", 36, "pocket+pool-36")
    assert row_of("prumerge+")[1] == "pocket"
    with pytest.raises(foveate.InputError, match="no field"):
        row_of("pool 36")
    rows = ["b", "a"]
    assert sorted(["a, wrong question", "a", "b"], key=lambda row: place(row, rows)) == ["b", "a", "a, wrong question"]


def test_other_questions_reach_the_method_and_no_others():
    model, inputs = zoo.load(), zoo.batch()
    method = foveate.get("quecc", stride=2, reader="decoder").fresh(0)
    before = type(method).reduce
    right = foveate.encode(model, method, **inputs).embeds
    with other_questions(method):
        wrong = foveate.encode(model, method, **inputs).embeds
    again = foveate.encode(model, method, **inputs).embeds
    assert type(method).reduce is before
    assert all(torch.equal(a, b) for a, b in zip(right, again, strict=True))
    # two pictures of one prompt have one question, so that the first of them reads the right one
    same = [torch.allclose(a, b) for a, b in zip(right, wrong, strict=True)]
    assert sorted(same) == [False, False, False, True]
    with pytest.raises(foveate.InputError, match="reads no question"), other_questions(foveate.get("pool", budget=4)):
        pass


def test_a_question_alone_has_no_other_one():
    question = Question(
        None, torch.randn(3, 2, 4), torch.tensor([[True, True], [True, False], [True, True]]), state=torch.randn(3, 4)
    )
    found = turned(question)
    for part in ("text", "valid", "state"):
        assert torch.equal(getattr(found, part)[0], getattr(question, part)[2])
    assert turned(None) is None
    with pytest.raises(foveate.InputError, match="one question"):
        turned(Question(None, torch.randn(1, 2, 4), torch.ones(1, 2, dtype=torch.bool)))


def test_the_table(tmp_path):
    import typer

    app = typer.Typer()
    app.command()(main)
    quecc = "quecc weights=pocket @ pocket+quecc"
    rows = f"full; {quecc}; pool budget=36 @ pocket+pool-36"
    options = ["--wrong", quecc, "--scenes", "3", "--store", str(tmp_path / "store"), "--json", str(tmp_path / "all.json")]
    result = CliRunner().invoke(app, [rows, *options])
    assert result.exit_code == 0, result.output
    document = json.loads((tmp_path / "all.json").read_text())
    assert list(document["rows"]) == ["full", quecc, f"{quecc}, wrong question", "pool budget=36 @ pocket+pool-36"]
    assert [each["tokens"] for each in document["rows"].values()] == [576, 36, 36, 36]
    assert document["rows"]["full"]["accuracy"][0] > 0.6
    assert result.output.count("| `") == 4
    # what is known is not computed again, and gives the same
    again = CliRunner().invoke(app, [rows, *options])
    assert again.output.splitlines()[2:] == result.output.splitlines()[2:]
