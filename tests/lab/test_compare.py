"""``foveate compare``: the runner, its store, the tables, the paper's tables in small, the files."""

from __future__ import annotations

import contextlib
import csv
import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import foveate
from foveate.cli.compare import CompareOptions, checked, parse_counts
from foveate.lab.claims import Claim, Judge, TableLine, claims_of, tally
from foveate.lab.compare import BESIDE, KINDS, at_count, at_own_rule, check_methods, compare, kind_of
from foveate.lab.exam import Asker, Evaluator
from foveate.lab.paper_tables import BUILD, NOTES, TABLE5, TABLE7, paper_table, shapes_near
from foveate.lab.runner import Runner
from foveate.lab.scores import Scores
from foveate.lab.store import Store, key_of
from foveate.lab.tables import cells, csv_text, files, points, rank_rows, ranks, reasons
from foveate.lab.testset import TestSet
from foveate.loading import load
from foveate.methods.baselines import Random
from foveate.methods.registry import registered
from foveate.viz.curves import save_comparison

from ..cli.test_main import invoke

SCENES = 4
NAMES = ("prumerge+", "yopo", "fastv")


@pytest.fixture(scope="module")
def pocket():
    return load("pocket")


@pytest.fixture(autouse=True)
def _loaded_once(monkeypatch, pocket):
    monkeypatch.setattr("foveate.lab.runner.load", lambda _: pocket)


@pytest.fixture(scope="module")
def runner():
    return Runner(SCENES)


@pytest.fixture(scope="module")
def report(runner):
    return compare(runner, NAMES, (16, 64))


@pytest.fixture
def calls(monkeypatch):
    """What is really computed, by name of the method."""
    done: list[str] = []
    for cls in (Evaluator, Asker):

        def counted(self, method, *args, original=cls.run, **kwargs):
            done.append("all" if method is None else method.name)
            return original(self, method, *args, **kwargs)

        monkeypatch.setattr(cls, "run", counted)
    return done


# -- the evaluator -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method",
    [
        foveate.VTCCls(budget=40),
        foveate.VTCCls(budget=40, layers=3),
        foveate.FasterVLM(budget=40),
        foveate.PruMerge.paper(),
        foveate.PruMerge(score_layer=-2, key_layer=1, budget=40),
        foveate.get("visionzip", budget=40),
        foveate.get("resize", budget=64),
        foveate.get("tome", budget=64),
        foveate.get("ats", budget=64),
    ],
    ids=lambda method: f"{method.name}-{method.budget}",
)
def test_the_evaluator_leaves_the_tokens_that_the_engine_leaves(runner, method):
    """Above all, a method gets the encoder layers it asked for and no others: ``vtc-cls`` sums over whatever it gets."""
    evaluator = runner.evaluator
    asked = [next(each for each in runner.asker.asked if each[0] == scene) for scene in range(SCENES)]
    inputs = runner.asker.prompts.inputs(map(runner.asker.asked.index, asked))
    want = foveate.encode(evaluator.model, method, **inputs).embeds
    got = evaluator.pictures[0].reduce(method).embeds
    assert [len(each) for each in got] == [len(each) for each in want]
    for mine, engine in zip(got, want, strict=True):
        torch.testing.assert_close(mine, engine, rtol=1e-4, atol=1e-4)
    anew = foveate.Pictures(evaluator.model, pixel_values=inputs["pixel_values"]).reduce(method).embeds
    torch.testing.assert_close(torch.cat(got), torch.cat(anew), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "method",
    [
        foveate.get("tome", budget=64),
        foveate.get("ats"),
        foveate.get("resize", budget=64),
        foveate.VTCCls(budget=40),
        foveate.PruMergePlus(),
    ],
    ids=lambda method: method.name,
)
def test_the_evaluator_equals_generate(runner, method):
    assert runner.sees_no_question(method)
    fast, slow = runner.evaluator.run(method.before_decoder()), runner.asker.run(method)
    assert fast.layers == pytest.approx(slow.layers)
    assert fast.right.tolist() == slow.right.tolist()


def test_methods_that_read_the_question_get_a_prompt_for_each(runner, calls):
    method = at_count("cdpruner", 64)
    assert not runner.sees_no_question(method)
    with pytest.raises(foveate.InputError, match="reads the question"):
        runner.evaluator.run(method)
    assert not runner.sees_no_question(foveate.PruMerge(positions="original")), "the evaluator renumbers"
    calls.clear()
    assert runner.outcome(method).mean == 64
    assert calls == ["cdpruner"]


def test_a_subset_of_questions_is_answered_as_in_the_whole(runner):
    data = TestSet.draw(SCENES)
    method = foveate.PruMergePlus(budget=64)
    right = dict(zip(data.asked, Evaluator(runner.loaded.model, data).run(method).right.tolist(), strict=True))
    assert runner.data.asked == [asked for asked in data.asked if asked in runner.data.asked]
    assert runner.evaluator.run(method).right.tolist() == [right[asked] for asked in runner.data.asked]


# -- settings ------------------------------------------------------------------------------------------------------------------


def test_budgets_of_methods_inside_the_decoder():
    assert at_count("fastv", 64).budget == 64
    assert at_count("pyramiddrop", 72).layer_tokens(576, 6) == [576, 576, 288, 144, 144, 72], "equal shares"
    assert at_count("sparsevlm", 144).layer_tokens(576, 6) == [576, 292, 292, 144, 144, 144], "two cuts, with what comes back"
    assert at_count("sparsevlm:paper", 72).combine == "sum"
    both = at_count("iti", 144)
    assert (both.budget, both.second) == pytest.approx((0.5, 0.5), rel=0.01)
    assert (at_count("aim", 64).budget, at_count("p-sigmoid", 300).budget) == (64, 300), "what enters, and the mean over layers"
    with pytest.raises(foveate.InputError, match="cannot be had"):
        at_count("aim-prune", 64)
    assert at_own_rule("fastv") is None, "a default is no rule"
    assert at_own_rule("random") is None
    assert at_own_rule("prumerge+:released").iqr_scope == "image", "as one picture at a time"


def test_every_registered_method_has_a_kind_and_a_key():
    keys = {}
    for name in registered():
        for budget in (64, 288):
            with contextlib.suppress(foveate.InputError):
                method = at_count(name, budget)
                assert kind_of(method) in KINDS
                keys[key_of(method)] = name
    assert len(keys) >= 2 * (len(registered()) - 6), "some cannot have both counts"
    assert kind_of(at_count("resize", 64)) == kind_of(at_count("random", 64)) == "baseline"
    assert kind_of(at_count("tome", 64)) == "inside the encoder"
    assert kind_of(at_count("iti", 64)) == kind_of(at_count("fastv", 64)) == "inside the decoder"
    assert kind_of(at_count("prumerge", 64)) == "before the projector"
    assert key_of(foveate.PruMerge(k=3)) != key_of(foveate.PruMerge())


# -- resuming ------------------------------------------------------------------------------------------------------------------


def test_nothing_is_computed_twice(tmp_path, calls):
    store = tmp_path / "results" / "store.jsonl"
    first = compare(Runner(2, store=store), ("prumerge+", "fastv"), (64,))
    assert calls.count("fastv") == 1
    assert calls.count("random") % 3 == 0, "three seeds"
    done = len(calls)
    again = Runner(2, store=store)
    second = compare(again, ("prumerge+", "fastv"), (64,))
    assert len(calls) == done
    assert "evaluator" not in vars(again), "pictures were encoded for nothing"
    assert first == second
    compare(Runner(2, store=store), ("prumerge+", "fastv"), (64, 100), own=False)
    assert "prumerge+" in calls[done:], "a new budget is run"
    assert "full" not in calls[done:]


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch, calls):
    store, counted = tmp_path / "store.json", Evaluator.run

    def dies(self, method, **kwargs):
        if getattr(method, "name", "") == "spatial":
            raise KeyboardInterrupt
        return counted(self, method, **kwargs)

    monkeypatch.setattr(Evaluator, "run", dies)
    with pytest.raises(KeyboardInterrupt):
        compare(Runner(2, store=store), ("prumerge+",), (64,), own=False)
    done = list(calls)
    assert done == ["full", "prumerge+", *["random"] * 3]
    with store.open("a") as file:
        file.write('{"setting": "a line that a killed run left unfin')
    monkeypatch.setattr(Evaluator, "run", counted)
    compare(Runner(2, store=store), ("prumerge+",), (64,), own=False)
    assert calls[len(done) :] == ["spatial", "resize"]


def test_results_of_other_settings_are_never_used(tmp_path, monkeypatch, calls, pocket):
    store = tmp_path / "store.json"
    Runner(2, store=store).outcome(None)
    for other in (dict(scenes=3), dict(scenes=2, each=1), dict(scenes=2, seed=1)):
        calls.clear()
        Runner(**other, store=store).outcome(None)
        assert calls == ["full"], other
    for what in ("version", "weights"):
        calls.clear()
        with monkeypatch.context() as patch:
            if what == "version":
                patch.setattr("foveate.__version__", "0")
            else:
                other = replace(pocket)
                vars(other)["weights"] = "0"
                patch.setattr("foveate.lab.runner.load", lambda _, other=other: other)
            Runner(2, store=store).outcome(None)
        assert calls == ["full"], what
    assert len({json.loads(line)["setting"] for line in store.read_text().splitlines()}) == 6
    runner = Runner(2, store=store)
    calls.clear()
    for method in (foveate.PruMerge(budget=64), foveate.PruMerge(budget=64, k=3), foveate.PruMerge(budget=64.0 / 576)):
        runner.outcome(method)
    runner.outcome(foveate.PruMerge(budget=64))
    assert calls == ["prumerge"] * 3


def test_two_processes_share_a_store(tmp_path):
    path = tmp_path / "store.jsonl"
    one, two, third = Store(path, {"scenes": 3}), Store(path, {"scenes": 3}), Store(path, {"scenes": 3}, process=2)
    one.put("a", {"right": "1"})
    two.put("b", {"right": "0"})
    third.put("c", {"right": "1"})
    assert sorted(file.name for file in tmp_path.iterdir()) == ["store.jsonl", "store.jsonl.2"]
    again = Store(path, {"scenes": 3}, process=1)
    assert (again.get("a"), again.get("b"), again.get("c")) == ({"right": "1"}, {"right": "0"}, {"right": "1"})
    assert len(Store(path, {"scenes": 4})) == 0


def test_a_store_that_is_none(tmp_path):
    for text in (
        "nothing",
        "[]\n",
        '{"format": 0, "runs": {}}',
        '{"format": 1, "setting": "a"}\n',
        '{"setting": 1}\n',
        "[" * 9999 + "\n",
    ):
        (tmp_path / "store.json").write_text(text)
        with pytest.raises(foveate.InputError, match=r"no store of foveate.*another file"):
            Store(tmp_path / "store.json", {})
        assert (tmp_path / "store.json").read_text() == text
    with pytest.raises(foveate.InputError, match="cannot be written"):
        Store(tmp_path / "store.json" / "deeper.json", {})


# -- the report ----------------------------------------------------------------------------------------------------------------


def _row(report, method, budget):
    return next(row for row in report["rows"] if (row["method"], row["budget"]) == (method, budget))


def test_rows(runner, report):
    assert report["questions"] == 2 * SCENES
    names = {row["method"] for row in report["rows"]}
    assert names == {*NAMES, *BESIDE}, "baselines are there without being asked for"
    row, method = _row(report, "prumerge+", 64), foveate.PruMergePlus(budget=64)
    right = runner.evaluator.run(method).right
    assert row["accuracy"] == right.mean()
    assert row["tokens"] == row["mean_tokens"] == row["random_tokens"] == row["spatial_tokens"] == row["resize_tokens"] == 64
    seeds = np.mean([runner.evaluator.run(Random(budget=64, seed=seed)).right for seed in (0, 1, 2)], axis=0)
    assert _row(report, "random", 64)["accuracy"] == pytest.approx(seeds.mean())
    assert row["minus_random"][0] == pytest.approx(right.mean() - seeds.mean())
    assert row["minus_all"][0] == pytest.approx(right.mean() - report["all"]["accuracy"])
    assert _row(report, "spatial", 64)["minus_spatial"] is None
    for each in report["rows"]:
        assert each["low"] <= each["accuracy"] <= each["high"]
        assert each["minus_all"][1] <= each["minus_all"][0] <= each["minus_all"][2]


def test_methods_inside_the_decoder_are_compared_at_their_mean(report):
    row = _row(report, "fastv", 16)
    mean = (2 * 576 + 4 * 16) / 6
    assert (row["tokens"], row["mean_tokens"]) == (576, pytest.approx(mean))
    assert row["spatial_tokens"] == row["random_tokens"] == 204
    assert abs(row["resize_tokens"] - mean) < 10
    own = _row(report, "prumerge+", None)
    assert abs(own["spatial_tokens"] - own["mean_tokens"]) <= 6
    assert not _row(report, "spatial", 204)["asked"]


def test_cells_that_cannot_be_filled(report):
    assert {(entry["method"], entry["budget"]) for entry in report["missing"]} == {("yopo", 16), ("yopo", 64)}
    [reason] = reasons(report)
    assert reason.startswith("yopo at 16, 64: budget=16; it removes no single tokens")
    line = next(cells for _, cells in rank_rows(report) if cells[0] == "yopo")
    assert line[2:4] == ["-", "-"]
    assert "@288" in line[4]


def test_ranks():
    def row(method, kind, accuracy, gain):
        return dict(method=method, kind=kind, budget=64, asked=True, accuracy=accuracy, mean_tokens=64, minus_spatial=(gain, 0, 0))

    rows = [
        row("a", "baseline", 0.5, 0.0),
        row("b", "before the projector", 0.9, 0.4),
        row("c", "inside the encoder", 0.9, 0.4),
        row("d", "before the projector", 0.2, -0.3),
        row("e", "inside the decoder", 0.95, 0.01),
        row("f", "inside the decoder", 0.8, 0.2),
    ]
    found = ranks({"budgets": [64], "rows": rows})
    assert [found[name, 64] for name in "abcdef"] == [3, 1, 1, 4, 2, 1]
    lines = rank_rows({"budgets": [64], "rows": rows, "missing": [{"method": "g", "budget": 64}]})
    assert [cells[0] for _, cells in lines] == ["b", "c", "a", "d", "g", "f", "e"]
    assert points((0.1234, -0.05, 0.3)) == "+12.3 [-5.0, +30.0]"


def test_csv_has_every_row(report):
    lines = list(csv.DictReader(io.StringIO(csv_text(report))))
    assert len(lines) == len(report["rows"])
    for line, row in zip(lines, report["rows"], strict=True):
        assert line["method"] == row["method"]
        assert line["budget"] == str(row["budget"] or "own")
        assert float(line["accuracy"]) == row["accuracy"]
        assert (line["minus_spatial_low"] == "") == (row["minus_spatial"] is None)


def test_the_picture_of_many_methods(tmp_path, report):
    template = _row(report, "prumerge+", 64)
    kinds = ("inside the encoder", "before the projector", "inside the decoder")
    more = [
        template | {"method": f"method {i}", "kind": kinds[i % 3], "budget": 2**b, "mean_tokens": float(2**b), "accuracy": 0.03 * i}
        for i in range(27)
        for b in (4, 6, 8)
    ]
    save_comparison(report | {"rows": report["rows"] + more}, tmp_path / "many.png")
    save_comparison(report | {"rows": [row for row in report["rows"] if row["kind"] == "baseline"]}, tmp_path / "few.png")
    with Image.open(tmp_path / "many.png") as many, Image.open(tmp_path / "few.png") as few:
        assert many.height > 1.5 * few.height
        assert many.width > 2 * few.width


# -- the paper's tables --------------------------------------------------------------------------------------------------------


def _judge(number=40):
    families = np.array(["word", "color", "pair", "choice", "existence_random"] * number)
    scene = np.repeat(np.arange(number), 5)
    drawn = np.random.default_rng(0).multinomial(number, np.full(number, 1 / number), size=300)
    return Judge(Scores(families, scene, drawn))


def test_claims_are_judged_by_paired_intervals():
    judge, questions = _judge(), 200
    good, bad = np.ones(questions), np.zeros(questions)
    noisy = np.random.default_rng(1).random(questions) < 0.5
    a = TableLine("A", {"": "40"}, {"VQAT": 60.0, "MME": 1200.0, "POPE": 80.0}, right=good)
    b = TableLine("B", {"": "40"}, {"VQAT": 50.0, "MME": 1300.0, "POPE": 80.0}, right=bad)
    claims = claims_of(judge, ("VQAT", "MME", "POPE", "SQA"), lambda _: [{"": (a, b)}])
    assert [(claim.task, claim.above, claim.below) for claim in claims] == [("VQAT", "A", "B"), ("MME", "B", "A")], (
        "ties say nothing"
    )
    assert claims[0].sentence() == (
        "VQAT: the paper has A above B (60 against 50). Ours, on reading: agrees (+100.0 [+86.0, +100.0])."
    )
    assert claims[1].sentence() == (
        "MME: the paper has B above A (1300 against 1200). Ours, on pair: disagrees (-100.0 [-100.0, -86.0])."
    )
    even = [replace(line, right=value) for line, value in ((a, noisy), (b, np.roll(noisy, 5)))]
    [told, _] = claims_of(judge, ("VQAT", "MME"), lambda _: [{"": (even[0], even[1])}])
    assert told.verdicts() == {"": "cannot be told"}
    several = claims_of(judge, ("VQAT",), lambda _: [{"one": (a, b), "two": (b, a), "three": (a, replace(a, label="B"))}])
    text = several[0].sentence()
    assert text.index("agrees (one: +100.0") < text.index("disagrees (two: -100.0") < text.index("cannot be told (three: +0.0")
    assert tally([*claims, *several]).startswith(
        "5 comparisons with the paper's order: agrees 2, disagrees 2, cannot be told 1 (each at 95 %"
    )
    none = claims_of(judge, ("VQAT",), lambda _: [{"": (a, replace(b, right=None))}])
    assert none[0].sentence().endswith("Ours could not be run.")
    assert isinstance(none[0], Claim)


def test_groups_of_a_task():
    judge = _judge()
    right = np.array([family == "word" for family in judge.scores.families], float)
    line = TableLine("A", {}, {}, right=right)
    few = 1.959964**2  # Wilson's interval of 40 scenes that are all right, or all wrong
    assert judge.accuracy(line, "VQAT") == pytest.approx((1.0, 40 / (40 + few), 1.0))
    assert judge.accuracy(line, "POPE") == pytest.approx((0.0, 0.0, few / (40 + few)))
    assert judge.accuracy(line, "SQA")[0] == pytest.approx(0.2)
    assert judge.accuracy(replace(line, right=None), "VQAT") is None


def test_patterns_near_a_count():
    found = shapes_near(40)
    assert found == {"wide": (5, 8), "tall": (8, 5), "square": (6, 6)}
    for count in (16, 35, 83.4, 200, 576):
        shapes = shapes_near(count)
        assert shapes["wide"] == shapes["tall"][::-1]
        assert all(abs(rows * columns - count) <= 0.25 * count for rows, columns in shapes.values())


@pytest.mark.parametrize("number", sorted(BUILD))
def test_tables_of_the_paper(runner, number):
    found = paper_table(number, runner)
    json.dumps(found, allow_nan=False)
    assert not [line["reason"] for line in found["lines"] if line["reason"]]
    heads, rows = cells(found)
    assert all(len(row) == len(heads) for row in rows)
    assert set(NOTES[number]) <= set(found["notes"])
    text = "\n".join("\t".join(row) for row in rows)
    if number == 4:
        assert [row[0] for row in rows if row[0].startswith("Task")] == [
            "Task: VQAT / reading",
            "Task: MME / pair",
            "Task: POPE / existence",
            "Task: SQA / all",
        ]
        assert len(found["claims"]) == 12
        assert found["lines"][1]["tokens"] == round(found["lines"][0]["tokens"]), "at the mean count of PruMerge"
    if number == 5:
        assert len(rows) == 1 + 3 * 2 * 2
        assert len(found["claims"]) == 12
        assert {len(claim["ours"]) for claim in found["claims"]} <= {6, 0}
        assert all(f"{TABLE5['AITS'][1]:g} / " in text for _ in rows)
    if number == 7:
        assert [line["tokens"] for line in found["lines"]] == [576, 144, 144, 144, 144, 288, 288]
        assert len(found["claims"]) == 24
        assert [claim["above"] for claim in found["claims"] if claim["below"] == "PruMerge+ 50 %"] == ["CrossGET"], "on MME"
        assert any("LoRA-fine-tuned row of its Table 1" in note and "CrossGET" in note for note in found["notes"])
        assert set(TABLE7) <= {row[0] for row in rows}
    document = files({**found, "command": "foveate compare"})
    assert json.loads(document[f"table-{number}.json"])["claims"] == found["claims"]
    assert found["claims"][0]["sentence"] in document[f"table-{number}.md"]


# -- the command ---------------------------------------------------------------------------------------------------------------


def _options(tmp_path, **changes):
    options = dict(methods=None, budgets=None, own=True, scenes=3, each=2, seed=1, model="pocket", save=None, table=None)
    options |= {"store": tmp_path / "store.jsonl"}
    return CompareOptions(**{**options, **changes})


def test_defaults_are_everything(tmp_path):
    options = checked(_options(tmp_path))
    assert options.names == tuple(registered())
    assert options.counts is None
    assert options.command == "foveate compare --scenes 3 --each 2 --seed 1"
    assert parse_counts("64, 16,64") == (16, 64)
    with pytest.raises(foveate.InputError, match="1 is one token"):
        parse_counts("1.0,64,1")
    assert check_methods(("prumerge:paper", "prumerge", "prumerge")) == ("prumerge:paper", "prumerge")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(methods="prumerge,nothing"), r"unknown method 'nothing'; available: .*prumerge"),
        (dict(methods="prumerge:nothing"), r"no preset 'nothing'; available: paper, released"),
        (dict(methods="prumerge,,tome"), "empty entry.*separated by commas"),
        (dict(budgets="16,many"), r"no list of whole numbers or shares\. Give counts of 576"),
        (dict(budgets="16,,64"), "no list of whole numbers"),
        (dict(budgets="0,64"), "0 is not between 1 and 576"),
        (dict(budgets="577"), "577 is not between 1 and 576"),
        (dict(table=6), "no preset for table 6; choose one of 4, 5, 7"),
        (dict(table=4, methods="tome"), "Leave out --methods and --budgets"),
    ],
)
def test_bad_options(tmp_path, changes, message):
    with pytest.raises(foveate.InputError, match=message):
        checked(_options(tmp_path, **changes))


def test_bad_paths(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(foveate.InputError, match="cannot be written"):
        checked(_options(tmp_path, save=tmp_path / "file" / "results"))
    with pytest.raises(foveate.InputError, match="cannot be written"):
        checked(_options(tmp_path, save=tmp_path / "file"))
    with pytest.raises(foveate.InputError, match="is a folder"):
        checked(_options(tmp_path, store=tmp_path))


def test_the_command(capsys, monkeypatch, tmp_path):
    store, folder = tmp_path / "store.json", tmp_path / "results"
    arguments = ["compare", "--scenes", "3", "--methods", "prumerge+,evit", "--budgets", "64", "--store", str(store)]
    code, out, _ = invoke(capsys, monkeypatch, *arguments, "--save", str(folder))
    assert code == 0
    assert "prumerge+" in out
    assert "resize" in out
    assert sorted(file.name for file in folder.iterdir()) == [f"comparison.{end}" for end in ("csv", "json", "md", "png")]
    code, printed, _ = invoke(capsys, monkeypatch, *arguments, "--json")
    assert code == 0
    found = json.loads(printed)
    assert found == json.loads((folder / "comparison.json").read_text())
    written = (folder / "comparison.md").read_text()
    assert "foveate compare --methods prumerge+,evit --budgets 64 --scenes 3 --each 2 --seed 2403" in written
    for _, line in rank_rows(found):
        assert "| " + " | ".join(line) + " |" in written
    assert len((folder / "comparison.csv").read_text().splitlines()) == 1 + len(found["rows"])
    with Image.open(folder / "comparison.png") as picture:
        assert picture.width > 500


def test_the_command_with_a_table(capsys, monkeypatch, tmp_path):
    arguments = [
        "compare",
        "--table",
        "7",
        "--scenes",
        "3",
        "--store",
        str(tmp_path / "store.json"),
        "--save",
        str(tmp_path / "out"),
    ]
    code, out, _ = invoke(capsys, monkeypatch, *arguments)
    assert code == 0
    assert "VQAT: the paper has PruMerge+ 25 % above ToMe (57.1 against 56)" in out
    assert "LoRA-fine-tuned" in out
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["table-7.json", "table-7.md"]
    code, _, err = invoke(capsys, monkeypatch, "compare", "--methods", "nothing")
    assert code == 2
    assert "unknown method" in err
