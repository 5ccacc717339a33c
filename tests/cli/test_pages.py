"""``--html``, ``foveate show`` and ``foveate figure``: what a command says as a page, and questions and figures as pictures."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from .test_main import invoke, scene  # noqa: F401


class Cells(HTMLParser):
    """The tables of a page, as texts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.inside = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self.inside = True

    def handle_endtag(self, tag):
        self.inside = self.inside and tag not in ("td", "th")

    def handle_data(self, data):
        if self.inside:
            self.tables[-1][-1][-1] += data


def alone(text: str) -> None:
    """The page asks for nothing else."""
    assert "http://" not in text
    assert "https://" not in text
    assert "<script" not in text
    assert re.search(r'(src|href)="(?!data:)', text) is None


def test_the_page_of_a_cost(capsys, monkeypatch, tmp_path):
    page = tmp_path / "new" / "cost.html"
    code, out, err = invoke(capsys, monkeypatch, "cost", "pocket", "--visual", "576,144", "--html", str(page), "--json")
    assert code == 0, err
    runs = json.loads(out)["runs"]
    text = page.read_text()
    alone(text)
    assert text.count("data:image/png;base64,") == 1
    tables = Cells(text).tables
    assert tables[0][0] == ["", *runs], "the summary comes first"
    assert len(tables) == 1 + len(runs)
    assert {row[0] for row in tables[0]} >= {"prefill ms", "memory GB: KV cache"}
    assert all(len(row) == len(table[0]) for table in tables for row in table)
    assert "foveate cost pocket --visual 576,144" in text


def test_the_page_of_a_comparison(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    asked = ("compare", "--methods", "prumerge+", "--budgets", "64", "--scenes", "2", "--no-own", "--html", "page.html", "--json")
    code, out, err = invoke(capsys, monkeypatch, *asked)
    assert code == 0, err
    report, text = json.loads(out), (tmp_path / "page.html").read_text()
    alone(text)
    (rows,) = Cells(text).tables
    row = next(row for row in rows if row[0] == "prumerge+")
    accuracy = next(row["accuracy"] for row in report["rows"] if row["method"] == "prumerge+")
    assert row[rows[0].index("64")].startswith(f"{100 * accuracy:.1f}")
    assert report["command"] in text


def test_the_page_of_a_measurement(capsys, monkeypatch, tmp_path):
    page = tmp_path / "bench.html"
    asked = ("bench", "--rounds", "1", "--new-tokens", "2", "--html", str(page), "--json", str(tmp_path / "bench.json"))
    code, _, err = invoke(capsys, monkeypatch, *asked)
    assert code == 0, err
    alone(page.read_text())
    times, ratios = Cells(page.read_text()).tables
    found = json.loads((tmp_path / "bench.json").read_text())["batches"][0]["variants"][1]
    assert times[0] == ["ms", "unreduced", "prumerge+"]
    prefill = next(row for row in times if row[0] == "prefill")
    assert float(prefill[2].partition(" ")[0]) == pytest.approx(1000 * found["seconds"]["prefill"]["median"], abs=0.06)
    assert ratios[1][0] == "prumerge+"


def test_a_page_without_matplotlib(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    code, _, err = invoke(capsys, monkeypatch, "cost", "pocket", "--html", str(tmp_path / "cost.html"))
    assert code == 0, err
    assert "No picture: matplotlib is not installed" in (tmp_path / "cost.html").read_text()


@pytest.mark.parametrize("command", [("cost", "pocket"), ("bench",), ("compare",), ("tune",)])
def test_pages_that_cannot_be_written(capsys, monkeypatch, tmp_path, command):
    monkeypatch.chdir(tmp_path)
    code, out, err = invoke(capsys, monkeypatch, *command, "--html", "/proc/no/page.html")
    assert (code, out) == (2, "")
    assert "cannot be written" in err


def test_show(capsys, monkeypatch, scene, tmp_path):  # noqa: F811
    place = tmp_path / "shown.png"
    asked = ("show", str(scene), "how many $objects are there ?", "--method", "prumerge+", "--method", "fastv", "--budget", "0.25")
    code, out, err = invoke(capsys, monkeypatch, *asked, "--out", str(place), "--json")
    assert code == 0, err
    document = json.loads(out)
    assert document["visual_tokens"] == {"full": 576, "prumerge+": 144, "fastv": 576}
    with Image.open(place) as picture:
        assert picture.width > picture.height > 800, "kept tokens, and heat below them"
    code, _, _ = invoke(capsys, monkeypatch, *asked[:3], "--method", "spatial", "--budget", "9", "--out", str(place))
    assert code == 0
    with Image.open(place) as picture:
        assert picture.height < 700, "without scores, no heat"


def test_show_a_clip(capsys, monkeypatch, tmp_path):
    frames = [Image.effect_noise((112, 112), 20 + 40 * number).convert("RGB") for number in range(4)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=100)
    asked = ("show", str(tmp_path / "a.gif"), "what color is the ring ?", "--frames", "4", "--model", "pocket-qwen")
    code, out, err = invoke(
        capsys, monkeypatch, *asked, "--method", "vidcom2", "--budget", "0.5", "--out", str(tmp_path / "a.png"), "--json"
    )
    assert code == 0, err
    tokens = json.loads(out)["visual_tokens"]
    assert tokens["vidcom2"] == tokens["full"] // 2
    assert (tmp_path / "a.png").stat().st_size > 10_000


@pytest.mark.parametrize("number", ["1", "3a", "3b", "4", "5"])
def test_figures_of_the_paper(capsys, monkeypatch, tmp_path, number):
    monkeypatch.setattr("foveate.lab.paper_figures.SCENES", 6)
    code, out, err = invoke(capsys, monkeypatch, "figure", number, "--out", str(tmp_path / "f.png"), "--json")
    assert code == 0, err
    found = json.loads(out)
    with Image.open(tmp_path / "f.png") as picture:
        assert min(picture.size) > 400
    if number == "1":
        assert found["tokens"]["all tokens"] == 576
        assert all(found["gflops"][name] < found["gflops"]["all tokens"] for name in ("plain", "medium", "crowded"))
    if number == "3a":
        assert sum(found["median"]) == pytest.approx(1, abs=0.2)
        assert found["median"] == sorted(found["median"], reverse=True)
    if number == "4":
        assert [found["tokens"][f"spatial, {shape}"] for shape in ("6 x 6", "5 x 8", "4 x 4")] == [36, 40, 16]
    if number == "5":
        assert len(found["frequency"]) == 576
        assert 0 < sum(found["frequency"]) / 576 < 0.5


def test_no_such_figure(capsys, monkeypatch):
    code, _, err = invoke(capsys, monkeypatch, "figure", "2")
    assert code == 2
    assert "Choose one of 1, 3a, 3b, 4, 5" in err
