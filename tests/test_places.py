"""Places as people write them; how they are written to is in tests/cli/test_places.py."""

import ast
from pathlib import Path

import pytest

import foveate
from foveate.places import user_path

ROOT = Path(foveate.__file__).parent


def test_home_folders(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_path("~/a/b") == tmp_path / "a/b"
    assert user_path(Path("~")) == tmp_path
    assert user_path("a/~b") == Path("a/~b")
    with pytest.raises(foveate.InputError, match=r"there is no user 'nosuchuser' with a home folder here\. Give the whole path"):
        user_path("~nosuchuser/x")


def test_a_home_that_nobody_knows(monkeypatch):
    def unknown(path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", unknown)
    with pytest.raises(foveate.InputError, match="the home folder of this user is not known"):
        user_path("~/x")


def test_nothing_else_looks_for_home_folders():
    """What ``pathlib`` raises for users that do not exist is none of our errors."""
    asking = set()
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and (
                node.attr == "expanduser" or ast.unparse(node) in ("Path.home", "pathlib.Path.home")
            ):
                asking.add((str(path.relative_to(ROOT)), ast.unparse(node)))
    assert asking == {("places.py", "Path(path).expanduser"), ("places.py", "os.path.expanduser")}
