"""``foveate tune`` and plans, run as a user runs them."""

from __future__ import annotations

import contextlib
import io
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

import foveate
from foveate.cli.common import asked_of, methods_of
from foveate.lab.exam import as_shown
from foveate.lab.testset import TestSet
from foveate.loading import load, load_encoder
from foveate.methods.saved import named
from foveate.tuning.plan import read_plan

from .. import families
from .test_main import invoke

FAST = ("--objective", "tokens", "--max-tokens", "5")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """48 questions about 48 scenes, with answers and without, one of whose pictures is missing."""
    place = tmp_path_factory.mktemp("data")
    data = TestSet.draw(48, 3, "validation").picked(1, 3)
    rows = []
    for number, question in data.asked:
        as_shown(data.scenes[number]).save(place / f"{number}.png")
        rows.append({"image": f"{number}.png", "question": question.text, "answer": question.answer, "kind": question.family})
    rows.append({"image": "missing.png", "question": "what ?", "answer": "x"})
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    bare = [{name: value for name, value in row.items() if name != "answer"} for row in rows]
    (place / "bare.jsonl").write_text("".join(json.dumps(row) + "\n" for row in bare))
    (place / "half.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows[:20], *bare[20:]]))
    return place


@pytest.fixture(scope="module")
def planned(folder, tmp_path_factory):
    """A plan for the pocket model, and what was printed."""
    place = tmp_path_factory.mktemp("plan")
    patch = pytest.MonkeyPatch()
    patch.chdir(place)
    with patch.context() as monkeypatch:
        out, err = io.StringIO(), io.StringIO()

        class Captured:
            def readouterr(self):
                return type("Text", (), {"out": out.getvalue(), "err": err.getvalue()})

        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            asked = ("tune", "--data", str(folder / "rows.jsonl"), "--tolerance", "40", "--methods", "divprune,spatial", "--json")
            code, text, told = invoke(Captured(), monkeypatch, *asked, *FAST)
    patch.undo()
    assert code == 0, told
    return place, json.loads(text), told


def test_what_it_finds(planned):
    place, document, told = planned
    assert document["method"]["method"] in ("divprune", "spatial")
    assert document["bound"] <= 0.4
    assert document["loss"] <= document["bound"]
    saving = document["saving"]
    assert saving["objective"] == "tokens"
    chosen = next(trial for trial in document["trials"] if trial["verdict"] == "chosen")
    assert saving["saving"] == pytest.approx(1 - chosen["cost"]["ratio"])
    assert chosen["tokens"] == pytest.approx(document["method"]["fields"]["budget"], abs=0.01)
    assert document["about"]["data"]["examples"] == 48
    assert document["about"]["data"]["skipped"] == {"49": document["about"]["data"]["skipped"]["49"]}
    assert "1 of 49 rows cannot be used" in told
    assert document["about"]["command"].startswith("foveate tune")
    assert read_plan(place / "plan.json").method == document["method"]


def test_the_loss_is_what_asking_anew_gives(planned, folder):
    """Independent of the tuning: every example of the test is asked one by one, with the method attached by hand."""
    place, document, _ = planned
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()][:-1]
    loaded = load("pocket")
    method = foveate.load_plan(place / "plan.json")
    answers = [json.loads(line) for line in (place / "plan.answers.jsonl").read_text().splitlines()]
    assert sum("key" in line for line in answers) > 96
    right = {}
    for name, chosen in (("full", foveate.get("full")), ("plan", method)):
        with chosen(loaded.model):
            right[name] = [said(loaded, folder / row["image"], row["question"]) == row["answer"] for row in rows]
    lost = [a - b for a, b in zip(right["full"], right["plan"], strict=True)]
    chosen = next(trial for trial in document["trials"] if trial["verdict"] == "chosen")
    both = (
        chosen["searched"]["mean"] * chosen["searched"]["examples"] + chosen["confirmed"]["mean"] * chosen["confirmed"]["examples"]
    )
    assert both == pytest.approx(sum(lost))
    assert document["about"]["score_with_all_tokens"] == pytest.approx(sum(right["full"]) / len(rows))


def said(loaded, path, question: str) -> str:
    from foveate.chat import make_inputs

    inputs, _ = make_inputs(loaded.processor, loaded.model, Image.open(path).convert("RGB"), question)
    out = loaded.model.generate(**inputs, max_new_tokens=5, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return loaded.processor.decode(out, skip_special_tokens=True).strip()


def test_the_page_stands_alone(planned):
    place, document, _ = planned
    text = (place / "plan.html").read_text()
    assert "http://" not in text.replace("http://www.w3.org", "")
    assert "https://" not in text
    assert "<script" not in text
    assert text.count("data:image/png;base64,") == 1
    assert document["about"]["setting"] in text
    assert "kept" in text or "changed" in text


def test_a_run_goes_on_from_its_answers(planned, folder, capsys, monkeypatch, tmp_path):
    place, document, _ = planned
    before = (place / "plan.answers.jsonl").read_bytes()
    asked = ("tune", "--data", str(folder / "rows.jsonl"), "--tolerance", "40", "--methods", "divprune,spatial", "--json")
    more = ("--store", str(place / "plan.answers.jsonl"), "--out", str(tmp_path / "again.json"))
    code, out, _ = invoke(capsys, monkeypatch, *asked, *FAST, *more)
    assert code == 0
    again = json.loads(out)
    assert [trial["verdict"] for trial in again["trials"]] == [trial["verdict"] for trial in document["trials"]]
    assert again["method"] == document["method"]
    assert (place / "plan.answers.jsonl").read_bytes() == before


def test_a_run_that_was_killed_goes_on(planned, folder, capsys, monkeypatch, tmp_path):
    """Half of the answers are there, the last one cut off in its line: the others are asked, and the end is the same."""
    place, document, _ = planned
    whole = (place / "plan.answers.jsonl").read_bytes()
    half = whole[: len(whole) // 2]
    (tmp_path / "plan.answers.jsonl").write_bytes(half)
    monkeypatch.chdir(tmp_path)
    asked = ("tune", "--data", str(folder / "rows.jsonl"), "--tolerance", "40", "--methods", "divprune,spatial", "--json")
    code, out, err = invoke(capsys, monkeypatch, *asked, *FAST)
    assert code == 0, err
    assert [trial["verdict"] for trial in json.loads(out)["trials"]] == [trial["verdict"] for trial in document["trials"]]
    after = (tmp_path / "plan.answers.jsonl").read_bytes()
    assert after.startswith(half[: half.rindex(b"\n") + 1])
    keys = [line["key"] for line in map(json.loads, after.splitlines()) if "key" in line]
    assert len(keys) - len(set(keys)) < 8  # but for the prompts that ran together when it was killed, nothing was asked twice


def test_without_answers_the_own_ones_are_right(folder, capsys, monkeypatch, tmp_path):
    asked = ("tune", "--data", str(folder / "bare.jsonl"), "--tolerance", "40", "--methods", "spatial", "--json")
    code, out, _ = invoke(capsys, monkeypatch, *asked, *FAST, "--out", str(tmp_path / "plan.json"))
    assert code == 0
    document = json.loads(out)
    assert document["about"]["right"] == "the model's own answers with all tokens"
    assert document["about"]["score_with_all_tokens"] == 1
    assert min(trial["searched"]["mean"] for trial in document["trials"] if trial["searched"]) >= 0  # nothing can be gained


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (("ask", "PICTURE", "what color is the star ?"), '"name": "METHOD"'),
        (("bench", "--rounds", "1", "--new-tokens", "2"), "plan"),
        (("compare", "--data", "ROWS", "--limit", "8", "--methods", "spatial", "--budgets", "0.5"), "plan.json"),
        (("batch", "QUESTIONS", "answers.jsonl"), "answers.jsonl: 2 answered, 0 failed"),
        (("export", "pocket", "text"), "with its plan:  foveate serve --model pocket --plan"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_commands_take_plans(planned, folder, capsys, monkeypatch, tmp_path, command, expected):
    place, document, _ = planned
    monkeypatch.chdir(tmp_path)
    rows = (folder / "rows.jsonl").read_text().splitlines()[:2]
    (tmp_path / "questions.jsonl").write_text("".join(row.replace('"image": "', f'"image": "{folder}/') + "\n" for row in rows))
    places = {"PICTURE": folder / "0.png", "ROWS": folder / "rows.jsonl", "QUESTIONS": tmp_path / "questions.jsonl"}
    given = [str(places.get(part, part)) for part in command]
    more = ["--json"] if command[0] == "ask" else []
    code, out, err = invoke(capsys, monkeypatch, *given, "--plan", str(place / "plan.json"), *more)
    assert code == 0, err
    assert expected.replace("METHOD", document["method"]["method"]) in out


def test_a_plan_says_all_of_the_method(planned, folder, capsys, monkeypatch):
    place, _, _ = planned
    given = ("ask", str(folder / "0.png"), "what ?", "--plan", str(place / "plan.json"))
    for more in (("--method", "fastv"), ("--budget", "0.5"), ("--set", "layer=2"), ("--config", str(place / "plan.json"))):
        code, _, err = invoke(capsys, monkeypatch, *given, *more)
        assert code == 2
        assert "--plan says all of the method" in err


def test_other_processes_get_it_whole(planned):
    """What the batch engines and the gateway are handed is one line of text; the model is named in it."""
    place, document, _ = planned
    name, budget, config = asked_of(None, None, None, None, place / "plan.json")
    assert (name, budget) == (document["method"]["method"], None)
    method = named(name, budget, config)
    assert method == foveate.load_plan(place / "plan.json")
    assert method.made_for == document["model"]
    assert methods_of((), None, plan=place / "plan.json") == {"plan": method}


def test_a_plan_is_for_its_model(planned, folder, capsys, monkeypatch, tmp_path):
    """The other shipped model is refused, whatever attaches it: command line, attach, a saved copy, a change of budget."""
    place, _, _ = planned
    plan = str(place / "plan.json")
    code, _, err = invoke(capsys, monkeypatch, "ask", str(folder / "0.png"), "what ?", "--model", "pocket-qwen", "--plan", plan)
    assert code == 2
    assert "was tuned for 'pocket', and this is a model with other weights" in err
    method = foveate.load_plan(plan)
    other, _ = foveate.load_pocket("qwen")
    mine, _ = foveate.load_pocket()
    method.save(tmp_path / "saved.json")
    for each in (method, method.with_budget(0.4), foveate.Method.load(tmp_path / "saved.json"), foveate.Method.load(plan)):
        with pytest.raises(foveate.InputError, match="other weights"):
            foveate.attach(other, each)
        each(mine).__enter__().detach()
    encoder = load_encoder("pocket").model  # as the gateway has it, without decoder layers
    pixels = torch.rand(1, 3, 192, 192)
    assert len(foveate.Pictures(encoder, pixel_values=pixels).reduce(method).embeds[0]) < 576
    with torch.no_grad():
        for parameter in mine.parameters():
            parameter.mul_(1.5)
    with pytest.raises(foveate.InputError, match="other weights"):
        foveate.attach(mine, method)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        (("--tolerance", "0"), "No sample can show that nothing is lost"),
        (("--tolerance", "-1"), "expected points above 0"),
        (("--minutes", "0"), "expected a time above 0"),
        (("--objective", "speed"), "expected one of prefill, end-to-end, kv-bytes, tokens"),
        (("--score", "bleu"), "unknown score 'bleu'"),
        (("--score", "none.py:score"), "is no Python file"),
        (("--methods", "prumrge"), "did you mean 'prumerge'"),
        (("--data", "half"), "have no answer"),
        (("--data", "few"), "7 examples can be used; expected 20 or more"),
        (("--data", "gone.jsonl"), "cannot be read|is no"),
        (("--minutes", "0.0001"), "a quarter of the time limit is over"),
        (("--model", "no/such/model"), "cannot be loaded"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else "",
)
def test_what_is_wrong_is_said(folder, capsys, monkeypatch, tmp_path, given, match):
    monkeypatch.chdir(tmp_path)
    rows = (folder / "rows.jsonl").read_text().splitlines()
    (folder / "few.jsonl").write_text("\n".join(rows[:7]) + "\n")
    given = tuple(str(folder / f"{part}.jsonl") if part in ("half", "few") else part for part in given)
    data = () if "--data" in given else ("--data", str(folder / "rows.jsonl"))
    methods = () if "--methods" in given else ("--methods", "spatial")
    code, _, err = invoke(capsys, monkeypatch, "tune", *data, *methods, *given)
    assert code == 2
    assert re.search(match, err), err
    assert not (tmp_path / "plan.json").exists()


def test_what_is_no_plan(tmp_path, capsys, monkeypatch):
    for number, text in enumerate(("[]", "{", '{"method": {"method": "spatial"}}', '{"method": "spatial"}', '{"format": 9}')):
        path = tmp_path / f"{number}.json"
        path.write_text(text)
        with pytest.raises(foveate.InputError, match="plan"):
            foveate.load_plan(path)
    with pytest.raises(foveate.InputError, match="cannot be read"):
        foveate.load_plan(tmp_path / "none.json")
    code, _, err = invoke(capsys, monkeypatch, "bench", "--plan", str(tmp_path / "0.json"), "--budget", "0.5")
    assert code == 2
    assert "no plan" in err or "--plan says all" in err


def test_drawn_scenes_of_the_second_model(capsys, monkeypatch, tmp_path):
    """Pictures of many sizes, and clips, with methods for videos among those that are tried."""
    monkeypatch.chdir(tmp_path)
    asked = (
        "tune",
        "--model",
        "pocket-qwen",
        "--examples",
        "24",
        "--tolerance",
        "40",
        "--methods",
        "evs,spatial",
        "--json",
        "--html",
        "page.html",
    )
    code, out, err = invoke(capsys, monkeypatch, *asked, "--json", "--html", "page.html", *FAST)
    assert code == 0, err
    document = json.loads(out)
    assert {trial["method"]["method"] for trial in document["trials"]} == {"evs", "spatial", "compose"} - {"compose"}
    assert document["about"]["data"]["name"].startswith("validation scenes")
    assert (tmp_path / "page.html").stat().st_size > 10_000
    assert not (tmp_path / "plan.html").exists()


def test_videos_of_ones_own(capsys, monkeypatch, tmp_path):
    pytest.importorskip("av")
    import av

    random = np.random.default_rng(0)
    for number in range(3):
        with av.open(str(tmp_path / f"{number}.mp4"), "w") as file:
            stream = file.add_stream("mpeg4", rate=8)
            stream.width = stream.height = 128
            for _ in range(8):
                frame = random.integers(0, 255, (128, 128, 3), dtype=np.uint8)
                file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            file.mux(stream.encode())
    rows = [{"video": f"{n % 3}.mp4", "question": "what moves ?" if n % 2 else "how many objects appear ?"} for n in range(24)]
    rows.append({"video": "gone.mp4", "question": "what moves ?"})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    asked = (
        "tune",
        "--model",
        "pocket-qwen",
        "--data",
        "rows.jsonl",
        "--tolerance",
        "60",
        "--methods",
        "evs",
        "--json",
        "--frames",
        "4",
    )
    code, out, err = invoke(capsys, monkeypatch, *asked, *FAST)
    assert code == 0, err
    document = json.loads(out)
    assert document["about"]["data"]["skipped"].keys() == {"25"}
    assert document["about"]["data"]["examples"] == 24


def test_another_family_from_a_folder(capsys, monkeypatch, tmp_path):
    """A saved LLaVA-NeXT, whose pictures have several tiles, on pictures of many shapes without answers."""
    model = families.next_with_processor()
    random, rows = np.random.default_rng(0), []
    for number in range(24):
        size = (int(random.integers(60, 180)), int(random.integers(60, 180)), 3)
        Image.fromarray(random.integers(0, 255, size, dtype=np.uint8)).save(tmp_path / f"{number}.png")
        rows.append({"image": f"{number}.png", "question": f"w{20 + number} w11"})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    # a model with random weights says something else for every picture: what it says must not decide whether a setting passes
    (tmp_path / "words.py").write_text("def score(text, answers, row):\n    return float(len(text.split()) > 0)\n")
    monkeypatch.chdir(tmp_path)
    asked = ("tune", "--model", str(model), "--data", "rows.jsonl", "--tolerance", "40", "--methods", "divprune,fastv,setok")
    asked += ("--score", "words.py:score")
    code, out, err = invoke(capsys, monkeypatch, *asked, "--objective", "kv-bytes", "--max-tokens", "3")
    assert code == 0, err
    assert "divprune" in out
    code, out, err = invoke(capsys, monkeypatch, "ask", "0.png", "w20 w11", "--model", str(model), "--plan", "plan.json", "--json")
    assert code == 0, err
    document = json.loads(out)
    assert read_plan(tmp_path / "plan.json").method["method"] in document["layers"]
    assert min(min(layers) for layers in document["layers"].values()) < document["visual_tokens_before"]
    code, _, err = invoke(capsys, monkeypatch, "tune", "--model", str(model), "--out", "p.json")
    assert code == 2
    assert "scenes of the pocket world are for the pocket models" in err
