"""The registry of batch engines: one that is defined is one that the command line takes."""

import json

import pytest

from foveate.errors import InputError
from foveate.methods.saved import dumped
from foveate.pocket import load_pocket
from foveate.serving.batch import base
from foveate.serving.batch.base import Answered, BatchEngine, batch_engine, batch_engines
from foveate.serving.batch.offline import answered, settings
from foveate.serving.batch.rows import AnswerSettings
from tests.cli.test_main import invoke
from tests.trained_methods import Learnt

from .asked import mixed, written


@pytest.fixture
def echo():
    batch_engines()

    class Echo(BatchEngine, name="echo", rows=3, options=("address",)):
        """Says what it was asked."""

        sizes = []  # noqa: RUF012

        def check(self, wanted):
            if wanted.method == "fastv":
                raise InputError("echo hears no fastv")

        def start(self, job):
            self.address = job.options["address"]
            return answered(job.source, job.lines, job.wanted, self, job.size)

        def answer(self, rows):
            Echo.sizes.append(len(rows))
            return [Answered(f"{self.address}: {row.messages[-1]['content'][-1]['text']}", True, 1, 1, [], []) for row in rows]

    yield Echo
    del base.REGISTRY["echo"]


def test_a_new_engine_answers(echo, pictures, tmp_path, capsys, monkeypatch):
    path, out = written(tmp_path, mixed(pictures, 6)), tmp_path / "out.jsonl"
    options = ("--engine", "echo", "--address", "here")
    code, said, _ = invoke(capsys, monkeypatch, "batch", str(path), str(out), *options)
    assert code == 0
    assert "6 answered, 0 failed" in said
    asked = [json.loads(line) for line in path.read_text().splitlines()]
    found = {row["id"]: row["answer"] for row in map(json.loads, out.read_text().splitlines())}
    assert all(answer.startswith("here: ") for answer in found.values())
    assert len(found) == len(asked)
    assert max(echo.sizes) == 3
    assert json.loads((tmp_path / "out.jsonl.settings.json").read_text())["engine"] == "echo"


def test_what_engines_refuse(echo, pictures, tmp_path, capsys, monkeypatch):
    path = written(tmp_path, mixed(pictures, 1))
    for options, message in (
        (("--engine", "echo", "--method", "fastv"), "echo hears no fastv"),
        (("--engine", "echo", "--export", "x"), "--export is for --engine ray or vllm, and this is echo"),
        (("--engine", "transformers", "--address", "x"), "--address is for --engine echo or ray"),
        (("--engine", "nothing"), "there is no engine 'nothing'; choose echo, ray, transformers, vllm"),
    ):
        code, _, told = invoke(capsys, monkeypatch, "batch", str(path), str(tmp_path / "out.jsonl"), *options)
        assert code == 2
        assert message in told


def test_names_are_unique(echo):
    with pytest.raises(InputError, match="'ray' is already registered"):

        class Other(BatchEngine, name="ray", rows=1):
            pass

    assert isinstance(batch_engine("echo", {"address": None, "export": None}), echo)
    with pytest.raises(TypeError, match="does not implement"):
        BatchEngine.start(batch_engine("echo", {}), None)
    assert {name: engine.answers for name, engine in batch_engines().items() if name != "echo"} == {
        "transformers": "transformers",
        "vllm": "vllm",
        "ray": "vllm",
    }
    for engine in batch_engines().values():
        if engine is not echo:
            with pytest.raises(InputError, match="unknown method 'magic'"):
                engine().check(AnswerSettings("magic"))


def test_other_weights_of_a_method_are_other_settings(tmp_path):
    """In the same folder: answers of both would be in one file without a word."""
    model, found = load_pocket()[0], []
    for seed in (1, 2):
        method = Learnt().fresh(seed)
        with method(model):
            method.save_pretrained(tmp_path / "weights")
        wanted = AnswerSettings("learnt", config=dumped(Learnt(weights=str(tmp_path / "weights"))))
        found.append(settings("pocket", wanted, batch_engine("transformers", {})))
    assert found[0].pop("method.weights") != found[1].pop("method.weights")
    assert found[0] == found[1]
