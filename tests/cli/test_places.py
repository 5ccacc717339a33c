"""Places that cannot be written, a full disk, no matplotlib, Ctrl-C: what was worked out is told, and errors are ours."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
from PIL import Image

import foveate
import foveate.serving.export
from foveate import places
from foveate.pocket.scenes import draw_scene
from foveate.viz import canvas

from .test_main import invoke, run

FULL = Path("/dev/full")  # opens like a file, and every write says that the disk is full
pytestmark = pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")


@pytest.fixture
def scene(tmp_path) -> str:
    Image.fromarray(draw_scene(Random(4), split="test", level=1).image).save(tmp_path / "scene.png")
    return str(tmp_path / "scene.png")


@pytest.fixture
def no_place(tmp_path) -> Path:
    """A folder that nobody can make, whoever runs this: its parent is a file."""
    (tmp_path / "file").write_text("")
    return tmp_path / "file" / "folder"


def commands(scene: str, place: Path) -> dict[str, list[str]]:
    """Every command that writes, with the place."""
    return {
        "ask": ["ask", scene, "what color is the star ?", "--save", f"{place}/kept.png"],
        "demo": ["demo", "--folder", str(place)],
        **{name: [name, "--json", f"{place}/found.json"] for name in ("env", "law", "methods", "models")},
        "bench": ["bench", "--rounds", "1", "--new-tokens", "2", "--json", f"{place}/bench.json"],
        "search": ["search", f"{place}/plan.json", "--examples", "2"],
        "compare --save": ["compare", "--scenes", "2", "--save", str(place), "--store", f"{scene}.store"],
        "compare --store": ["compare", "--scenes", "2", "--store", f"{place}/store.jsonl"],
        "cost": ["cost", "--save", f"{place}/roofline.png"],
        "export": ["export", "pocket", f"{place}/text"],
        "eval": ["eval", "--save", str(place)],
        "batch": ["batch", f"{scene}.jsonl", f"{place}/out.jsonl"],
        "show": ["show", scene, "what color is the star ?", "--out", f"{place}/shown.png"],
        "figure": ["figure", "3a", "--out", f"{place}/figure.png"],
        "new-method": ["new-method", "edges", "--folder", str(place)],
        "tune --out": ["tune", "--out", f"{place}/plan.json"],
        "tune --store": ["tune", "--out", f"{scene}.json", "--store", f"{place}/answers.jsonl"],
    }


@pytest.mark.parametrize("name", commands("", Path()))
def test_places_are_tried_before_anything_is_worked_out(name, scene, no_place, capsys, monkeypatch):
    def never(*_, **__):
        raise AssertionError("a model was loaded")

    Path(f"{scene}.jsonl").write_text(json.dumps({"image": scene, "question": "what ?"}))
    monkeypatch.setattr("foveate.loading._read", never)  # not `load`: modules imported meanwhile would keep what stands for it
    code, out, err = invoke(capsys, monkeypatch, *commands(scene, no_place)[name])
    assert (code, out) == (2, ""), err
    assert err.startswith("error: ")
    assert str(no_place) in err
    assert "Traceback" not in err


def test_the_list_of_commands_is_whole():
    """Every command that takes a place to write is tried above."""
    from typer.main import get_command

    from foveate.cli.main import app

    told = {"save", "json_file", "folder", "store", "answers", "out_file"}
    writing = set()
    for name, command in get_command(app).commands.items():
        places = {option.name for option in command.params}
        plans = {option.name for option in command.params if option.param_type_name == "argument"} & {"plan"}  # others read one
        if told & places or plans:
            writing.add(name)
    assert writing == {name.split()[0] for name in commands("", Path())}


NOBODY = "~nosuchuser/x"  # what a shell hands on where there is no such user


@pytest.mark.parametrize(
    "asked",
    [
        *({name: command for name, command in commands("{scene}", Path(NOBODY)).items() if name != "cost"}).values(),
        ["ask", NOBODY, "what ?"],
        ["ask", "{scene}", "what ?", "--model", NOBODY],
        ["ask", "{scene}", "what ?", "--config", NOBODY],
        ["ask", "{scene}", "what ?", "--plan", NOBODY],
        ["ask", "{scene}", "what ?", "--import", NOBODY],
        ["ask", "{scene}", "what ?", "--method", "dyvte", "--set", f"weights={NOBODY}"],
        ["ask", "{scene}", "what ?", "--method", "g-search", "--set", f"plan={NOBODY}"],
        ["ask", "{scene}", "what ?", "--method", "yopo", "--set", f"heads={NOBODY}"],
        ["ask", "{scene}", "what ?", "--method", f"{NOBODY}.json"],
        ["batch", NOBODY, "{scene}.answers.jsonl"],
        ["bench", "--image", NOBODY],
        ["compare", "--data", NOBODY],
        ["compare", "--data", NOBODY, "--score", f"{NOBODY}.py:score"],
        ["cost", NOBODY],
        ["cost", "llava-1.5-7b", "--save", f"{NOBODY}.png"],
        ["cost", "llava-1.5-7b", "--html", NOBODY],
        ["cost", "--report", NOBODY, "--text", "4"],
        ["export", NOBODY, "{scene}.folder"],
        ["law", "--data", NOBODY],
        ["serve", "--model", NOBODY, "--vllm-url", "http://127.0.0.1:9"],
        ["train", "dyvte", "--out", NOBODY],
        ["train", "dyvte", "--out", "{scene}.weights", "--data", NOBODY],
        ["train", "lora", "--out", "{scene}.weights", "--method", f"{NOBODY}.json"],
        ["tune", "--out", "{scene}.json", "--data", NOBODY],
        ["tune", "--out", "{scene}.json", "--html", NOBODY],
        ["tune", "--out", "{scene}.json", "--score", f"{NOBODY}.py:score"],
        ["app", "--model", NOBODY],
    ],
    ids=" ".join,
)
def test_homes_of_nobody(asked, scene, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path(f"{scene}.jsonl").write_text(json.dumps({"image": scene, "question": "what ?"}))
    code, out, err = invoke(capsys, monkeypatch, *(part.replace("{scene}", scene) for part in asked))
    assert (code, out) == (2, ""), err
    assert err.startswith("error: ")
    assert "nosuchuser" in err
    assert "RuntimeError" not in err
    assert not list(tmp_path.glob("~*"))


def full(monkeypatch, written: str) -> None:
    """Files of this ending end up on a full disk."""
    write = places.write_bytes

    def written_there(path, contents):
        if not str(path).endswith(written):
            return write(path, contents)
        with places.writing(path):
            FULL.write_bytes(contents)

    for module in (places, canvas):
        monkeypatch.setattr(module, "write_bytes", written_there)


def test_full_disks(scene, tmp_path, capsys, monkeypatch):

    full(monkeypatch, ".png")
    code, out, err = invoke(capsys, monkeypatch, "ask", scene, "what color is the star ?", "--save", str(tmp_path / "kept.png"))
    assert code == 2
    assert out.strip(), "the answer is told"
    assert "kept.png cannot be written (No space left on device)" in err
    code, out, err = invoke(capsys, monkeypatch, "ask", scene, "what ?", "--json", "--save", str(tmp_path / "kept.png"))
    assert code == 2
    assert json.loads(out)["picture"] is None
    code, out, err = invoke(capsys, monkeypatch, "show", scene, "what color is the star ?", "--out", str(tmp_path / "shown.png"))
    assert code == 2
    assert out.count("tokens)") == 2, "both answers are told"
    assert "shown.png cannot be written (No space left on device)" in err
    code, out, err = invoke(capsys, monkeypatch, "demo", "--folder", str(tmp_path / "demo"))
    assert code == 2
    assert out.count("expected:") == 3
    assert "No space left" in err
    page = tmp_path / "cost.html"
    code, out, err = invoke(capsys, monkeypatch, "cost", "--save", str(tmp_path / "roofline.png"), "--html", str(page))
    assert code == 2
    assert "prefill" in out
    assert page.exists(), "one that cannot be written stops no other"
    code, out, err = invoke(capsys, monkeypatch, "figure", "4", "--out", str(tmp_path / "figure.png"), "--json")
    assert code == 2
    assert json.loads(out)["figure"] == "4"
    full(monkeypatch, ".json")
    page = tmp_path / "bench.html"
    asked = ("bench", "--rounds", "1", "--new-tokens", "2", "--html", str(page))
    code, out, err = invoke(capsys, monkeypatch, *asked, "--json", str(tmp_path / "bench.json"))
    assert code == 2
    assert "KV cache" in out
    assert "No space left" in err
    assert page.exists()
    page.unlink()
    code, out, err = invoke(capsys, monkeypatch, *asked, "--json", "-")
    assert code == 0, err
    assert json.loads(out)
    assert page.exists()


def test_a_picture_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    from foveate.viz.canvas import new_figure, write_figure

    old = tmp_path / "kept.png"
    old.write_bytes(b"old")

    def no_room(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", no_room)
    with pytest.raises(foveate.FoveateError, match=r"kept\.png cannot be written \(No space left on device\)"):
        write_figure(new_figure(), old, 100)
    assert [*tmp_path.iterdir()] == [old]
    assert old.read_bytes() == b"old"


@pytest.mark.parametrize(
    "asked",
    [
        ("tune", "--out", "{0}/plan.html"),
        ("tune", "--out", "{0}/plan.json", "--store", "{0}/plan.json"),
        ("tune", "--out", "{0}/plan.json", "--html", "{0}/../{1}/plan.json"),
        ("bench", "--json", "{0}/same", "--html", "{0}/same"),
        ("cost", "--save", "{0}/same.png", "--html", "{0}/same.png"),
        ("compare", "--store", "{0}/same", "--html", "{0}/same"),
        ("compare", "--save", "{0}", "--json", "{0}/comparison.json"),
        ("compare", "--save", "{0}", "--store", "{0}/comparison.csv"),
        ("compare", "--table", "4", "--save", "{0}", "--html", "{0}/table-4.md"),
        ("eval", "--save", "{0}", "--json", "{0}/evaluation.json"),
    ],
)
def test_two_results_for_one_file(asked, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("foveate.loading._read", lambda *_, **__: pytest.fail("nothing is to be loaded"))
    code, out, err = invoke(capsys, monkeypatch, *(part.format(tmp_path, tmp_path.name) for part in asked))
    assert (code, out) == (2, ""), err
    assert "is to hold two results" in err


@pytest.mark.parametrize(
    "asked",
    [
        ("ask", "{0}", "what ?", "--save", "{0}"),
        ("ask", "{1}", "what ?", "--method", "{0}", "--save", "{0}"),
        ("show", "{0}", "what ?", "--out", "{0}"),
        ("show", "{1}", "what ?", "--config", "{0}", "--json={0}"),
        ("law", "--data", "{0}", "--json={0}"),
        ("cost", "--report", "{0}", "--text", "4", "--json={0}"),
        ("cost", "{0}", "--html", "{0}"),
        ("tune", "--data", "{0}", "--out", "{0}"),
        ("tune", "--data", "{0}", "--json={0}"),
        ("tune", "--data", "{0}", "--store", "{0}"),
        ("compare", "--data", "{0}", "--html", "{0}"),
        ("compare", "--data", "{0}", "--store", "{0}"),
        ("bench", "--image", "{0}", "--html", "{0}"),
        ("bench", "--config", "{0}", "--json={0}"),
        ("demo", "--config", "{0}", "--json={0}"),
        ("export", "pocket", "{1}.folder", "--config", "{0}", "--json={0}"),
        ("eval", "--config", "{0}", "--json={0}"),
        ("search", "{0}", "--data", "{0}"),
    ],
)
def test_what_is_read_is_not_replaced(asked, scene, capsys, monkeypatch):
    monkeypatch.setattr("foveate.loading._read", lambda *_, **__: pytest.fail("nothing is to be loaded"))
    read = Path(scene).with_name("read.png")  # its ending and contents suit the first checks of all of them
    read.write_bytes(Path(scene).read_bytes())
    if "--config" in asked or asked[0] == "eval" or "--method" in asked:
        read = Path(scene).with_name("read.json")
        foveate.get("fovea", budget=9).save(read)
    before = read.read_bytes()
    code, out, err = invoke(capsys, monkeypatch, *(part.format(read, scene) for part in asked))
    assert (code, out) == (2, ""), err
    assert "is read here, and the result would replace it" in err or "cannot be saved as '.json'" in err
    assert read.read_bytes() == before


def test_names_that_are_no_text(tmp_path):
    """A page and what is printed name a file whose name is no UTF-8; what was worked out is not lost."""
    data, page = os.fsencode(tmp_path) + b"/law-\xff.json", tmp_path / "page.html"
    Path(os.fsdecode(data)).write_bytes((Path(foveate.__file__).parent / "analysis" / "law.json").read_bytes())
    asked = [sys.executable, "-m", "foveate", "law", "--data", data]
    told = subprocess.run(asked, capture_output=True, check=False, env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"})
    assert told.returncode == 0, told.stderr
    assert rb"law-\udcff.json" in told.stdout
    places.write_text(page, f"<p>{os.fsdecode(data)}</p>")
    assert "law-\\udcff.json" in page.read_text()


def test_a_picture_is_no_device(capsys, monkeypatch, scene):
    code, _, err = invoke(capsys, monkeypatch, "show", scene, "what ?", "--out", str(FULL))
    assert code == 2
    assert "/dev/full is a folder or a device" in err
    assert not FULL.with_suffix(".png").exists()


def test_what_a_comparison_found_is_told(tmp_path, capsys, monkeypatch):
    full(monkeypatch, ".md")
    asked = ["compare", "--scenes", "2", "--methods", "prumerge+", "--budgets", "64", "--no-own", "--store", str(tmp_path / "s")]
    code, out, err = invoke(capsys, monkeypatch, *asked, "--save", str(tmp_path))
    assert code == 2
    assert "prumerge+" in out
    assert "No space left" in err


def test_a_demo_without_matplotlib(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    code, out, err = invoke(capsys, monkeypatch, "demo", "--folder", str(tmp_path))
    assert code == 0, err
    assert out.count("expected:") == 3
    assert "foveate[viz]" in err
    assert (tmp_path / "scene-1-plain.png").exists()


def test_files_are_written_as_a_whole(tmp_path):
    file, link = tmp_path / "a.json", tmp_path / "link.json"
    file.write_text("old")
    file.chmod(0o600)
    link.symlink_to(file)
    places.write_text(link, "new")
    assert file.read_text() == "new"
    assert link.is_symlink()
    assert file.stat().st_mode & 0o777 == 0o600
    with pytest.raises(foveate.FoveateError, match="No space left"):
        places.write_text(FULL, "new")
    with pytest.raises(foveate.InputError, match="is a folder"):
        places.ready_file(tmp_path)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a.json", "link.json"]


def test_an_export_on_a_full_disk(tmp_path, monkeypatch):
    from safetensors import SafetensorError
    from transformers import PreTrainedModel

    def no_room(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", no_room)
    with pytest.raises(foveate.FoveateError, match=r"cannot be written .*No space left"):
        foveate.serving.export.export("pocket", tmp_path / "text")
    assert not list(tmp_path.iterdir())


# -- how commands end


def test_without_a_command_there_is_help():
    done = run()
    assert "Usage" in done.stdout + done.stderr
    assert "error" not in done.stderr


def test_errors_of_the_command_line_name_the_command():
    done = run("ask", "a.png", "what ?", "--bugdet", "3")
    assert done.returncode == 2
    assert "ask --help shows how" in done.stderr


@pytest.mark.parametrize("imported", ["foveate.errors", "typer.main", "foveate.cli.common"])
def test_interrupted_while_it_starts(tmp_path, imported):
    """As soon as a module has been read, from our first line on; before that Python itself says what it likes."""
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", "-m", "foveate", "demo", "--folder", str(tmp_path)],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # in the background it is ignored, and inherited so
    )
    assert any(line.rpartition("|")[2].strip() == imported for line in process.stderr)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode in (130, -signal.SIGINT)
    assert "foveate/cli" not in err, err


def test_an_interrupted_comparison_says_how_it_goes_on(tmp_path, capsys, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("foveate.lab.compare.compare", stop)
    code, _, err = invoke(capsys, monkeypatch, "compare", "--scenes", "2", "--store", str(tmp_path / "store.jsonl"))
    assert code == 130
    assert "the same command goes on from there" in err


@pytest.mark.parametrize("device", ["tpu", "cuda:7", "nonsense:0"])
def test_devices_that_are_not_there(device):
    from foveate.loading import load

    with pytest.raises(foveate.InputError, match="cannot be used here"):
        load(device=device)
