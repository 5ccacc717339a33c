"""``foveate env``: what a report of a fault needs, and nothing that is secret."""

import importlib.metadata
import json
import platform

import pytest
import torch

from foveate.measuring import environment

from .test_main import invoke


def test_it_says_what_is_installed(capsys, monkeypatch):
    monkeypatch.setenv("FOVEATE_API_KEY", "hush-hush")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    code, out, _ = invoke(capsys, monkeypatch, "env", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["versions"]["python"] == platform.python_version()
    assert found["versions"]["torch"] == torch.__version__
    assert found["packages"]["numpy"] == importlib.metadata.version("numpy")
    assert found["variables"]["OMP_NUM_THREADS"] == "1"
    assert "hush-hush" not in out
    code, text, _ = invoke(capsys, monkeypatch, "env")
    assert code == 0
    assert torch.__version__ in text
    assert "bfloat16 units" in text
    assert "hush-hush" not in text


@pytest.mark.parametrize(
    ("needs", "missing"),
    [
        (["numpy>=1"], []),
        (["numpy>=1", "no-such-package>=2"], ["no-such-package"]),
        (["numpy>=999"], ["numpy"]),
        (["foveate[viz]", "numpy"], []),
    ],
)
def test_an_extra_lacks_what_is_not_there_or_too_old(monkeypatch, needs, missing):
    class About:
        requires = ("torch>=2.6", *(f"{need}; extra == 'mine'" for need in needs), "absent; extra == 'mine-too'")

        class metadata:
            @staticmethod
            def get_all(_):
                return ["mine", "mine-too"]

    monkeypatch.setattr(environment, "distribution", lambda _: About)
    assert environment.environment()["extras"] == {"mine": missing, "mine-too": ["absent"]}


def test_a_source_tree_that_is_not_installed(monkeypatch):
    def absent(_):
        raise importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(environment, "distribution", absent)
    assert environment.environment()["extras"] == {}
