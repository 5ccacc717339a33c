"""What users import: names that are looked up, names that have moved, methods of other packages."""

import importlib
import importlib.metadata
import json
import os
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import pytest

import foveate
from foveate._moved import MOVED
from foveate.methods import registry
from foveate.methods.base import ProjectorReducer

THEIRS = '''
from dataclasses import dataclass
from foveate import ProjectorReducer, Reduction, VisualTokens
from foveate.tokens import resolve_budget
import torch

@dataclass(kw_only=True)
class Diagonal(ProjectorReducer, name="diagonal", paper="https://example.org", adaptive=False):
    """Keeps the cells of a diagonal."""

    def reduce(self, tokens: VisualTokens) -> Reduction:
        count = resolve_budget(self.budget, tokens.number)
        index = torch.arange(count) * (tokens.number - 1) // max(1, count - 1)
        return Reduction(index.expand(len(tokens.features), -1))
'''


def python(code: str, *path: Path) -> str:
    """What a new Python prints."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_old_modules_are_found():
    """Each old name gives the module at its new place, with a warning that names it."""
    for old, new in MOVED.items():
        if "vllm" in new:
            continue
        sys.modules.pop(old, None)
        with pytest.warns(DeprecationWarning, match=f"{new} now"):
            module = importlib.import_module(old)
        assert module is importlib.import_module(new)
        assert module.__name__ == new
        assert module.__spec__.name == new


def test_old_names_of_classes():
    from foveate.methods import base
    from foveate.methods.compose import Compose
    from foveate.methods.registry import REGISTRY, get, presets, registered

    assert foveate.TokenReducer is foveate.ProjectorReducer
    assert foveate.Merge is foveate.Regroup
    assert (base.TokenReducer, base.Compose, base.get, base.registered) == (foveate.ProjectorReducer, Compose, get, registered)
    assert (base.presets, base.REGISTRY) == (presets, REGISTRY)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = base.nothing


def test_a_module_that_is_a_folder_now():
    from foveate.serving import gateway
    from foveate.serving.gateway.gateway import Gateway

    assert gateway.Gateway is Gateway
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = gateway.nothing


def test_old_names_of_commands():
    """``python -m`` of a module that has moved."""
    run = subprocess.run([sys.executable, "-m", "foveate.pocket.evaluate", "--help"], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "Usage" in run.stdout
    assert "foveate.pocket.evaluate is python -m foveate.lab.evaluate now" in run.stderr


def test_importing_foveate_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert python("import foveate; print(foveate.attach.__name__)").strip() == "attach"


def test_methods_is_a_table_and_a_package():
    assert {info.name for info in foveate.methods()} == set(foveate.methods.registry.registered())
    assert python("import foveate.methods, foveate; print(len(foveate.methods()))").strip() == str(len(foveate.methods()))
    assert python("from foveate import methods; print(len(methods()))").strip() == str(len(foveate.methods()))


# -- methods of other packages


def wheel(folder: Path, name: str, code: str, module: str) -> Path:
    """A package with an entry point of the group ``foveate.methods``."""
    path = folder / f"{name}-1.0-py3-none-any.whl"
    about = f"{name}-1.0.dist-info"
    files = {
        f"{name}.py": code,
        f"{about}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        f"{about}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{about}/entry_points.txt": f"[foveate.methods]\n{module} = {name}\n",
    }
    files[f"{about}/RECORD"] = "".join(f"{file},,\n" for file in [*files, f"{about}/RECORD"])
    with zipfile.ZipFile(path, "w") as archive:
        for file, content in files.items():
            archive.writestr(file, content)
    return path


def test_methods_of_another_package(tmp_path):
    """Installed, it is listed, built and run by name; one that cannot be imported is named and stands in nobody's way."""
    wheels = [wheel(tmp_path, "theirs", THEIRS, "diagonal"), wheel(tmp_path, "broken", "import no_such_module", "sleepy")]
    place = tmp_path / "installed"
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-index",
        "--no-deps",
        "--target",
        str(place),
        *map(str, wheels),
    ]
    subprocess.run(install, check=True)
    code = """
import json, foveate, torch
from PIL import Image
model, processor = foveate.load_pocket()
inputs = processor(images=[Image.new("RGB", (336, 336))], text="<s> user: <image> what is it ? assistant:", return_tensors="pt")
info = {info.name: info for info in foveate.methods()}
try:
    foveate.get("sleepy")
except foveate.InputError as error:
    told = str(error)
kept = foveate.Pictures(model, **inputs).reduce("diagonal", budget=4).report.images[0].kept
print(json.dumps([info["diagonal"].summary, info["diagonal"].problem, len(info), kept, told]))
"""
    summary, problem, number, kept, told = json.loads(python(code, place).splitlines()[-1])
    assert (summary, problem, kept) == ("Keeps the cells of a diagonal.", "", [0, 191, 383, 575])
    assert number == len(foveate.methods()) + 1
    assert "'sleepy' cannot be loaded: broken: ModuleNotFoundError: No module named 'no_such_module'" in told
    listed = subprocess.run(
        [sys.executable, "-m", "foveate", "methods", "--json"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(place)},
        check=True,
    )
    assert "diagonal" in {row["name"] for row in json.loads(listed.stdout)}


@pytest.fixture
def unbuildable():
    class Sulking(ProjectorReducer, name="sulking"):
        """Does not want to be built."""

        def __post_init__(self):
            raise RuntimeError("not today")

    yield
    del registry.REGISTRY["sulking"]


def test_the_table_survives_a_class_that_it_cannot_build(unbuildable):
    table = {info.name: info for info in foveate.methods()}
    assert (table["sulking"].problem, table["sulking"].stage) == ("RuntimeError: not today", "before the projector")
    assert all(info.problem == "" for name, info in table.items() if name != "sulking")
    assert len(table) > 30
