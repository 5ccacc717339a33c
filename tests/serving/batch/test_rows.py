"""``foveate batch``: each row once, whatever happens, with the answers that the rows get alone."""

from __future__ import annotations

import base64
import os
import signal
import subprocess
import sys
import time
from io import BytesIO

import pytest
import torch
from PIL import Image

import foveate
from foveate.errors import InputError
from foveate.serving.batch import engines, offline, rows
from foveate.serving.batch import rows as rows_module
from foveate.serving.batch.base import EngineError
from foveate.serving.batch.results import Output
from foveate.serving.batch.rows import AnswerSettings, Source
from foveate.serving.batch.vllm_engine import VllmEngine
from tests.cli.test_main import invoke

from .asked import BAD, GOOD, QUESTIONS, alone, answers, broken, mixed, white_is_nan, written


def test_rows_get_the_answers_that_generate_gives_alone(pictures, tmp_path, engine, shared, capsys, monkeypatch):
    path = written(tmp_path, mixed(pictures))
    code, out, _ = invoke(capsys, monkeypatch, "batch", str(path), str(tmp_path / "out.jsonl"), "--batch-size", "5")
    found = answers(tmp_path / "out.jsonl")
    assert (code, out) == (0, f"{tmp_path / 'out.jsonl'}: 12 answered, 0 failed\n")
    assert found == alone(engine, Source(path))
    loaded = engine.loaded
    for row in mixed(pictures):
        places = row.get("images", [row["image"]] if "image" in row else [])
        shown = [Image.open(place) for place in places]
        parts = [*({"type": "image", "image": each} for each in shown), {"type": "text", "text": row["question"]}]
        inputs = loaded.processor.apply_chat_template(
            [{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        with foveate.get("prumerge+")(loaded.model) as session:
            told = loaded.model.generate(**inputs, do_sample=False, max_new_tokens=64)[0, inputs["input_ids"].shape[1] :]
        before, after = (session.report.before, session.report.after) if shown else ([], [])
        assert found[row["id"]] == {
            "id": row["id"],
            "row": found[row["id"]]["row"],
            "answer": loaded.processor.decode(told, skip_special_tokens=True).strip(),
            "finish_reason": "stop",
            "usage": {
                "prompt_tokens": inputs["input_ids"].shape[1] - sum(before) + sum(after),
                "completion_tokens": len(told),
                "pictures": [{"visual_tokens": a, "visual_tokens_before": b} for b, a in zip(before, after, strict=True)],
            },
        }
    assert foveate.engine.install.installed_on(loaded.model) is None


def test_rows_of_openai_and_rows_that_ask_for_something_else(pictures, tmp_path, engine):
    buffer = BytesIO()
    Image.open(pictures / "1.png").save(buffer, "PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTIONS[0]}]
    body = {"model": "gpt", "messages": [{"role": "user", "content": content}], "max_tokens": 9}
    file_url = [{"type": "image_url", "image_url": (pictures / "1.png").as_uri()}, {"type": "text", "text": QUESTIONS[0]}]
    (tmp_path / "1.png").write_bytes((pictures / "1.png").read_bytes())
    plain = {"image": "1.png", "question": QUESTIONS[0]}  # relative to the file
    documents = [
        {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body},
        {"custom_id": "b", "body": {"messages": [{"role": "user", "content": file_url}], "foveate": {"budget": 16}}},
        {"id": "c", **plain},
        {"id": "d", **plain, "budget": 16},
        {"id": "e", **plain, "method": "spatial", "budget": 0.25},
        {"id": "f", **plain, "method": "full", "max_new_tokens": 1},
        {"id": "g", **plain, "method": "fastv", "budget": 144},
        {"custom_id": "h", "body": {"messages": [{"role": "user", "content": QUESTIONS[0]}], "max_completion_tokens": 3}},
    ]
    found = alone(engine, Source(written(tmp_path, documents)))
    assert not [row for row in found.values() if "error" in row]
    strip = {name: {k: v for k, v in row.items() if k not in ("id", "row")} for name, row in found.items()}
    assert strip["a"] == strip["c"]
    assert strip["b"] == strip["d"]
    counts = {name: row["usage"]["pictures"] for name, row in found.items()}
    assert counts["d"] == [{"visual_tokens": 16, "visual_tokens_before": 576}]
    assert (counts["e"][0]["visual_tokens"], counts["f"][0]["visual_tokens"], counts["h"]) == (144, 576, [])
    assert (found["f"]["finish_reason"], found["f"]["usage"]["completion_tokens"]) == ("length", 1)


def test_failed_rows_are_written_and_change_no_others(pictures, tmp_path, engine, shared, capsys, monkeypatch):
    path, said = broken(pictures, tmp_path)
    hooks = white_is_nan(engine.loaded.model)
    code, out, _ = invoke(capsys, monkeypatch, "batch", str(path), str(tmp_path / "out.jsonl"))
    for hook in hooks:
        hook.remove()
    assert code == 0
    assert f"{GOOD} answered, {len(BAD)} failed (--retry-failed" in out
    found = answers(tmp_path / "out.jsonl")
    for name, message in said.items():
        assert found[name].keys() == {"id", "row", "error"}
        assert message in found[name]["error"]["message"]
        assert found[name]["error"]["type"].endswith("Error")
    clean = alone(engine, Source(written(tmp_path, mixed(pictures, GOOD), "clean.jsonl")))
    assert {name: row for name, row in found.items() if name not in said} == clean

    # what failed is answered again only if that is asked for
    monkeypatch.setattr(engines, "load", lambda name: pytest.fail("nothing is to be answered"))
    _, out, _ = invoke(capsys, monkeypatch, "batch", str(path), str(tmp_path / "out.jsonl"))
    assert f"{GOOD + len(BAD)} rows were there already" in out
    monkeypatch.setattr(engines, "load", lambda name: engine.loaded)
    (tmp_path / "missing.png").write_bytes((pictures / "0.png").read_bytes())
    _, out, _ = invoke(capsys, monkeypatch, "batch", str(path), str(tmp_path / "out.jsonl"), "--retry-failed")
    assert f"{GOOD + 3} answered, {len(BAD) - 3} failed" in out  # nothing spoils white pictures now
    again = answers(tmp_path / "out.jsonl")
    assert "answer" in again[2]
    assert {name: row for name, row in again.items() if name not in said} == clean


def test_a_killed_run_goes_on(pictures, tmp_path, engine, shared, capsys, monkeypatch):
    path, out = written(tmp_path, mixed(pictures, 60)), tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "foveate", "batch", str(path), str(out), "--batch-size", "2"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}) as process:
        end = time.monotonic() + 120
        while time.monotonic() < end and process.poll() is None and not (out.exists() and out.read_bytes().count(b"\n") >= 10):
            time.sleep(0.02)
        code, _, told = invoke(capsys, monkeypatch, "batch", str(path), str(out), "--batch-size", "2")
        assert code == 2
        assert "another run writes" in told
        process.send_signal(signal.SIGKILL)
    before = out.read_bytes()
    whole = before[: before.rindex(b"\n") + 1]
    there = whole.count(b"\n")
    assert 10 <= there < 60
    out.write_bytes(whole + b'{"id": "r59", "answer": "re')
    code, told, _ = invoke(capsys, monkeypatch, "batch", str(path), str(out), "--batch-size", "8")
    assert code == 0
    assert told == f"{out}: 60 answered, 0 failed, {there} rows were there already\n"
    assert out.read_bytes().startswith(whole)
    first = alone(engine, Source(written(tmp_path, mixed(pictures), "first.jsonl")))  # the others ask the same again
    found = answers(out)
    assert found == {f"r{n}": {**first[f"r{n % 12}"], "id": f"r{n}", "row": found[f"r{n}"]["row"]} for n in range(60)}
    assert len({row["row"] for row in found.values()}) == 60


def test_settings_of_a_resumed_run_must_be_the_same(pictures, tmp_path, shared, capsys, monkeypatch):
    path, out = written(tmp_path, mixed(pictures, 2)), tmp_path / "out.jsonl"
    base = ("batch", str(path), str(out))
    assert invoke(capsys, monkeypatch, *base)[0] == 0
    before = out.read_bytes()
    for options, said in (
        (("--budget", "16"), "budget None, now 16"),
        (("--method", "full"), "method 'prumerge+', now 'full'"),
        (("--max-new-tokens", "5"), "max_new_tokens 64, now 5"),
        (("--temperature", "0.5", "--seed", "3"), "seed 0, now 3; temperature 0.0, now 0.5"),
    ):
        code, _, told = invoke(capsys, monkeypatch, *base, *options)
        assert code == 2
        assert said in told
    monkeypatch.setattr(offline, "fingerprint", lambda model: "other weights")
    assert "now 'other weights'" in invoke(capsys, monkeypatch, *base)[2]
    monkeypatch.undo()
    assert invoke(capsys, monkeypatch, *base, "--batch-size", "1")[0] == 0
    assert out.read_bytes() == before
    # rows may be added
    written(tmp_path, mixed(pictures, 3))
    assert "3 answered, 0 failed, 2 rows were there already" in invoke(capsys, monkeypatch, *base)[1]
    assert out.read_bytes().startswith(before)


def test_what_is_refused_before_anything_runs(pictures, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(engines, "load", lambda name: pytest.fail("nothing is to be loaded"))
    out, good = tmp_path / "out.jsonl", written(tmp_path, mixed(pictures, 2))
    twice = written(tmp_path, [{"id": "a", "question": "q"}, {"id": "b", "question": "q"}, {"id": "a", "question": "r"}], "2.jsonl")
    number = written(tmp_path, [{"id": 2, "question": "q"}, {"question": "q"}], "n.jsonl")
    empty = written(tmp_path, ["", " "], "empty.jsonl")
    foreign = written(tmp_path, ["precious"], "foreign.jsonl")
    for arguments, said in (
        ((twice, out), "lines 1 and 3"),
        ((number, out), "line 2"),
        ((empty, out), "no rows"),
        ((tmp_path / "none.jsonl", out), "cannot be read"),
        ((good, good), "same file"),
        ((good, foreign), "no output of a batch"),
        ((good, tmp_path / "no" / "out.jsonl"), "cannot be written"),
        ((good, out, "--engine", "magic"), "no engine 'magic'"),
        ((good, out, "--method", "magic"), "magic"),
        ((good, out, "--method", "fastv", "--budget", "0.5", "--engine", "vllm"), "inside the language model"),
        ((good, out, "--model", str(tmp_path / "nowhere")), "there is no folder"),
        ((good, out, "--encoders", "2"), "--encoders is for --engine ray"),
        ((good, out, "--export", "x"), "--export is for --engine ray or vllm"),
        ((good, out, "--temperature", "inf"), "temperature"),
    ):
        code, _, told = invoke(capsys, monkeypatch, "batch", *map(str, arguments))
        assert code == 2, arguments
        assert said in told
    assert not out.exists()
    assert foreign.read_text() == "precious\n"
    assert not (tmp_path / "foreign.jsonl.settings.json").exists()
    # a line that is no row does not stand in the way of one that has its number as id
    lines = Source(written(tmp_path, [{"id": 2, "question": "q"}, "{", "", {"question": "q"}])).lines()
    assert [line.id for line in lines] == [2, "line 2", 4]


def test_output_of_something_else_is_kept(tmp_path):
    out, settings = tmp_path / "out.jsonl", {"method": "full"}
    with Output(out, settings) as output:
        output.add(
            [{"id": "a", "row": "x", "answer": "yes"}, {"id": "a", "row": "x", "answer": "no"}, {"id": 1, "row": "y", "error": {}}]
        )
    assert out.read_text().count("\n") == 2
    with Output(out, settings) as output:
        assert (output.answered, output.failed) == ({"a": "x"}, {1: "y"})
    beside = tmp_path / "out.jsonl.settings.json"
    told = beside.read_text()
    beside.write_text("{")
    with pytest.raises(InputError, match="does not say"):
        Output(out, settings)
    beside.write_text(told)
    out.write_text(out.read_text() + "no row\n")
    with pytest.raises(InputError, match="line 3"):
        Output(out, settings)


def test_drawn_answers_do_not_depend_on_their_batch(pictures, tmp_path, engine):
    source = Source(written(tmp_path, [{**row, "id": f"{row['id']} {n}"} for n in range(3) for row in mixed(pictures, 3)]))
    warm = AnswerSettings(temperature=2.0, max_new_tokens=4)

    def drawn(wanted: AnswerSettings, size: int) -> dict:
        return {row["id"]: row for batch in offline.answered(source, source.lines(), wanted, engine, size) for row in batch}

    found = drawn(warm, 8)
    assert found == drawn(warm, 2)
    assert found != drawn(AnswerSettings(temperature=2.0, max_new_tokens=4, seed=1), 8)
    assert len({found[f"r0 {n}"]["answer"] for n in range(3)}) > 1


def test_words_are_drawn_by_their_probability():
    wanted = AnswerSettings(temperature=0.5)
    asked = [rows.Row(number, [], wanted) for number in range(4000)]
    scores = torch.tensor([0.2, 0.3, 0.5]).log().expand(4000, 3) * 0.5
    found = engines.Drawing(asked)(torch.zeros(4000, 1), scores.clone()).argmax(-1)
    assert torch.bincount(found) / 4000 == pytest.approx([0.2, 0.3, 0.5], abs=0.03)


@pytest.mark.parametrize("heat", [5e-324, 1e-40, 1e-3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_next_to_no_heat_is_the_likeliest_word(heat, dtype):
    """Of scores that would be infinite if they were divided."""
    scores = torch.tensor([[11.0, 50.0, 52.0, -80.0], [-9.0, -7.0, -8.0, -torch.inf]], dtype=dtype)
    asked = [rows.Row(number, [], AnswerSettings(temperature=heat)) for number in range(2)]
    assert engines.Drawing(asked)(torch.zeros(2, 1), scores.clone()).argmax(-1).tolist() == [2, 1]


def test_no_row_generates_beyond_what_the_model_takes(engine, pictures, tmp_path, monkeypatch):
    """One that asks for a billion words and never ends would hold up the others."""
    asked, generate = [], engine.loaded.model.generate
    monkeypatch.setattr(
        engine.loaded.model, "generate", lambda **inputs: (asked.append(inputs["max_new_tokens"]), generate(**inputs))[1]
    )
    rows = [{**row, "max_new_tokens": 2**31 - 1} for row in mixed(pictures, 2)]
    assert all("answer" in row for row in alone(engine, Source(written(tmp_path, rows))).values())
    assert asked == [4096] * 2


@pytest.mark.parametrize("most", [1, 2 * 192 * 192])
@pytest.mark.parametrize("made", ["transformers", "vllm"])
def test_few_pictures_are_open_at_once(engine, exported, vllm, pictures, tmp_path, monkeypatch, most, made):
    """Large photos of many rows would need gigabytes; answers do not depend on it."""
    one = engine if made == "transformers" else VllmEngine("pocket", AnswerSettings(), exported)
    source = Source(written(tmp_path, [*mixed(pictures, 9), {"id": "bad", "image": "none.png", "question": "q"}]))
    wanted, held, there, stage = alone(engine, source), [], engines.opened, engines.through
    count = [0]

    def opening(row, reserved):
        found = there(row, reserved)
        count[0] += len(found.images)
        held.append(count[0])
        return found

    def passing(items, work):
        count[0] = 0
        return stage(items, work)

    monkeypatch.setattr(engines, "PIXELS", most)
    monkeypatch.setattr(engines, "opened", opening)
    monkeypatch.setattr(engines, "through", passing)
    found = {row["id"]: row for batch in offline.answered(source, source.lines(), AnswerSettings(), one, 10) for row in batch}
    assert found == wanted
    assert max(held) <= (2 if most == 1 else 3)


def test_a_word_for_pictures_in_two_parts(engine, tmp_path):
    text = [{"type": "text", "text": piece} for piece in ("what is <im", "age> ?")]
    found = alone(engine, Source(written(tmp_path, [{"id": 1, "body": {"messages": [{"role": "user", "content": text}]}}])))
    assert "holds '<image>'" in found[1]["error"]["message"]


def test_a_device_that_has_stopped_ends_the_run(engine, monkeypatch, tmp_path, pictures):
    def stopped(*_, **__):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(engine.loaded.model, "generate", stopped)
    with pytest.raises(EngineError, match="illegal memory"):
        alone(engine, Source(written(tmp_path, mixed(pictures, 2))))


# -- rows that change


def run(capsys, monkeypatch, path, out, *options):
    code, said, told = invoke(capsys, monkeypatch, "batch", str(path), str(out), *options)
    return code, said + told


def test_another_file_is_not_given_the_answers_of_the_first(shared, pictures, tmp_path, capsys, monkeypatch):
    """Neither by line number nor by id; nor the same lines in a folder of other pictures."""
    one = written(tmp_path, [{"image": str(pictures / "0.png"), "question": "what color is the star ?"}], "1.jsonl")
    two = written(tmp_path, [{"image": str(pictures / "1.png"), "question": "how many objects are there ?"}], "2.jsonl")
    out = tmp_path / "out.jsonl"
    assert run(capsys, monkeypatch, one, out)[0] == 0
    before = out.read_bytes()
    code, told = run(capsys, monkeypatch, two, out)
    assert code == 2
    assert "are those to other rows" in told
    assert out.read_bytes() == before
    folders = [tmp_path / name for name in ("a", "b")]
    for number, folder in enumerate(folders):
        folder.mkdir()
        (folder / "x.png").write_bytes((pictures / f"{number}.png").read_bytes())
        written(folder, [{"id": "x", "image": "x.png", "question": "what color is the star ?"}])
    assert run(capsys, monkeypatch, folders[0] / "questions.jsonl", tmp_path / "x.jsonl")[0] == 0
    assert run(capsys, monkeypatch, folders[1] / "questions.jsonl", tmp_path / "x.jsonl")[0] == 2


@pytest.mark.parametrize("how", ["question", "picture", "broken before"])
def test_rows_that_were_edited_are_asked_again(shared, engine, pictures, tmp_path, capsys, monkeypatch, how):
    """Only these; the others keep their answers, and ids are there once."""
    (tmp_path / "own.png").write_bytes((pictures / "0.png").read_bytes())
    rows = mixed(pictures, 5)
    rows.append({"id": "own", "image": "own.png", "question": QUESTIONS[0]} if how != "broken before" else "{")
    path, out = written(tmp_path, rows), tmp_path / "out.jsonl"
    assert run(capsys, monkeypatch, path, out)[0] == 0
    before = answers(out)
    if how == "question":
        rows[1]["question"] = "is there a green ring ?"
        written(tmp_path, rows)
        changed = "r1"
    elif how == "picture":
        (tmp_path / "own.png").write_bytes((pictures / "2.png").read_bytes())
        changed = "own"
    else:
        rows[-1] = {"question": QUESTIONS[1]}
        written(tmp_path, rows)
        changed = 6
    code, said = run(capsys, monkeypatch, path, out)
    assert code == 0
    assert "1 rows have changed" in said
    after = answers(out)
    assert after[changed] == alone(engine, Source(path))[changed]
    assert {name: row for name, row in after.items() if name != changed} == {
        name: row for name, row in before.items() if name in after and name != changed
    }
    assert run(capsys, monkeypatch, path, out)[0] == 0
    assert answers(out) == after


def test_a_file_that_changes_while_it_is_answered(engine, pictures, tmp_path):
    """Sorted anew in between: no answer is written under the id of another row, and the same command goes on."""
    rows = mixed(pictures, 6)
    path = written(tmp_path, rows)
    source = Source(path)
    lines, found = source.lines(), []
    running = offline.answered(source, lines, AnswerSettings(), engine, 2)
    found += next(running)
    written(tmp_path, rows[::-1])
    with pytest.raises(rows_module.ChangedError, match=r"line \d is another one than at the beginning"):
        found += [row for batch in running for row in batch]
    wanted = alone(engine, Source(written(tmp_path, rows)))
    assert 0 < len(found) < 6
    assert all(row == wanted[row["id"]] for row in found)
    path.unlink()
    with pytest.raises(rows_module.ChangedError, match="can no longer be read"):
        source.read(lines[0], AnswerSettings())


def test_dropping_keeps_links_and_rights(shared, pictures, tmp_path, capsys, monkeypatch):
    """``--retry-failed`` writes the file anew where it is, with the rights that it had."""
    real = tmp_path / "elsewhere" / "answers.jsonl"
    real.parent.mkdir()
    out = tmp_path / "out.jsonl"
    out.symlink_to(real)
    path = written(tmp_path, [{"id": "good", "question": "what is a star ?"}, {"id": "bad", "image": "no.png", "question": "q"}])
    assert run(capsys, monkeypatch, path, out)[0] == 0
    real.chmod(0o600)
    assert run(capsys, monkeypatch, path, out, "--retry-failed")[0] == 0
    assert out.is_symlink()
    assert oct(real.stat().st_mode & 0o777) == "0o600"
    assert set(answers(out)) == {"good", "bad"}
