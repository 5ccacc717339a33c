"""Files of JSON that are damaged, or made to harm: every loader has an error of its own for them."""

from __future__ import annotations

import os

import pytest

import foveate
from foveate.cli.cost import _reported
from foveate.evaluation.local import _json, _lines
from foveate.jsonl import parsed
from foveate.lab.own import read_examples
from foveate.lab.store import Store
from foveate.loading import base_of
from foveate.methods.g_search import read_plan
from foveate.methods.weights import CONFIG, Weights
from foveate.methods.yopo import read_heads
from foveate.serving.batch.results import Output
from foveate.serving.batch.rows import Source
from foveate.serving.export import MARK, described
from foveate.serving.files import fingerprint

LOADERS = {  # the name of the file, and what reads it
    "plan": ("plan.json", read_plan),
    "head mask": ("heads.json", read_heads),
    "weights": (CONFIG, lambda path: Weights(str(path.parent))),
    "store": ("store.jsonl", lambda path: Store(path, {})),
    "examples": ("examples.jsonl", lambda path: read_examples(path, None)),
    "export": (MARK, lambda path: described(path.parent)),
    "adapter": ("adapter_config.json", lambda path: base_of(path.parent)),
    "model": ("adapter_config.json", lambda path: foveate.loading.load(str(path.parent))),
    "fingerprint": ("adapter_config.json", lambda path: fingerprint(str(path.parent))),
    "report": ("report.json", lambda path: _reported(path, None, None)),
    "benchmark": ("problems.json", _json),
    "benchmark of lines": ("pope.json", _lines),
    "questions": ("questions.jsonl", lambda path: Source(path).lines()),
    "answers": ("answers.jsonl", lambda path: Output(path, {})),
}
BAD = {
    "deep list": b"[" * 200_000,
    "deep object": b'{"a":' * 200_000,
    "deep in its place": b'{"rates": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "no UTF-8": b"\xff\xfe\x00\x01",
    "long number": b'{"rates": [' + b"1" * 100_000 + b"]}",
    "cut off": b'{"rates": [0.1,',
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("loader", LOADERS)
def test_damaged_json(tmp_path, loader, bad):
    name, load = LOADERS[loader]
    (tmp_path / name).write_bytes(BAD[bad] + b"\n")
    (tmp_path / "answers.jsonl.settings.json").write_text("{}")
    with pytest.raises(foveate.FoveateError) as error:
        load(tmp_path / name)
    assert len(str(error.value)) < 1000


def test_an_adapter_of_itself(tmp_path):
    (tmp_path / "adapter_config.json").write_text(f'{{"base_model_name_or_path": "{tmp_path}"}}')
    for load in (fingerprint, foveate.loading.load):
        with pytest.raises(foveate.InputError, match="names itself"):
            load(str(tmp_path))


def test_examples_in_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "examples.jsonl")
    with pytest.raises(foveate.InputError, match="is a pipe, a device or a socket"):
        read_examples(tmp_path / "examples.jsonl", None)


def test_what_is_deep_but_no_harm():
    assert parsed("[" * 50 + "]" * 50)
    with pytest.raises(ValueError, match="nested too deeply"):
        parsed("[" * 200_000)


def test_a_name_that_is_there_twice():
    with pytest.raises(ValueError, match="the name 'a' is there twice"):
        parsed('{"b": {"a": 1, "c": 2, "a": 1}}')
    assert parsed('[{"a": 1}, {"a": 2}]') == [{"a": 1}, {"a": 2}]


def test_whole_numbers_that_no_float_can_be_are_refused():
    assert parsed("1" + "0" * 308) == 10**308
    for text in ("1" + "0" * 309, "-1" + "0" * 309, '[1, {"a": 1' + "0" * 400 + "}]"):
        with pytest.raises(ValueError, match="too large a number"):
            parsed(text)
