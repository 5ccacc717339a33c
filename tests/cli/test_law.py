"""``foveate law`` as a user runs it."""

from __future__ import annotations

import json

import pytest

from foveate.analysis.law import Law, read_points, study

from .test_main import invoke
from .test_start import HEAVY, modules


def told(capsys, monkeypatch, *options: str) -> dict:
    code, out, err = invoke(capsys, monkeypatch, "law", *options, "--json")
    assert (code, err) == (0, "")
    return json.loads(out)


def test_the_published_law(capsys, monkeypatch):
    document = told(capsys, monkeypatch)
    found = study(read_points()["reasoning"])
    assert document["fit"]["alpha"] == {"value": found.law.alpha, "interval": list(found.interval("alpha"))}
    assert document["optimum"]["value"] == found.law.optimum(50)
    assert [row["budget"] for row in document["budgets"]] == [50, 100, 200, 400, 1000]
    row = document["budgets"][3]
    assert row["measured"] == {"size": 7, "tokens": 4, "score": 0.4971}
    assert row["best"]["size"] == 7
    assert row["best"]["tokens"] == 7
    assert row["any_size"]["size"] * (50 + row["any_size"]["tokens"]) == pytest.approx(400)
    assert len(document["points"]) == 28
    assert document == told(capsys, monkeypatch), "the bootstrap is seeded"


def test_tables(capsys, monkeypatch):
    code, out, _ = invoke(capsys, monkeypatch, "law")
    assert code == 0
    assert "0.0709" in out
    assert "13.5" in out
    assert "0.386 / 0.379" in out  # 0.5B with one token, measured and by the law
    assert "1.8B, 36" in out
    code, out, _ = invoke(capsys, monkeypatch, "law", "--tasks", "ocr")
    assert code == 0
    assert "no optimum below all tokens" in out


def test_options(capsys, monkeypatch):
    document = told(capsys, monkeypatch, "--text", "0", "--budget", "10,0.1", "--sizes", "7, 14")
    assert document["optimum"]["value"] == 1
    first, second = document["budgets"]
    assert (first["best"]["size"], first["best"]["tokens"], first["measured"]["tokens"]) == (7, 1, 1)
    assert second["best"] is second["measured"] is None
    assert second["sizes"] == []
    assert told(capsys, monkeypatch, "--tasks", "ocr")["optimum"] == {"value": None, "interval": [None, None]}
    code, out, _ = invoke(capsys, monkeypatch, "law", "--budget", "0.1")
    assert code == 0
    assert out.count("none") == 2


def test_a_table_of_your_own(capsys, monkeypatch, tmp_path):
    law = Law(0.4, 0.2, 0.05, 0.1)
    pairs = [(size, tokens) for size in (1, 7) for tokens in (16, 64, 576)]
    rows = [{"size": size, "tokens": tokens, "score": 1 - float(law.error(size, tokens))} for size, tokens in pairs]
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"tasks": {"mine": rows}}))
    document = told(capsys, monkeypatch, "--data", str(path))
    assert document["tasks"] == "mine"
    assert document["optimum"]["value"] == pytest.approx(50 / 3, abs=0.1)
    assert document["left_out"] == {}
    code, out, _ = invoke(capsys, monkeypatch, "law", "--data", str(path))
    assert code == 0
    assert "too few sizes" in out


@pytest.mark.parametrize(("size", "tokens"), [(1e300, 16), (1e-300, 16), (7, 1e300), (10**400, 16)])
def test_points_beyond_what_floats_hold(capsys, monkeypatch, tmp_path, size, tokens):
    path = tmp_path / "mine.json"
    rows = [{"size": 1, "tokens": 10 * number, "score": number / 10} for number in range(1, 6)]
    path.write_text(json.dumps({"tasks": {"mine": [*rows, {"size": size, "tokens": tokens, "score": 0.9}]}}))
    code, out, err = invoke(capsys, monkeypatch, "law", "--data", str(path))
    assert (code, out) == (2, "")
    assert "expected billions of weights" in err or "too large a number" in err


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["--text", "-1"], "--text -1: expected a number of tokens"),
        (["--text", "nan"], "--text nan"),
        (["--budget", "50,x"], "'x' is no positive number"),
        (["--budget", "50,,"], "empty entry"),
        (["--budget", "1e308"], "'1e308' is no positive number from 1e-06 to 1e+12"),
        (["--sizes", "1e-320"], "'1e-320' is no positive number"),
        (["--text", "1e300"], "at most 1e+12"),
        (["--sizes", "0"], "'0' is no positive number"),
        (["--tasks", "vqa"], "there are scores of reasoning, ocr"),
        (["--data", "none.json"], "none.json cannot be read"),
    ],
)
def test_refused(capsys, monkeypatch, options, match):
    code, out, err = invoke(capsys, monkeypatch, "law", *options)
    assert (code, out) == (2, "")
    assert match in err
    assert "Traceback" not in err


def test_it_needs_numpy_only():
    found = modules("sys.argv = ['foveate', 'law', '--json']; import foveate.cli; foveate.cli.run()")
    assert set(HEAVY) & set(found) == {"numpy"}
