"""What the documentation shows is run: the examples of CONTRIBUTING.md are methods like all others."""

import csv
import re
import sys
import types
from pathlib import Path

import pytest
import torch

import foveate
from foveate.methods import registry

from . import families, zoo

ROOT = Path(__file__).parent.parent
EXAMPLES = {"top-attention": {"budget": 9}, "learnt-queries": {"budget": 5}}


def blocks(path: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / path).read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture
def examples(monkeypatch):
    """The methods of CONTRIBUTING.md, as files of ``foveate/methods`` would define them."""
    before = registry.registered()
    for number, code in enumerate(block for block in blocks("CONTRIBUTING.md") if "@dataclass" in block):
        module = types.ModuleType(f"foveate.methods.example_{number}")
        module.__package__ = "foveate.methods"
        monkeypatch.setitem(sys.modules, module.__name__, module)
        exec(compile(code, module.__name__, "exec"), module.__dict__)  # noqa: S102
    yield
    for name in set(registry.REGISTRY) - set(before):
        del registry.REGISTRY[name]


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("name", EXAMPLES)
def test_the_examples_of_contributing(examples, name, family):
    model, inputs = families.load(family), families.batch(family)
    method = foveate.get(name, **EXAMPLES[name])
    method = method.fresh() if method.trained() else method
    options = dict(max_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_logits=True)
    with method(model) as session:
        together = torch.stack(model.generate(**inputs, **options).logits, 1)
        assert session.report.after == [min(count, EXAMPLES[name]["budget"]) for count in session.report.before]
        for row in families.row_numbers(family):
            alone = torch.stack(model.generate(**families.batch(family, rows=(row,)), **options).logits, 1)
            torch.testing.assert_close(together[row], alone[0], atol=2e-4, rtol=2e-4)
    plain = model.generate(**inputs, **options).sequences
    with method.with_budget(1.0)(model):
        assert torch.equal(model.generate(**inputs, **options).sequences, plain)


def test_an_example_of_the_readme():
    """The calls of the README, on the pocket model."""
    model, processor = foveate.load_pocket()
    from PIL import Image

    picture, prompt = Image.effect_noise((336, 336), 60).convert("RGB"), "<s> user: <image> what color is the star ? assistant:"
    names = {"model": model, "inputs": processor(images=picture, text=prompt, return_tensors="pt"), "foveate": foveate}
    names |= {"processor": processor, "image": picture, "images": [picture], "prompts": [prompt]}
    run = 0
    for block in blocks("README.md"):
        if "from_pretrained" in block:
            block = block[block.index("with foveate") :]
        exec(compile(block.replace("...\n", ""), "README.md", "exec"), names)  # noqa: S102
        run += 1
    assert run >= 2
    assert names["session"].report.after[0] < 576
    assert foveate.engine.install.installed_on(model) is None
    assert zoo.TOKENS == 64


# -- what lies beside the documentation


PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")


@pytest.mark.parametrize("page", PAGES)
def test_links_of_the_repository_lead_to_files(page):
    found = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", (ROOT / page).read_text(encoding="utf-8"))
    assert [link for link in found if not (ROOT / link).exists()] == []
    assert found or page == "CONTRIBUTING.md"


def test_the_readme_is_short_and_says_how_to_test():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 120
    assert "\nmake test " in text
    for page in ("README.md", "docs/index.md"):
        assert f"{len(foveate.models())} families" in (ROOT / page).read_text(encoding="utf-8")


def test_numbers_of_the_readme_are_committed_results():
    """Those at 64, 144 and 288 tokens are in docs/results/comparison.csv, too."""
    with (ROOT / "docs/results/comparison.csv").open(encoding="utf-8", newline="") as file:
        rows = {(row["method"], row["budget"]): f"{100 * float(row['accuracy']):.1f}" for row in csv.DictReader(file)}
    lines = re.findall(r"^\| `([a-z+]+)`[^|]*((?:\| \**[0-9.]+\** ){5})\|$", (ROOT / "README.md").read_text(encoding="utf-8"), re.M)
    assert len(lines) > 4
    for name, cells in lines:
        told = [cell.strip(" *") for cell in cells.split("|")[3:]]
        assert told == [rows[name, budget] for budget in ("64", "144", "288")], name


def test_files_of_a_release_agree():
    """One version, with an entry of what it brought."""
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)[1]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\n## {version}\n" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
