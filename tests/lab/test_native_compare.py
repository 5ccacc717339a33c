"""Shares of the tokens of pictures of any size: settings of methods, ``foveate compare`` and the demo on the second model."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

import foveate
from foveate.cli.compare import CompareOptions, parse_counts
from foveate.errors import InputError
from foveate.lab.compare import SHARES, at_share, budgets_for, compare
from foveate.lab.evaluate import families
from foveate.lab.exam import Asker
from foveate.lab.examples import examples
from foveate.lab.native_exam import NativeEvaluator
from foveate.lab.runner import Runner
from foveate.lab.tables import budget_text, csv_text, markdown, part_rows, rank_rows
from foveate.lab.testset import TestSet
from foveate.loading import load
from foveate.methods.registry import registered
from foveate.pocket import QWEN
from foveate.pocket.native.clips import Clip
from foveate.training.drawn import DrawnSamples
from foveate.video import Video
from foveate.viz.curves import save_comparison, save_training_curve

from ..cli.test_main import invoke

LAYERS = 8


@pytest.fixture(scope="module")
def qwen():
    return load(QWEN)


@pytest.fixture(scope="module")
def runner(qwen):
    return Runner(8, 1, model=qwen)


# -- shares --------------------------------------------------------------------------------------------------------------------


def test_most_methods_have_a_setting_for_any_share():
    found = 0
    for name in registered():
        for share in (*SHARES, 0.8):
            try:
                method = at_share(name, share, LAYERS)
            except InputError:
                continue
            found += 1
            if name == "aim":  # of which nothing is left in the last layer
                assert method.budget == share
                continue
            for total in (10_000, 4_000):
                left = (method.layer_tokens(total, LAYERS) or [total])[-1]
                assert left / total == pytest.approx(share, abs=0.015), (name, share)
    assert found >= 4 * 30


def test_shares_of_the_mean_over_layers():
    method = foveate.FastV(budget=0.5).at_share(0.4, LAYERS)
    assert np.mean(method.layer_tokens(1000, LAYERS)) == pytest.approx(400, abs=10)
    with pytest.raises(InputError, match="2% of the visual tokens on average over 8 decoder layers cannot be had"):
        foveate.FastV(budget=0.5).at_share(0.02, LAYERS)
    with pytest.raises(InputError, match="looks at the picture"):
        foveate.PixelPrune().at_share(0.3, LAYERS)
    for method in (foveate.PixelPrune(), foveate.PruMergePlus(), foveate.FastV(budget=0.5)):
        assert method.at_share(1, LAYERS).keeps_all
        for wrong in (float("nan"), 0.0, -0.1, 1.5, True, "a"):
            with pytest.raises(InputError, match="expected a share of the visual tokens"):
                method.at_share(wrong, LAYERS)
    with pytest.raises(InputError, match="nan of 576 visual tokens"):
        foveate.FastV(budget=0.5).at_budget(float("nan"), 576, LAYERS)


def test_budgets_of_the_command_line(runner):
    assert parse_counts("0.5,0.1", QWEN) == (0.1, 0.5)
    assert parse_counts("64,0.5") == (0.5, 64)
    assert [budget_text(each) for each in (0.22, 0.001, 64, None)] == ["22%", "0.1%", "64", "own rule"]
    for wrong in ("0.0", "-0.5", "1.5"):
        with pytest.raises(InputError, match="no share of the tokens of a picture"):
            parse_counts(wrong, QWEN)
    assert budgets_for(runner, None) == SHARES
    assert budgets_for(runner, (0.3,)) == (0.3,)
    with pytest.raises(InputError, match=r"different numbers of tokens\. Give shares"):
        budgets_for(runner, (0.5, 64))
    with pytest.raises(InputError, match="tables of the paper are in counts of 576"):
        budgets_for(runner, None, table=4)


# -- tables --------------------------------------------------------------------------------------------------------------------


def test_tables_at_shares(runner, tmp_path):
    report = compare(runner, ["prumerge+", "fastv", "evs", "pixelprune", "tome"], (0.25, 0.5))
    assert report["total"] == round(runner.outcome(None).tokens)
    rows = {(row["method"], row["budget"]): row for row in report["rows"]}
    for name in ("prumerge+", "evs", "spatial", "random"):
        for share in (0.25, 0.5):
            assert rows[name, share]["mean_tokens"] / report["total"] == pytest.approx(share, abs=0.02), name
    assert rows["fastv", 0.25]["mean_tokens"] > rows["prumerge+", 0.25]["mean_tokens"]
    assert rows["fastv", 0.25]["minus_spatial"] is not None, "baselines stand at the mean over layers"
    assert rows["pixelprune", None]["tokens"] < report["total"]
    missing = {entry["method"]: entry["reason"] for entry in report["missing"]}
    assert "acts inside the vision encoder" in missing["tome"]
    assert any(line[0] == "prumerge+" for _, line in rank_rows(report))
    report["command"] = "foveate compare --model pocket-qwen"
    text = markdown(report)
    assert "25%" in text
    assert "## Pictures alone" in text
    for part, clip in (("pictures", False), ("clips", True)):
        kept = [isinstance(runner.data.scenes[number], Clip) == clip for number, _ in runner.data.asked]
        for row in report["rows"]:
            right = runner.outcome(at_share(row["method"], row["budget"], LAYERS)).right if row["budget"] else None
            if right is not None:
                assert row["parts"][part][0] == pytest.approx(right[kept].mean()), (row["method"], part)
        assert len(part_rows(report, part)) == len({row["method"] for row in report["rows"] if row["asked"]})
    assert "prumerge+" in csv_text(report)
    save_comparison(report, tmp_path / "shares.png")
    with Image.open(tmp_path / "shares.png") as picture:
        assert picture.width > 400


def test_the_command_that_is_written_down():
    options = CompareOptions("evs", "0.25", True, 8, 1, 2403, QWEN, None, None, None)  # type: ignore[arg-type]
    assert options.counts == (0.25,)
    assert "--model pocket-qwen" in options.command


def test_questions_are_asked_kind_by_kind(runner):
    """Pictures and clips never share a batch, and every question is asked once."""
    asker = Asker(runner.loaded, runner.data, chunk=3)
    numbers = [number for part in asker.prompts.parts for number in part]
    assert numbers == list(range(len(asker.asked)))
    for part in asker.prompts.parts:
        assert len(part) <= 3
        assert len({isinstance(asker.shown[number], Video) for number, _ in (asker.asked[index] for index in part)}) == 1


def test_wrong_scenes_are_others_of_the_same_kind():
    data = TestSet.draw_native(16)
    wrong = data.wrong()
    assert wrong.questions == data.questions
    for scene, other in zip(data.scenes, wrong.scenes, strict=True):
        assert scene is not other
        assert isinstance(scene, Clip) == isinstance(other, Clip)


def test_families_of_the_second_model(runner):
    report = families(runner)
    assert set(report["full"]) == set(report["blind"]) == set(report["asked"])
    assert sum(report["asked"].values()) == report["questions"] == 8


# -- what people see -----------------------------------------------------------------------------------------------------------


def test_examples_are_a_picture_a_page_and_a_clip(qwen):
    found = examples(qwen, 7)
    assert [(name, type(scene)) for name, scene, _ in found][:2] == [("picture", Image.Image), ("page", Image.Image)]
    assert isinstance(found[2][1], Video)
    assert [question for *_, question in found] == [question for *_, question in examples(qwen, 7)]


def test_demo_and_ask_on_pictures_and_clips(tmp_path, capsys, monkeypatch):
    _, out, _ = invoke(
        capsys, monkeypatch, "demo", "--model", QWEN, "--folder", str(tmp_path), "--method", "evs", "--set", "budget=0.5", "--json"
    )
    scenes = json.loads(out)["scenes"]
    assert [scene["level"] for scene in scenes] == ["picture", "page", "clip"]
    clip = tmp_path / "scene-3-clip.gif"
    with Image.open(clip) as moving:
        assert moving.n_frames == 12
    for number in (1, 2, 3):
        assert next(tmp_path.glob(f"kept-{number}-*.png")).stat().st_size > 3000
    command = ["ask", str(clip), scenes[2]["question"], "--model", QWEN, "--method", "evs", "--budget", "0.5", "--frames", "12"]
    _, out, _ = invoke(capsys, monkeypatch, *command, "--json")
    document = json.loads(out)
    assert document["visual_tokens"]["evs"] * 2 == document["visual_tokens_before"] == 6 * 9 * 7
    assert document["answer"] == scenes[2]["answers"]["evs"]


def test_drawn_pictures_of_the_second_world():
    drawn = DrawnSamples(4, 0, 3, world="native")
    sizes = {drawn[number].images[0].size for number in range(4)}
    assert len(sizes) > 1
    assert drawn[1].messages == DrawnSamples(4, 0, 3, world="native")[1].messages
    assert drawn[1].messages != DrawnSamples(4, 1, 3, world="native")[1].messages


def test_training_curves_of_both_kinds(tmp_path):
    log = [{"step": 50 * n, "picture/answer/color": n / 9, "clip/answer/order": None if n < 3 else 0.5} for n in range(1, 8)]
    save_training_curve(log, tmp_path / "curve.png", ("picture", "clip"))
    assert (tmp_path / "curve.png").stat().st_size > 5000


@pytest.mark.parametrize("name", ["full", "prumerge+", "evs", "pool"])
def test_one_forward_for_all_questions_answers_as_generate_does(qwen, name):
    """Of pictures and clips, whole and reduced: the same answers, question by question, and the same counts."""
    data = TestSet.draw_native(8).picked(3, 0)
    method = foveate.get(name) if name == "full" else foveate.get(name, budget=0.3)
    fast, slow = NativeEvaluator(qwen, data).run(method), Asker(qwen, data).run(method)
    assert fast.right.tolist() == slow.right.tolist()
    assert 0 < fast.right.mean() <= 1
    weights = [len(asked) for asked in data.questions]
    assert np.average(fast.tokens, weights=weights) == pytest.approx(slow.layers[0])
