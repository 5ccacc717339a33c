"""``foveate new-method``: what it writes works as it is, and is tidy."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import foveate

from .test_main import invoke

PACKAGE = Path(foveate.__file__).parent


def passes(folder: Path, *tests: str) -> str:
    """What pytest says of tests that pass, in a new Python."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--import-mode=importlib", *tests]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(PACKAGE.parent)])}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_a_method_of_ones_own_passes_its_test(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = invoke(capsys, monkeypatch, "new-method", "my-edges")
    assert code == 0
    assert "--import my_edges.py --method my-edges" in out
    assert "4 passed" in passes(tmp_path, "test_my_edges.py")


def test_a_method_of_the_package_passes_its_test(tmp_path, capsys, monkeypatch):
    """In a checkout: files of the package as links, beside which the new one lies."""
    shutil.copytree(PACKAGE, tmp_path / "foveate", copy_function=os.symlink, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "tests" / "methods").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    code, out, _ = invoke(capsys, monkeypatch, "new-method", "edges")
    assert code == 0
    assert "--import" not in out
    assert (tmp_path / "foveate" / "methods" / "edges.py").is_file()
    assert "4 passed" in passes(tmp_path, "tests/methods/test_edges.py")


def test_what_is_written_is_tidy(tmp_path, capsys, monkeypatch):
    pytest.importorskip("ruff", reason="needs ruff")
    assert invoke(capsys, monkeypatch, "new-method", "my-edges", "--folder", str(tmp_path / "tests"))[0] == 0
    settings = ["--config", str(PACKAGE.parent / "pyproject.toml"), "--config", 'lint.isort.known-first-party = ["foveate"]']
    settings += ["--config", 'lint.per-file-ignores = {"test_*" = ["S101", "D", "N"]}']
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, *settings, str(tmp_path)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("My_Edges", "small letters, digits and hyphens"),
        ("../edges", "small letters, digits and hyphens"),
        ("class", "small letters, digits and hyphens"),
        ("none", "means something else"),
        ("reduction", "means something else"),
        ("visual-tokens", "means something else"),
        ("conftest", "means something else"),
        ("prumerge", "there is a method 'prumerge' already"),
        ("torch", "would hide the Python module 'torch'"),
        ("there", "is there already"),
    ],
)
def test_names_that_are_refused(tmp_path, capsys, monkeypatch, name, told):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "test_there.py").write_text("mine")
    code, _, err = invoke(capsys, monkeypatch, "new-method", name)
    assert code == 2
    assert told in err
    assert [path.name for path in tmp_path.iterdir()] == ["test_there.py"]
    assert (tmp_path / "test_there.py").read_text() == "mine"


def test_a_method_is_not_left_without_its_test(tmp_path, capsys, monkeypatch):
    """Where the second file cannot be written, the first one goes, so that the command can be tried again."""
    from foveate import places

    write = places.write_bytes

    def full(path, contents):
        if Path(path).name.startswith("test_"):
            with places.writing(path):
                raise OSError(28, "No space left on device")
        write(path, contents)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(places, "write_bytes", full)
    code, _, err = invoke(capsys, monkeypatch, "new-method", "edges")
    assert code == 2
    assert "No space left" in err
    assert [*tmp_path.iterdir()] == []
    monkeypatch.setattr(places, "write_bytes", write)
    assert invoke(capsys, monkeypatch, "new-method", "edges")[0] == 0
