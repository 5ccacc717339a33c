"""Every command that loads a model takes the same names for it, and refuses the others in the same words."""

import json
import shutil

import pytest
from PIL import Image

from foveate import loading
from foveate.errors import InputError
from foveate.lab import runner
from foveate.pocket import ADAPTERS, WEIGHTS
from foveate.serving import export
from foveate.serving.batch import engines

from .test_main import invoke

BOUND = {
    loading: ("load", "load_encoder"),
    runner: ("load",),
    export: ("load",),
    engines: ("load",),
}


@pytest.fixture
def commands(tmp_path):
    """Of each command a call that comes to load a model."""
    picture, rows, examples = tmp_path / "a.png", tmp_path / "rows.jsonl", tmp_path / "examples.jsonl"
    Image.new("RGB", (64, 64), "white").save(picture)
    rows.write_text(json.dumps({"question": "what ?"}) + "\n")
    examples.write_text(json.dumps({"image": "a.png", "question": "what ?", "answer": "a star"}) + "\n")
    return {
        "ask": (str(picture), "what is it ?"),
        "demo": ("--folder", str(tmp_path / "demo")),
        "bench": (),
        "search": (str(tmp_path / "plan.json"), "--data", str(examples)),
        "compare": ("--methods", "random", "--budgets", "64", "--store", str(tmp_path / "store.jsonl")),
        "batch": (str(rows), str(tmp_path / "out.jsonl")),
        "eval": ("--limit", "1"),
        "serve": ("--vllm-url", "http://127.0.0.1:9"),
        "export": (str(tmp_path / "text"),),
    }


@pytest.mark.parametrize("command", ["ask", "demo", "bench", "search", "compare", "batch", "eval", "serve", "export"])
@pytest.mark.parametrize("name", ["pocket", "pocket+prumerge", "folder", "someone/model"])
def test_every_command_hands_the_name_to_the_one_loader(commands, command, name, tmp_path, capsys, monkeypatch):
    if command == "eval":
        pytest.importorskip("lmms_eval")
    if (command, name) == ("batch", "someone/model"):
        pytest.skip("its files are looked up first, as answers depend on them")
    asked = []

    def load(name, **_):
        asked.append(name)
        raise InputError("it came to the loader")

    for module, functions in BOUND.items():
        for function in functions:
            monkeypatch.setattr(module, function, load)
    if name == "folder":
        name = str(shutil.copytree(WEIGHTS, tmp_path / "mine"))
    arguments = commands[command]
    where = (name, *arguments) if command == "export" else (*arguments, "--model", name)
    code, _, told = invoke(capsys, monkeypatch, command, *where)
    assert "it came to the loader" in told
    assert code == 2
    assert asked == [name]


@pytest.mark.parametrize("command", ["ask", "demo", "bench", "search", "compare", "batch", "eval", "serve", "export", "cost"])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pocket+nonsense", "there is no model 'pocket+nonsense'. Shipped are pocket, pocket-qwen, pocket+"),
        ("./nowhere", "there is no "),
    ],
)
def test_names_that_are_nothing(commands, command, name, message, capsys, monkeypatch):
    if command == "eval":
        pytest.importorskip("lmms_eval")
    arguments = {**commands, "cost": ()}[command]
    where = (name, *arguments) if command in ("export", "cost") else (*arguments, "--model", name)
    code, _, told = invoke(capsys, monkeypatch, command, *where)
    assert code == 2
    assert message in told
    assert len(told.strip().splitlines()) == 1


@pytest.mark.parametrize("name", ["pocket", "pocket+prumerge", "folder", "adapter"])
def test_what_the_loader_gives(name, tmp_path):
    """The same model by each of its names."""
    if name == "folder":
        name = str(shutil.copytree(WEIGHTS, tmp_path / "mine"))
    elif name == "adapter":
        name = str(shutil.copytree(ADAPTERS / "prumerge", tmp_path / "adapter"))
    loaded = loading.load(name, dtype="float32")  # which the shipped one is loaded as; its files hold bfloat16
    same = loading.load("pocket+prumerge" if loading.is_adapter(name) else "pocket")
    assert loaded.weights == same.weights
    assert loaded.processor.tokenizer.padding_side == "left"
    assert not loaded.model.training
    without = loading.load_encoder(name)
    assert len(without.model.model.language_model.layers) == 0
