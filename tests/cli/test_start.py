"""What starting costs, in modules and not in seconds, and what other libraries say meanwhile."""

from __future__ import annotations

import json
import subprocess
import sys
from random import Random

import pytest
from PIL import Image

from foveate.pocket.scenes import draw_scene

from .test_main import run

HEAVY = ("torch", "transformers", "numpy", "PIL", "matplotlib", "huggingface_hub")


def modules(code: str) -> list[str]:
    """All that is imported once ``code`` has run."""
    program = f"import sys, json\ntry:\n    {code}\nexcept SystemExit:\n    pass\nprint('\\n' + json.dumps(list(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("options", [["--version"], ["--help"], ["ask", "--help"], ["serve", "--help"], ["eval", "--help"], []])
def test_help_needs_none_of_the_large_libraries(options):
    found = modules(f"sys.argv = ['foveate', *{options}]; import foveate.cli; foveate.cli.run()")
    assert not set(HEAVY) & set(found)
    assert len(found) < 600


def test_the_package_is_imported_by_need():
    found = modules("import foveate; dir(foveate)")
    assert not set(HEAVY) & set(found)
    plain = modules("pass")
    assert len(found) - len(plain) < 100


def test_what_is_imported_beside_torch_and_transformers():
    """A method attached needs none of the extras and little more than the model does."""
    ours = set(modules("import foveate; foveate.attach, foveate.Pictures, foveate.PruMerge"))
    theirs = set(modules("from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel; import torch"))
    more = {name for name in ours - theirs if not name.startswith("foveate")}
    assert len(more) < 0.1 * len(theirs), sorted(more)
    assert not {"matplotlib", "fastapi", "peft", "datasets", "rich", "typer"} & {name.partition(".")[0] for name in more}


def test_other_libraries_are_not_heard(tmp_path):
    Image.fromarray(draw_scene(Random(4), split="test", level=1).image).save(tmp_path / "scene.png")
    done = run("ask", str(tmp_path / "scene.png"), "what color is the star ?")
    assert done.returncode == 0
    assert [line.partition(":")[0] for line in done.stderr.splitlines()] == ["prumerge+"]
    rows = json.dumps({"image": "scene.png", "question": "what color is the star ?"})
    (tmp_path / "in.jsonl").write_text(rows)
    done = run("batch", str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"))
    assert done.returncode == 0
    assert all(not line.strip() or line.startswith("rows ") for line in done.stderr.splitlines()), done.stderr
