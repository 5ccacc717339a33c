"""The documentation site: what its pages are made of, without building it (``make docs`` does, and checks the links)."""

import inspect
import itertools
import json
import re
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

import foveate

DOCS = Path(__file__).parent.parent / "docs"
sys.path.insert(0, str(DOCS / "site"))

import cards  # noqa: E402
import leaderboard  # noqa: E402
import links  # noqa: E402
import models  # noqa: E402
import reference  # noqa: E402


class Settings(yaml.SafeLoader):
    """Reads mkdocs.yml, whatever tags it uses."""


Settings.add_multi_constructor("", lambda *_: None)


def nav(entries) -> list[str]:
    """The pages of a navigation, in its order."""
    values = [next(iter(entry.values())) if isinstance(entry, dict) else entry for entry in entries]
    return [page for value in values for page in (nav(value) if isinstance(value, list) else [value])]


PAGES = nav(yaml.load((DOCS.parent / "mkdocs.yml").read_text(encoding="utf-8"), Settings)["nav"])  # noqa: S506


def test_every_page_is_in_the_navigation_once():
    written = {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")}
    made = {f"papers/{place}.md" for place in cards.PAGES} | {f"models/{slug}.md" for slug in models.PAGES}
    made |= {f"api/{group}.md" for group in (*reference.GROUPS, "cli")} | {*links.PAGES.values(), "leaderboard.md"}
    made |= {f"notebooks/{path.stem}.md" for path in (DOCS / "notebooks").glob("*.ipynb")}
    assert sorted(PAGES) == sorted(written | made)


def test_every_method_has_one_card():
    text = "\n".join(cards.cards_page(place) for place in cards.PAGES)
    headings = re.findall(r"^## `(.+?)` \{ #(.+) \}$", text, re.MULTILINE)
    assert sorted(name for name, _ in headings) == sorted(info.name for info in foveate.methods())
    assert len({anchor for _, anchor in headings}) == len(headings)


def test_a_card_says_what_the_class_says():
    card = cards.card(next(info for info in foveate.methods() if info.name == "prumerge"))
    assert "arXiv 2403.15388" in card
    assert "`prumerge:released`: As the released code does (commit 097c041)" in card
    assert "| `iqr_factor` | `1.5` | how far beyond the quartiles an outlier lies. |" in card
    # from docs/results/comparison.csv
    assert "| `prumerge`, budget 144 | 144 | 94.4 [92.9, 95.9] | -1.3 [-2.6, +0.0] |" in card


def test_code_of_cards_builds_the_method():
    for info in foveate.methods():
        cls = foveate.methods.registry.registered()[info.name]
        built = eval(cards.call(cls, info), {"foveate": foveate})  # noqa: S307
        assert type(built) is cls


def test_the_leaderboard_is_sorted_and_whole():
    text = leaderboard.leaderboard()
    first, second = (text.split(f"## {title}")[1].split("\n## ")[0] for title in ("Before the decoder", "Inside the decoder"))
    for part in (first, second):
        rows = [line.split("|")[2:6] for line in part.splitlines() if re.match(r"\| \d+ \|", line)]
        means = [sum(float(cell.split("@")[0]) for cell in row[1:]) for row in rows]
        assert len(rows) > 5
        assert all(before >= after - 0.31 for before, after in itertools.pairwise(means))  # cells are rounded
    assert "| [`fastv`](papers/decoder.md#fastv) |" in second
    assert "fastv" not in first


def test_every_public_name_is_in_the_reference_once():
    text = "\n".join(reference.reference_page(group) for group in reference.GROUPS)
    shown = [*re.findall(r"^::: foveate\.(.+)$", text, re.MULTILINE)]
    older = re.findall(r"^## `(.+)`$", text, re.MULTILINE)
    assert sorted([name.rpartition(".")[2] for name in shown] + older) == sorted(foveate.__all__)


def test_every_picture_is_shown_somewhere():
    """One that a rewritten page lost would be shipped and never seen."""
    pages = [*DOCS.rglob("*.md"), *DOCS.rglob("*.ipynb"), *DOCS.rglob("*.py"), *(DOCS.parent / "foveate").rglob("*.md")]
    text = "".join(page.read_text(encoding="utf-8") for page in [*pages, DOCS.parent / "README.md", DOCS.parent / "mkdocs.yml"])
    pictures = [*(DOCS / "images").iterdir()]
    assert len(pictures) > 5
    assert [picture.name for picture in pictures if picture.name not in text] == []


def test_links_lead_on():
    text = "[a](tune.md#x) [b](../benchmarks/results) [c](../CONTRIBUTING.md) [d](https://x.org) [e](#here) ![f](images/demo.png)"
    assert links.rewritten(text, "choosing.md") == (
        "[a](tune.md#x) [b](https://github.com/foveate/foveate/blob/main/benchmarks/results) [c](contributing.md) "
        "[d](https://x.org) [e](#here) ![f](images/demo.png)"
    )
    assert links.rewritten("[a](docs/tune.md)", "contributing.md", "CONTRIBUTING.md") == "[a](tune.md)"
    assert links.rewritten("[a](../tune.md)", "models/internvl.md") == "[a](../tune.md)"
    assert links.rewritten("[a](serve.ipynb)", "notebooks/first-steps.md", "docs/notebooks/x.ipynb") == "[a](serve.md)"


def test_llms_txt_names_pages_that_are_there():
    found = re.findall(r"\]\((.+?)\)", (DOCS / "llms.txt").read_text(encoding="utf-8"))
    assert len(found) > 10
    assert {name.removesuffix(".html") + ".md" for name in found if not name.startswith("http")} <= set(PAGES)


@pytest.mark.parametrize(("slug", "pocket"), [("llava-1.5", ""), ("qwen2.5-vl", "qwen")])
def test_code_of_the_pages_of_models(monkeypatch, capsys, slug, pocket):
    """On the pocket models, which answer in place of the large ones."""
    import transformers

    model, processor = foveate.load_pocket(*filter(None, [pocket]))
    monkeypatch.setattr(transformers.AutoModelForImageTextToText, "from_pretrained", lambda *_, **__: model)
    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", lambda *_, **__: processor)
    monkeypatch.setattr(Image, "open", lambda _: Image.effect_noise((336, 336), 60).convert("RGB"))
    code = re.findall(r"```python\n(.*?)```", models.model_page(slug), re.DOTALL)[0]
    exec(compile(code, slug, "exec"), names := {})  # noqa: S102
    assert names["session"].report.after[0] < names["session"].report.before[0]
    assert "visual tokens" in capsys.readouterr().out


def test_models_have_pages_for_what_they_are():
    for slug, page in models.PAGES.items():
        text = models.model_page(slug)
        assert models.row_of(page.kind).example in text
        assert "{" not in re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def test_docstrings_in_the_form_that_is_read():
    docstrings = pytest.importorskip("docstrings", reason="needs griffe of the extra 'docs'")
    text = inspect.cleandoc(foveate.attach.__doc__)
    done = docstrings.numpydoc(text, "Session")
    assert "\nmodel\n    a Hugging Face vision-language model" in done
    assert "Returns\n-------\nSession\n    The handle:" in done
    assert "UnsupportedModelError\n    the model," in done


def test_notebooks_are_committed_without_output():
    for path in (DOCS / "notebooks").glob("*.ipynb"):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        assert all(not cell.get("outputs") and cell.get("execution_count") is None for cell in cells), path.name


def test_code_of_the_first_pages(monkeypatch, capsys):
    """Five minutes, then what works: in the order in which they are read."""
    monkeypatch.setattr(Image, "open", lambda _: Image.effect_noise((336, 336), 60).convert("RGB"))
    names = {}
    for page in ("start.md", "works.md"):
        for code in re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL):
            exec(compile(code, page, "exec"), names)  # noqa: S102
    assert capsys.readouterr().out.count("visual tokens 576 ->") == 4  # a session, and three budgets
    assert [len(embeds) for embeds in names["encoded"].embeds] == names["encoded"].report.after


def test_rows_are_added_to_the_leaderboard(tmp_path):
    results, mine = tmp_path / "results", tmp_path / "mine"
    for folder in (results, mine):
        folder.mkdir()
        (folder / "comparison.md").write_text("# A\n\n10 questions (seed 1); all tokens: 95 % right.\n\n...")
    (results / "comparison.csv").write_text("method,budget,asked,accuracy,word\nold,64,True,0.5,0.1\n")
    new = "method,kind,budget,asked,accuracy\nold,k,64,True,0.9\nmine,k,64,True,0.7\nmine,k,144,True,0.8\nmine,k,36,False,0.8\n"
    (mine / "comparison.csv").write_text(new)
    assert leaderboard.add_rows(mine, results) == ["mine"]
    lines = (results / "comparison.csv").read_text().splitlines()
    assert lines[1:] == ["old,64,True,0.5,0.1", "mine,64,True,0.7,", "mine,144,True,0.8,"]
    assert leaderboard.add_rows(mine, results) == []
    (mine / "comparison.md").write_text("# A\n\n20 questions (seed 1); all tokens: 95 % right.\n\n...")
    with pytest.raises(ValueError, match="the leaderboard is of 10 questions"):
        leaderboard.add_rows(mine, results)


def test_pages_of_models_say_what_is_served():
    """The command that serves a model is on its page exactly where the table of families has a way to hand its tokens over."""
    from foveate.families import FAMILIES

    for slug, page in models.PAGES.items():
        family = FAMILIES[page.kind]
        placed = family.handover == "image_embeds"
        served = placed or not (family.mrope or family.two_way or family.marks)
        text = models.model_page(slug)
        assert ("foveate serve --model" in text) == served, slug
        assert ("--enable-mm-embeds" in text) == placed, slug


def test_warnings_of_the_build_are_counted():
    """With --quiet, mkdocs counts no warning, and broken links pass."""
    (line,) = (line for line in (DOCS.parent / "Makefile").read_text(encoding="utf-8").splitlines() if "mkdocs build" in line)
    assert "--strict" in line
    assert "--quiet" not in line
