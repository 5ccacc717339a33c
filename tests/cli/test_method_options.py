"""Methods of any kind on the command line: --set, --config, --import, files instead of names."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest
import torch
from PIL import Image

import foveate
from foveate.cli.common import asked_of, method_of, methods_of
from foveate.errors import InputError
from foveate.methods import registry
from foveate.methods.saved import named
from foveate.pocket.scenes import draw_scene

from .. import zoo
from .test_main import invoke, run

MINE = '''
from dataclasses import dataclass

import torch

import foveate
from foveate.tokens import resolve_budget


@dataclass(kw_only=True)
class {0}(foveate.ProjectorReducer, name="{1}", adaptive=False):
    """Every n-th token."""

    step: int = 1

    def reduce(self, tokens):
        count = resolve_budget(self.budget, tokens.number)
        index = torch.arange(count, device=tokens.features.device) * self.step
        return foveate.Reduction(index.expand(len(tokens.features), -1))
'''


@pytest.fixture(autouse=True)
def _same_environment(monkeypatch):
    monkeypatch.setenv(registry.IMPORTS, "")
    yield
    for name in ("mine", "mine-too"):
        registry.REGISTRY.pop(name, None)


@pytest.fixture
def mine(tmp_path) -> Path:
    file = tmp_path / "mine.py"
    file.write_text(MINE.format("Mine", "mine"))
    return file


@pytest.fixture
def scene(tmp_path) -> str:
    Image.fromarray(draw_scene(Random(4), split="test", level=1).image).save(tmp_path / "scene.png")
    return str(tmp_path / "scene.png")


def test_fields(tmp_path):
    assert (
        method_of("prumerge:released", None, ["k=8", "budget=40"]).settings()
        == foveate.get("prumerge:released", k=8, budget=40).settings()
    )
    assert method_of(None, "9").settings() == foveate.PruMergePlus(budget=9).settings()
    foveate.Compose(foveate.PruMerge(), foveate.FastV(budget=0.5)).save(tmp_path / "both.json")
    both = method_of(None, "20", None, tmp_path / "both.json")
    assert [part.budget for part in both.methods] == [20, 0.5]
    foveate.PruMerge.released().save(tmp_path / "one.json")
    for name, config in ((None, tmp_path / "one.json"), (str(tmp_path / "one.json"), None)):
        assert method_of(name, None, ["k=3"], config).settings() == foveate.PruMerge.released(k=3).settings()
    assert list(methods_of(["prumerge"], None, None, [tmp_path / "both.json"])) == ["prumerge", "both"]
    assert method_of("quecc", None, ["reader=none"]).reader == "none"  # one of its words, and not that there is none
    assert method_of("quecc", None, ["stride=none"]).stride is None


@pytest.mark.parametrize(
    ("given", "match"),
    [
        (("prumerge", None, ["k"]), "expected NAME=VALUE"),
        (("prumerge", None, ["=3"]), "expected NAME=VALUE"),
        (("prumerge", None, ["k=3", "k=4"]), "given twice"),
        (("prumerge", "9", ["budget=4"]), "Leave one out"),
        (("prumerge", None, ["kk=3"]), "no field 'kk'"),
        (("prumerge", None, ["k=three"]), "expected a whole number"),
        (("prumerge", None, None, Path("x.json")), "both name a method"),
        (("frumerge", None, None), "did you mean 'prumerge'"),
        (("absent.json", None, None), "cannot be read"),
    ],
)
def test_what_is_wrong_is_said(given, match):
    with pytest.raises(InputError, match=match):
        method_of(*given)
    with pytest.raises(InputError, match=match):
        named(*asked_of(given[0], given[1], given[2], given[3] if len(given) > 3 else None))


def test_other_processes_get_the_same_method(tmp_path):
    assert asked_of("prumerge", "0.25", None, None) == ("prumerge", 0.25, "")
    name, budget, config = asked_of("prumerge", "0.25", ["k=4"], None)
    assert (name, budget) == ("prumerge", None)
    assert named(name, budget, config).settings() == foveate.PruMerge(budget=0.25, k=4).settings()


def test_files_with_methods(mine, scene, tmp_path, capsys, monkeypatch):
    given = ("--import", str(mine), "--method", "mine", "--budget", "9", "--set", "step=3", "--json")
    code, out, err = invoke(capsys, monkeypatch, "ask", scene, "what color is the star ?", *given)
    assert code == 0, err
    assert [image["kept"] for image in json.loads(out)["kept"]] == [list(range(0, 27, 3))]
    assert str(mine) in registry.os.environ[registry.IMPORTS]
    code, _, err = invoke(capsys, monkeypatch, "methods", "--import", str(tmp_path / "none.py"))
    assert code == 2
    assert "is no Python file" in err
    (tmp_path / "broken.py").write_text("import foveate\n1 / 0\n")
    code, _, err = invoke(capsys, monkeypatch, "methods", "--import", str(tmp_path / "broken.py"))
    assert code == 2
    assert "ZeroDivisionError" in err


def test_a_batch_with_a_method_of_a_file(mine, scene, tmp_path):
    """A process of its own, whose settings tell all fields; a row may still name another method, and none may give fields."""
    rows = [{"image": scene, "question": "what color is the star ?"}, {"image": scene, "question": "what ?", "method": "prumerge"}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = ["batch", str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"), "--import", str(mine), "--method", "mine"]
    done = run(*asked, "--budget", "16", "--set", "step=2")
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    kept = [row["usage"]["pictures"][0]["visual_tokens"] for row in found]
    assert kept[0] == 16
    assert kept[1] != 16
    other = run(*asked, "--budget", "16", "--set", "step=3")
    assert other.returncode == 2
    assert "method.step 2, now 3" in other.stderr
    mine.write_text(mine.read_text().replace("* self.step", "* (self.step + 1)"))
    changed = run(*asked, "--budget", "16", "--set", "step=2")
    assert changed.returncode == 2
    assert "method.code" in changed.stderr, "the answers of two codes never stand in one file"


# -- what a method of somebody else's forgets


def test_classes_that_are_no_dataclasses():
    class Forgotten(foveate.ProjectorReducer):
        step: int = 2

    class Changed(foveate.ProjectorReducer):
        budget = 16

    class Fine(foveate.PruMerge):
        calls = 0

        def helper(self): ...

    for cls, field in ((Forgotten, "step"), (Changed, "budget")):
        with pytest.raises(InputError, match=rf"{cls.__name__} has fields \({field}\) and is no dataclass"):
            cls()
    assert Fine(k=3).k == 3


def test_methods_that_read_what_they_did_not_ask_for():
    @dataclass(kw_only=True)
    class Asks(foveate.ProjectorReducer):
        def reduce(self, tokens):
            return foveate.Reduction(tokens.question.text[:, :1, 0].long())

    @dataclass(kw_only=True)
    class Taps(foveate.ProjectorReducer):
        def reduce(self, tokens):
            return foveate.Reduction(tokens.taps["last"].keys[..., 0].argsort()[:, :3])

    @dataclass(kw_only=True)
    class Cuts(foveate.DecoderReducer):
        reads = "nothing"

        def cuts(self, layers):
            return (1,)

        def cut(self, tokens):
            return foveate.Cut(tokens.tap.keys[..., 0] > 0)

    @dataclass(kw_only=True)
    class Broken(foveate.ProjectorReducer):
        def reduce(self, tokens):
            return tokens.feature

    model, inputs = zoo.load(), zoo.batch()
    for method, match in ((Asks(), "reads_question = True"), (Taps(), "encoder_layers()"), (Cuts(), "reads = 'previous' or 'own'")):
        with method(model), pytest.raises(InputError, match=match):
            model.generate(**inputs, max_new_tokens=1)
    with Broken()(model), pytest.raises(AttributeError, match="feature"):  # a fault of another kind stays what it is
        model.generate(**inputs, max_new_tokens=1)


def test_methods_that_ignore_their_budget():
    @dataclass(kw_only=True)
    class Ignores(foveate.ProjectorReducer):
        def reduce(self, tokens):
            return foveate.Reduction(torch.arange(9).expand(len(tokens.features), -1))

    model, inputs = zoo.load(), zoo.batch()
    with Ignores(budget=9)(model):
        model.generate(**inputs, max_new_tokens=1)
    with Ignores(budget=8)(model), pytest.raises(foveate.FoveateError, match=r"kept 9 tokens .* its budget is 8.*self\.budget"):
        model.generate(**inputs, max_new_tokens=1)


# -- one way to say a thing, in every command


def options_of(command: str) -> dict[str, tuple[str, ...]]:
    """The names of each option, by the parameter that it sets."""
    from typer.main import get_command

    from foveate.cli.main import app

    return {parameter.name: (*parameter.opts,) for parameter in get_command(app).commands[command].params}


@pytest.mark.parametrize("command", ["ask", "batch", "bench", "compare", "demo", "eval", "search", "serve", "tune"])
def test_the_method_is_named_alike(command):
    assert "--method" in {name for names in options_of(command).values() for name in names}


def test_synonyms_of_commands():
    """What one command calls so, another takes, too."""
    same = [
        {"--method": "bench compare demo eval tune", "--methods": "bench compare demo eval tune"},
        {"--batch": "batch eval serve train tune", "--batch-size": "batch eval serve train tune"},
        {"--attn": "bench eval", "--attention": "bench eval"},
        {"--max-new-tokens": "ask batch compare tune"},
        {"--budget": "ask batch bench compare eval serve"},
    ]
    for name, commands in (pair for names in same for pair in names.items()):
        for command in commands.split():
            assert any(name in names for names in options_of(command).values()), (command, name)


def test_lists_are_separated_by_commas():
    assert list(methods_of(["prumerge+,visionzip", "fovea"], "64")) == ["prumerge+", "visionzip", "fovea"]
    with pytest.raises(InputError, match="empty entry"):
        methods_of(["prumerge+,"], "64")
    with pytest.raises(InputError, match="given twice"):
        methods_of(["prumerge+,fovea", "fovea"], "64")
