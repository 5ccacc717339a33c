"""``foveate batch``: each row once, whatever happens, with the answers that the rows get alone."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import time
from io import BytesIO
from pathlib import Path
from random import Random
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer

import foveate
from foveate.errors import FoveateError, InputError, MissingExtraError
from foveate.pocket.scenes import draw_scene
from foveate.serving import engines, files, offline, rows, vllm_engine
from foveate.serving.encoding import EncodedPrompt
from foveate.serving.engines import EngineError, TransformersEngine
from foveate.serving.export import export
from foveate.serving.ray_batch import Cluster, EncoderActor, EngineActor, answered_by_ray, shares
from foveate.serving.results import Output
from foveate.serving.rows import Source, Wanted
from foveate.serving.vllm_engine import MissingEngineError, Ready, VllmEngine

from .test_cli import invoke

QUESTIONS = ("what color is the star ?", "how many objects are there ?", "is there a red circle ?")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """A folder of scenes, with a white picture."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(4):
        Image.fromarray(draw_scene(Random(number), split="test", level=number % 3).image).save(folder / f"{number}.png")
    Image.new("RGB", (192, 192), "white").save(folder / "white.png")
    return folder


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "text"
    export("pocket", folder)
    return folder


@pytest.fixture(scope="module")
def engine() -> TransformersEngine:
    return TransformersEngine("pocket", Wanted())


@pytest.fixture
def shared(monkeypatch, engine):
    """The command line with a model that is loaded once."""
    monkeypatch.setattr(engines, "load", lambda name: engine.loaded)


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


def alone(engine, source: Source, wanted: Wanted | None = None) -> dict:
    """Rows of the output when each row is a batch."""
    found = offline.answered(source, source.lines(), wanted or Wanted(), engine, 1)
    return {row["id"]: row for batch in found for row in batch}


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
    strip = {name: {k: v for k, v in row.items() if k != "id"} for name, row in found.items()}
    assert strip["a"] == strip["c"]
    assert strip["b"] == strip["d"]
    counts = {name: row["usage"]["pictures"] for name, row in found.items()}
    assert counts["d"] == [{"visual_tokens": 16, "visual_tokens_before": 576}]
    assert (counts["e"][0]["visual_tokens"], counts["f"][0]["visual_tokens"], counts["h"]) == (144, 576, [])
    assert (found["f"]["finish_reason"], found["f"]["usage"]["completion_tokens"]) == ("length", 1)


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
        assert found[name].keys() == {"id", "error"}
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
    assert answers(out) == {f"r{n}": {**first[f"r{n % 12}"], "id": f"r{n}"} for n in range(60)}


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
        ((good, out, "--model", str(tmp_path / "nowhere")), "cannot be found"),
        ((good, out, "--encoders", "2"), "--encoders is for --engine ray"),
        ((good, out, "--export", "x"), "--export is for --engine vllm or ray"),
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
        output.add([{"id": "a", "answer": "yes"}, {"id": "a", "answer": "no"}, {"id": 1, "error": {}}])
    assert out.read_text().count("\n") == 2
    with Output(out, settings) as output:
        assert (output.answered, output.failed) == ({"a"}, {1})
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
    warm = Wanted(temperature=2.0, max_new_tokens=4)

    def drawn(wanted: Wanted, size: int) -> dict:
        return {row["id"]: row for batch in offline.answered(source, source.lines(), wanted, engine, size) for row in batch}

    found = drawn(warm, 8)
    assert found == drawn(warm, 2)
    assert found != drawn(Wanted(temperature=2.0, max_new_tokens=4, seed=1), 8)
    assert len({found[f"r0 {n}"]["answer"] for n in range(3)}) > 1


def test_words_are_drawn_by_their_probability():
    wanted = Wanted(temperature=0.5)
    asked = [rows.Row(number, [], wanted) for number in range(4000)]
    scores = torch.tensor([0.2, 0.3, 0.5]).log().expand(4000, 3) * 0.5
    found = engines.Drawing(asked)(torch.zeros(4000, 1), scores.clone()).argmax(-1)
    assert torch.bincount(found) / 4000 == pytest.approx([0.2, 0.3, 0.5], abs=0.03)


def test_a_device_that_has_stopped_ends_the_run(engine, monkeypatch, tmp_path, pictures):
    def stopped(*_, **__):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(engine.loaded.model, "generate", stopped)
    with pytest.raises(EngineError, match="illegal memory"):
        alone(engine, Source(written(tmp_path, mixed(pictures, 2))))


# -- vLLM, with a module of that name which answers as transformers does


class FakeLLM:
    """Greedy answers of an export to mixed prompts; refuses a word, breaks at another, and does not finish a third."""

    def __init__(self, model: str, dtype: str, enable_prompt_embeds: bool):
        assert enable_prompt_embeds
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.calls, self.left = [], False
        self.llm_engine = SimpleNamespace(
            model_config=SimpleNamespace(max_model_len=4096), has_unfinished_requests=lambda: self.left
        )

    def generate(self, prompts, options, use_tqdm):
        assert not use_tqdm
        assert len(prompts) == len(options)
        self.calls.append(len(prompts))
        return [self.one(prompt, option) for prompt, option in zip(prompts, options, strict=True)]

    def one(self, prompt, option):
        ids = torch.tensor([prompt["prompt_token_ids"]])
        words = self.tokenizer.convert_ids_to_tokens(ids[0])
        if "king" in words:
            raise ValueError("a prompt that is refused")
        if "wing" in words:
            raise RuntimeError("out of order")
        embeds = self.model.get_input_embeddings()(ids)
        if "prompt_embeds" in prompt:
            known = torch.tensor(prompt["prompt_is_token_ids"])
            given = prompt["prompt_embeds"]
            assert given.shape == embeds.shape[1:]
            assert not given[known].any()
            embeds = torch.where(known[:, None], embeds[0], given)[None]
        out = self.model.generate(inputs_embeds=embeds, do_sample=False, max_new_tokens=option.max_tokens)[0].tolist()
        text = self.tokenizer.decode(out, skip_special_tokens=True)
        reason = "abort" if "moon" in words else "stop" if out[-1] == self.model.generation_config.eos_token_id else "length"
        return SimpleNamespace(outputs=[SimpleNamespace(text=text, token_ids=out, finish_reason=reason)])


@pytest.fixture
def vllm(monkeypatch):
    module = ModuleType("vllm")
    module.LLM, module.SamplingParams = FakeLLM, SimpleNamespace
    monkeypatch.setitem(sys.modules, "vllm", module)
    for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_LOGGING_LEVEL"):
        monkeypatch.setenv(name, "0")
    return module


def test_vllm_answers_as_transformers(vllm, exported, pictures, tmp_path, engine, capsys, monkeypatch):
    path = written(tmp_path, mixed(pictures))
    options = ("--engine", "vllm", "--export", str(exported))
    code, out, _ = invoke(capsys, monkeypatch, "batch", str(path), str(tmp_path / "out.jsonl"), *options)
    assert code == 0
    assert "12 answered, 0 failed" in out
    assert answers(tmp_path / "out.jsonl") == alone(engine, Source(path))
    told = json.loads((tmp_path / "out.jsonl.settings.json").read_text())
    assert (told["engine"], told["model"], told["method"], told["budget"]) == ("vllm", "pocket", "prumerge+", None)


def test_vllm_and_failed_rows(vllm, exported, pictures, tmp_path, engine):
    path, said = broken(pictures, tmp_path)
    made = VllmEngine("pocket", Wanted(), exported)
    white_is_nan(made.encoder.encoder.loaded.model)
    source = Source(path)
    found = {row["id"]: row for batch in offline.answered(source, source.lines(), Wanted(), made, 64) for row in batch}
    for name, message in said.items():
        assert message.replace("NaN", "not finite") in found[name]["error"]["message"]
    clean = alone(engine, Source(written(tmp_path, mixed(pictures, GOOD), "clean.jsonl")))
    assert {name: row for name, row in found.items() if name not in said} == clean
    # prompts go in one call, but for those of batches with another method
    assert made.text.model.calls[0] > 4


def test_vllm_refuses_or_stops(vllm, exported, pictures, tmp_path):
    made = VllmEngine("pocket", Wanted(), exported)
    documents = [{"id": word, "question": f"what is a {word} ?"} for word in ("star", "king", "ring", "moon")]
    found = alone_in_one(made, Source(written(tmp_path, documents)))
    assert found["king"]["error"] == {"type": "ValueError", "message": "a prompt that is refused"}
    assert "answer" in found["star"]
    assert "answer" in found["ring"]
    assert "abort" in found["moon"]["error"]["message"]
    made.text.model.left = True
    with pytest.raises(EngineError, match="vLLM has stopped"):
        alone_in_one(made, Source(tmp_path / "questions.jsonl"))
    with pytest.raises(EngineError, match="out of order"):
        alone_in_one(made, Source(written(tmp_path, [{"question": "what is a wing ?"}])))


def alone_in_one(engine, source: Source) -> dict:
    return {row["id"]: row for batch in offline.answered(source, source.lines(), Wanted(), engine, 64) for row in batch}


def test_vllm_that_is_missing_or_broken(monkeypatch, exported, vllm, tmp_path):
    def no_memory(**_):
        raise RuntimeError("no memory")

    vllm.LLM = no_memory
    with pytest.raises(EngineError, match="does not start: no memory"):
        vllm_engine.TextEngine(exported)
    with pytest.raises(InputError, match="no export"):
        vllm_engine.TextEngine(tmp_path)
    monkeypatch.delitem(sys.modules, "vllm")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(MissingEngineError, match="pip install vllm"):
        vllm_engine.TextEngine(exported)
    (tmp_path / "vllm.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    with pytest.raises(EngineError, match="cannot be imported: operator"):
        vllm_engine.TextEngine(exported)


def test_prompts_travel_as_bytes():
    embeds = [torch.randn(3, 4).bfloat16(), torch.randn(1, 4).bfloat16()]
    prompt = EncodedPrompt([1, 4, 4, 4, 7, 4], [False, True, True, True, False, True], embeds, [9, 9])
    found = Ready.unpacked(Ready(prompt, 5, 0.3, 2**60 - 1).packed())
    assert (found.prompt.ids, found.prompt.visual, found.prompt.before) == (prompt.ids, prompt.visual, prompt.before)
    assert (found.max_new_tokens, found.temperature, found.seed) == (5, 0.3, 2**60 - 1)
    assert all(torch.equal(a, b) for a, b in zip(found.prompt.embeds, embeds, strict=True))
    assert [each.dtype for each in found.prompt.embeds] == [torch.bfloat16] * 2
    text = Ready(EncodedPrompt([1, 2], [False, False], [], []), 5, 0.0, 0)
    assert Ready.unpacked(text.packed()) == text


def test_actors_hand_on_what_fails(vllm, exported, pictures, tmp_path, engine):
    source = Source(written(tmp_path, [*mixed(pictures, 6), "{", {"question": "q", "method": "magic"}]))
    lines = source.lines()
    places = {
        "number": np.array([line.number for line in lines]),
        "id": np.array([json.dumps(line.id) for line in lines], dtype=object),
        "start": np.array([line.start for line in lines]),
    }
    encoded = EncoderActor(source.path, "pocket", Wanted())(places)
    sent = {name: np.array(values, dtype=object) for name, values in encoded.items()}
    assert sum(map(len, sent["prompt"])) > 6 * 150 * 192 * 4  # the embeddings
    found = [json.loads(row) for row in EngineActor(exported)(sent)["row"]]
    assert {row["id"]: row for row in found} == alone(engine, source)
    assert sum("error" in row for row in found) == 2


def test_ray_that_is_missing(monkeypatch, pictures, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    source = Source(written(tmp_path, mixed(pictures, 2)))
    with pytest.raises(MissingExtraError, match=r"foveate\[ray\]"):
        next(answered_by_ray(source, source.lines(), Wanted(), "pocket", tmp_path, 8, Cluster()))


def test_gpus_of_actors():
    assert shares({"CPU": 8.0}, Cluster(2, 2)) == (0, 0)
    assert shares({"CPU": 64.0, "GPU": 8.0}, Cluster(2, 6)) == (1, 1)
    assert shares({"CPU": 64.0, "GPU": 8.0}, Cluster(3, 6)) == (0.5, 1)  # two and one
    assert shares({"CPU": 64.0, "GPU": 2.0}, Cluster(1, 2)) == (0, 1)  # encoders on CPUs
    for resources, said in (({"CPU": 3.0}, "3 CPUs"), ({"CPU": 9.0, "GPU": 1.0}, "1 GPUs")):
        with pytest.raises(FoveateError, match=said):
            shares(resources, Cluster(2, 2))


def test_fingerprints_of_models(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(bytes(3 * files.CHUNK * files.CHUNKS))
    first = offline.fingerprint(str(tmp_path))
    (tmp_path / "notes.md").write_text("notes")
    assert offline.fingerprint(str(tmp_path)) == first
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.write(b"other")
    second = offline.fingerprint(str(tmp_path))
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    third = offline.fingerprint(str(tmp_path))
    (base / "config.json").write_text("[]")
    assert len({first, second, third, offline.fingerprint(str(tmp_path)), offline.fingerprint("pocket")}) == 5
