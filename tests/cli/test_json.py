"""``--json``: alone it prints one document, with a file it writes it beside what is shown, and it replaces nothing by mistake."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from random import Random

import pytest
from PIL import Image
from typer.main import get_command

from foveate.cli.document import completed
from foveate.cli.main import app
from foveate.pocket.scenes import draw_scene

from .test_main import invoke

CHEAP = ("env", "methods", "models", "law", "cost")
PRINTED = "foveate.cli.env.lines_of"


@pytest.fixture
def scene(tmp_path) -> str:
    Image.fromarray(draw_scene(Random(4), split="test", level=1).image).save(tmp_path / "scene.png")
    return str(tmp_path / "scene.png")


@pytest.mark.parametrize("command", CHEAP)
def test_alone_as_dash_and_into_a_file_it_is_one_document(command, tmp_path, capsys, monkeypatch):
    file = tmp_path / "new" / "found.json"
    code, alone, _ = invoke(capsys, monkeypatch, command, "--json")
    assert code == 0
    assert invoke(capsys, monkeypatch, command, "--json", "-")[1] == alone
    code, shown, errors = invoke(capsys, monkeypatch, command, "--json", str(file))
    assert code == 0
    assert str(file) in errors
    assert json.loads(file.read_text()) == json.loads(alone)
    assert shown == invoke(capsys, monkeypatch, command)[1] != alone


def test_all_commands_that_tell_a_document_take_the_same_option():
    commands = get_command(app).commands
    places = {name: option for name, command in commands.items() for option in command.params if "--json" in option.opts}
    assert set(places) == set(commands) - {"app", "batch", "new-method", "search", "serve", "train"}
    assert len({(option.metavar, option.help, *option.opts) for option in places.values()}) == 1


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ([], []),
        (["--json"], ["--json", "-"]),
        (["--json", "-"], ["--json", "-"]),
        (["--json", "--save", "a.png"], ["--json", "-", "--save", "a.png"]),
        (["--json", "a.json"], ["--json", "a.json"]),
        (["--json=a.txt"], ["--json=a.txt"]),
        (["--json", "a.png", "what ?"], ["--json", "-", "a.png", "what ?"]),
        (["a.png", "--", "--json"], ["a.png", "--", "--json"]),
        (["a.png", "--json", "--", "what ?"], ["a.png", "--json", "-", "--", "what ?"]),
    ],
)
def test_what_stands_behind_it_is_a_place_or_not(given, read):
    assert completed(given, unnamed=True) == read


def test_a_command_without_unnamed_arguments_takes_any_name():
    assert completed(["--json", "ledger"], unnamed=False) == ["--json", "ledger"]


def test_a_picture_behind_it_stays_a_picture(scene, tmp_path, capsys, monkeypatch):
    before = (tmp_path / "scene.png").read_bytes()
    code, out, _ = invoke(capsys, monkeypatch, "ask", "--json", scene, "what color is the star ?")
    assert code == 0
    assert json.loads(out)["question"] == "what color is the star ?"
    assert (tmp_path / "scene.png").read_bytes() == before


def test_answers_and_a_picture_into_files(scene, tmp_path, capsys, monkeypatch):
    file, kept = tmp_path / "told.json", tmp_path / "kept.png"
    asked = ("ask", scene, "what color is the star ?", "--save", str(kept), "--json", str(file))
    code, out, errors = invoke(capsys, monkeypatch, *asked)
    told = json.loads(file.read_text())
    assert code == 0
    assert told["answer"] in out
    assert told["picture"] == str(kept)
    assert kept.exists()
    assert str(kept) in errors


def test_two_results_do_not_share_a_file(scene, tmp_path, capsys, monkeypatch):
    same = str(tmp_path / "same.json")
    code, _, errors = invoke(capsys, monkeypatch, "cost", "--html", same, "--json", same)
    assert code == 2
    assert "two results" in errors


def test_the_config_of_a_model_is_not_replaced(tmp_path, capsys, monkeypatch):
    config = tmp_path / "config.json"
    config.write_text('{"model_type": "llava"}')
    code, _, errors = invoke(capsys, monkeypatch, "cost", "--json", str(config))
    assert code == 2
    assert "would replace the config of a model" in errors
    assert config.read_text() == '{"model_type": "llava"}'


@pytest.mark.parametrize(("options", "closed"), [(("--json",), False), ((), True)])
def test_what_cannot_be_printed_is_in_its_files_all_the_same(tmp_path, options, closed):
    """Stdout is a file on a full disk, or a program that has ended."""
    page = tmp_path / "page.html"
    reader, writer = os.pipe()
    os.close(reader)
    full = os.open("/dev/full", os.O_WRONLY)
    asked = [sys.executable, "-m", "foveate", "cost", "pocket", "--html", str(page), *options]
    told = subprocess.run(asked, stdout=writer if closed else full, stderr=subprocess.PIPE, text=True, timeout=300, check=False)
    os.close(writer)
    os.close(full)
    assert told.returncode == 2, told.stderr
    assert "error: the result cannot be printed" in told.stderr
    assert "Exception ignored" not in told.stderr
    assert "memory GB" in page.read_text()


@pytest.mark.parametrize("command", CHEAP)
def test_what_cannot_be_printed_is_in_the_file_of_its_document(command, tmp_path, capsys, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(f"foveate.cli.{command}.show" if command in ("methods", "models", "law", "cost") else PRINTED, full)
    code, _, errors = invoke(capsys, monkeypatch, command, "--json", str(tmp_path / "found.json"))
    assert code == 2
    assert "the result cannot be printed (No space left on device)" in errors
    assert json.loads((tmp_path / "found.json").read_text())


def test_a_document_does_not_replace_a_file_of_an_export(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("foveate.loading._read", lambda *_, **__: pytest.fail("nothing is to be loaded"))
    folder = tmp_path / "text"
    code, _, errors = invoke(capsys, monkeypatch, "export", "pocket", str(folder), "--json", str(folder / "config.json"))
    assert code == 2
    assert "is inside the export" in errors
    assert not folder.exists()


def test_a_pipe_is_only_written_to():
    """As of ``--json >(jq .)``: reading it, to see whether it is a config, would never end."""
    reader, writer = os.pipe()
    asked = [sys.executable, "-m", "foveate", "methods", "--json", f"/dev/fd/{writer}"]
    with subprocess.Popen(asked, pass_fds=[writer], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        os.close(writer)
        with os.fdopen(reader) as file:
            assert "prumerge+" in [each["name"] for each in json.load(file)]
        assert process.wait(60) == 0


def test_a_deep_file_may_be_replaced(tmp_path, capsys, monkeypatch):
    (tmp_path / "deep.json").write_text("[" * 200_000)
    code, _, _ = invoke(capsys, monkeypatch, "law", "--json", str(tmp_path / "deep.json"))
    assert code == 0
    assert json.loads((tmp_path / "deep.json").read_text())["tasks"] == "reasoning"


def test_a_full_disk_is_told_after_the_result(capsys, monkeypatch):
    code, out, errors = invoke(capsys, monkeypatch, "law", "--json", "/dev/full")
    assert code == 2
    assert "cannot be written" in errors
    assert out
