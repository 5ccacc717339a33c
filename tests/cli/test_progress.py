"""What is shown while a command works: in a terminal something, gone in the end, and elsewhere nothing."""

from __future__ import annotations

import json

import pytest
from rich.live import Live

from foveate.cli import common

from .test_main import invoke, scene

__all__ = ["scene"]
GONE = "\x1b[2K"  # clears a line of the terminal
TRAINING = ("train", "dyvte", "--steps", "2", "--batch", "2", "--limit", "4", "--checked", "2", "--out", "{0}.weights")
COMPARING = ("compare", "--scenes", "2", "--methods", "spatial", "--budgets", "64", "--no-own", "--store", "{0}.store")
COMMANDS = {  # with what a terminal shows of each
    ("methods",): ["starting"],
    ("models",): ["starting"],
    ("env",): ["starting"],
    ("law",): ["fitting the law"],
    ("cost", "llava-1.5-7b"): ["starting", "reading the config of llava-1.5-7b"],
    ("ask", "{0}", "what color is the star ?"): ["starting", "loading pocket", "answering"],
    ("show", "{0}", "what color is the star ?", "--out", "{0}.shown.png"): ["starting", "loading pocket", "answering"],
    ("figure", "4", "--out", "{0}.figure.png"): ["starting", "drawing figure 4"],
    ("batch", "{0}.jsonl", "{0}.answers.jsonl"): ["starting", "rows", "1/1"],
    COMPARING: ["starting", "loading pocket", "encoding"],
    TRAINING: ["starting", "training", "2/2"],
}


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(common.err, "_force_terminal", True)
    monkeypatch.setattr(common.err, "is_interactive", True)
    start = Live.start
    monkeypatch.setattr(Live, "start", lambda self, refresh=False: start(self, refresh=True))  # at once, however short it is


def told(command, scene, capsys, monkeypatch) -> str:
    scene.with_name(f"{scene.name}.jsonl").write_text(json.dumps({"image": str(scene), "question": "what color is the star ?"}))
    code, out, err = invoke(capsys, monkeypatch, *(part.format(scene) for part in command))
    assert code == 0, err
    assert out or command[0] in ("show", "figure"), "results are on stdout"
    assert "\x1b" not in out
    return err


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_in_a_terminal(command, scene, capsys, monkeypatch, terminal):
    err = told(command, scene, capsys, monkeypatch)
    for shown in COMMANDS[command]:
        assert shown in err
    assert GONE in err
    assert err.count("\x1b[?25l") == err.count("\x1b[?25h"), "the cursor is there again"


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_elsewhere(command, scene, capsys, monkeypatch):
    err = told(command, scene, capsys, monkeypatch)
    assert "\x1b" not in err
    lines = [line for line in err.splitlines() if not line.startswith(("step ", "picture: ", "prefill ", "visual tokens"))]
    assert not {shown for shown in COMMANDS[command] if any(shown in line for line in lines)}, err


def test_one_process_of_several_shows_it(capsys, monkeypatch, terminal):
    with common.progress("rows") as tell:
        tell("rows", 1, 2)
    assert "rows" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")
    with common.progress("rows") as tell:
        tell("rows", 1, 2)
    assert "rows" not in capsys.readouterr().err


def test_names_are_no_markup(capsys, monkeypatch, terminal):
    with common.progress("[bold]first") as tell:
        tell("[red]next", 1, 2)
    assert "[red]next" in capsys.readouterr().err
