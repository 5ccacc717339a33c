"""``foveate bench``: what is possible, families, refusals, ledger and command line."""

from __future__ import annotations

import json
import subprocess
import time

import pytest
import torch
from PIL import Image

import foveate
from foveate.analysis.cost import cost
from foveate.analysis.decoders import _DECODERS
from foveate.analysis.flops import prefill_flops
from foveate.analysis.hardware import Hardware
from foveate.engine.model.anatomy import anatomy
from foveate.families import FAMILIES
from foveate.measuring import bench, ideal, ledger, runs
from foveate.pocket import load_pocket
from foveate.pocket.vocabulary import build_tokenizer

from .. import families, zoo
from ..cli.test_main import invoke
from .test_bench import stub_methods

MACHINE = Hardware("a machine", 1e10, 1e12, 1e12)
RUNS_AT_ONCE = Hardware("no memory wall", 1e30, 1e12, 1e12)


# -- what is possible


def ideal_of(family, method, rows, new_tokens=5, hardware=MACHINE):
    model, inputs = families.load(family), families.batch(family, rows=rows)
    run = runs.TimedRunner(model, inputs, new_tokens)
    parts, report = anatomy(model), run.inspect(method).report
    text = inputs["input_ids"].shape[1] - int(parts.visual(inputs["input_ids"]).sum()) // len(rows)
    pictures = run.inspect(None).pictures // len(rows) or None
    found = ideal.ideal_ratios(parts, method, report, text=text, pictures=pictures, new_tokens=new_tokens, hardware=hardware)
    return found, text


def test_the_ideal_is_the_roofline_of_the_same_tokens():
    method = foveate.Compose(foveate.get("spatial", budget=32), foveate.get("fastv", layer=2, budget=0.25))
    found, text = ideal_of("llava", method, [0])
    model = families.load("llava")
    costs = [
        cost(model, hardware=MACHINE, visual=visual, text=text, new_tokens=5, dtype="float32")
        for visual in ([32, 32, 8, 8], [64] * 4)
    ]
    assert found.by == "roofline"
    ratios = {
        "vision": [sum(c.total("seconds", "prefill", part) for part in ("vision tower", "projector")) for c in costs],
        "prefill": [c.total("seconds", "prefill", "decoder") for c in costs],
        "decode": [c.decode_seconds for c in costs],
        "first token": [c.prefill_seconds for c in costs],
        "end to end": [c.prefill_seconds + c.decode_seconds for c in costs],
    }
    assert found.ratios == pytest.approx({part: few / all_ for part, (few, all_) in ratios.items()})
    at_once, _ = ideal_of("llava", method, [0], hardware=RUNS_AT_ONCE)
    flops = [prefill_flops(model.config, [text + n for n in visual]) for visual in ([32, 32, 8, 8], [64] * 4)]
    assert at_once.ratios["prefill"] == pytest.approx(flops[0] / flops[1], rel=0.05)  # no norms, rotations and the like there


def test_the_ideal_of_a_smaller_picture_counts_its_encoder():
    found, text = ideal_of("llava", foveate.get("resize", budget=16), [0], hardware=RUNS_AT_ONCE)
    costs = [
        cost(families.load("llava"), hardware=RUNS_AT_ONCE, visual=n, patches=n, text=text, new_tokens=5, dtype="float32").to_dict()
        for n in (16, 64)
    ]
    assert found.ratios["first token"] == pytest.approx(costs[0]["prefill_seconds"] / costs[1]["prefill_seconds"])
    assert found.ratios["vision"] < 0.3


def test_where_there_is_no_roofline(monkeypatch):
    monkeypatch.setattr("foveate.analysis.decoders._DECODERS", {"llama": _DECODERS["llama"]})  # InternVL has Qwen2's
    found, text = ideal_of("internvl", foveate.get("spatial", budget=0.5), [0])
    assert found.by == "FLOPs"
    assert "qwen2" in found.reason
    report = runs.TimedRunner(families.load("internvl"), families.batch("internvl", rows=[0]), 2)
    few = report.inspect(foveate.get("spatial", budget=0.5)).report
    config = families.load("internvl").config
    expected = prefill_flops(config, text + few.after[0]) / prefill_flops(config, text + few.before[0])
    assert found.ratios == {"prefill": pytest.approx(expected)}
    nothing, _ = ideal_of("llava", foveate.get("yopo"), [0])
    assert (nothing.by, nothing.ratios) == ("nothing", {})
    assert "yopo" in nothing.reason


def test_tiles_and_newlines_are_counted():
    """One picture in several tiles, and visual tokens that are in no grid."""
    found, text = ideal_of("llava_onevision", foveate.get("spatial", budget=0.5), [0], hardware=RUNS_AT_ONCE)
    inputs, model = families.batch("llava_onevision", rows=[0]), families.load("llava_onevision")
    before = int(anatomy(model).visual(inputs["input_ids"]).sum())
    after = runs.TimedRunner(model, inputs, 2).inspect(foveate.get("spatial", budget=0.5)).report.after[0]
    flops = [prefill_flops(model.config, text + visual) for visual in (after, before)]
    assert found.by == "roofline"
    assert found.ratios["prefill"] == pytest.approx(flops[0] / flops[1], rel=0.02)
    tiles, depth = len(inputs["pixel_values"][0]), len(model.get_decoder().layers)
    costs = [
        cost(model, hardware=RUNS_AT_ONCE, visual=[visual] * depth, pictures=tiles, text=text, new_tokens=5, dtype="float32")
        for visual in (after, before)
    ]
    assert found.ratios["first token"] == pytest.approx(costs[0].prefill_seconds / costs[1].prefill_seconds)
    assert tiles > 4
    three = runs.repeated(inputs, 3)
    method = {"spatial": foveate.get("spatial", budget=0.5)}
    (variant,) = bench.measure(model, three, method, hardware=MACHINE, rounds=1, new_tokens=2).methods
    expected = [
        cost(model, hardware=MACHINE, visual=[n] * depth, pictures=tiles, batch=3, text=text, new_tokens=2, dtype="float32")
        for n in (after, before)
    ]
    assert variant.ideal.ratios["end to end"] == pytest.approx(
        (expected[0].prefill_seconds + expected[0].decode_seconds) / (expected[1].prefill_seconds + expected[1].decode_seconds)
    )


def test_the_rates_of_this_machine(monkeypatch):
    steps = iter([9.0, 0.5, 0.3, 0.4])
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def call():
        now[0] += next(steps)

    assert ideal.best_time(call, torch.device("cpu"), least=1.0) == pytest.approx(0.3)  # the first one warms up
    monkeypatch.setattr(ideal, "SIDE", {"cpu": 8})
    monkeypatch.setattr(ideal, "COPIED", {"cpu": 1024})
    seconds = iter([1.0, 0.5, 0.25])  # float32, bfloat16, copy

    def timed(call, device, least):
        call()
        return next(seconds)

    monkeypatch.setattr(ideal, "best_time", timed)
    found = ideal.this_machine(torch.device("cpu"), torch.bfloat16)
    assert (found.fp32, found.fp16, found.bandwidth) == (2 * 8**3, 4 * 8**3, 2 * 1024 / 0.25)
    assert found.peak(32) == 2 * 8**3


# -- families, refusals, ledger, command line


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family):
    """Batches of rows with different pictures, videos and text alone."""
    inputs = families.batch(family)
    before = int(anatomy(families.load(family)).visual(inputs["input_ids"]).sum())
    method = {"spatial": foveate.get("spatial", budget=0.5)}
    found = bench.measure(families.load(family), inputs, method, hardware=MACHINE, rounds=1, new_tokens=2)
    (variant,) = found.methods
    assert found.base.visual == [before] * len(found.base.inspected.cache)
    assert 0 < variant.visual[0] < before
    assert (variant.cache < found.base.cache) == (family != "llava_next")  # its window is shorter than both prompts
    assert variant.parts == [*runs.PARTS]
    assert found.base.parts == [part for part in runs.PARTS if part != "selection"]
    assert all(value > 0 for part in variant.parts for value in variant.seconds(part))
    assert variant.ideal.by in ("roofline", "FLOPs")
    assert bool(variant.ideal.reason) == (variant.ideal.by == "FLOPs")
    assert 0 < variant.ideal.ratios["prefill"] < 1


def test_refusals():
    model, inputs = families.load("llava"), families.batch("llava", rows=[0])
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with pytest.raises(foveate.InputError, match="no picture"):
        runs.TimedRunner(model, text, 2)
    with pytest.raises(foveate.InputError, match="decode step"):
        runs.TimedRunner(model, inputs, 1)
    with foveate.get("prumerge+")(model), pytest.raises(foveate.InputError, match="Detach it first"):
        runs.TimedRunner(model, inputs, 2)
    for methods, rounds in (({}, 1), ({"unreduced": foveate.get("prumerge+")}, 1), (stub_methods(), 0)):
        with pytest.raises(foveate.InputError, match=r"expected 1 or more|at least one method"):
            bench.measure(model, inputs, methods, hardware=MACHINE, rounds=rounds)
    several = torch.nn.ModuleList([torch.nn.Linear(1, 1), torch.nn.Linear(1, 1, device="meta")])
    with pytest.raises(foveate.InputError, match=r"several devices \(cpu, meta\)"):
        runs.check_one_device(several)
    with pytest.raises(foveate.InputError, match="the model is on meta"):
        runs.check_one_device(several[1])


def test_a_run_that_stops_early_is_no_measurement():
    model = zoo.load()
    model.generation_config.max_time = 1e-9
    with pytest.raises(foveate.InputError, match=r"ran 1 times for 4 new tokens.*max_time"):
        runs.TimedRunner(model, zoo.batch(rows=[0]), 4)(None)


def test_the_commit_is_that_of_the_checkout_the_package_lies_in(tmp_path):
    package = tmp_path / "foveate"
    package.mkdir()
    assert ledger.commit(package) is None
    (package / "a.py").write_text("1")

    def git(*words):
        done = subprocess.run(["git", "-C", str(tmp_path), *words], check=True, capture_output=True, text=True)
        return done.stdout.strip()

    git("init", "-q")
    git("add", ".")
    git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "a")
    assert ledger.commit(package) == git("rev-parse", "HEAD")
    (package / "a.py").write_text("2")
    assert ledger.commit(package) == git("rev-parse", "HEAD") + "-dirty"


def test_a_busy_machine_is_noted(monkeypatch):
    monkeypatch.setattr(ledger, "cores", lambda: 4)
    assert ledger.busy(None) is ledger.busy([0.9, 5.0, 5.0]) is None
    assert "load average 3.0 on 4 cores" in ledger.busy([3.0, 0.0, 0.0])


@pytest.fixture
def quick(monkeypatch):
    """The rates of this machine, from next to nothing."""
    monkeypatch.setattr(ideal, "LEAST", 0.0)
    monkeypatch.setattr(ideal, "SIDE", {"cpu": 64})
    monkeypatch.setattr(ideal, "COPIED", {"cpu": 2**16})


@pytest.mark.usefixtures("quick")
def test_the_pocket_model(capsys, monkeypatch, tmp_path):
    file = tmp_path / "bench.json"
    arguments = ("--method", "fastv", "--budget", "144", "--new-tokens", "3", "--rounds", "2", "--json", str(file))
    code, out, err = invoke(capsys, monkeypatch, "bench", *arguments)
    assert code == 0, err
    assert out.count("too few rounds to tell") == 5
    assert "faster" not in out
    assert "counted" in out
    assert "peak memory is measured on CUDA only" in out
    document = json.loads(file.read_text())
    assert document["command"] == f"foveate bench {' '.join(arguments)}"
    assert document["versions"].keys() == {"python", "torch", "transformers", "foveate", "commit"}
    assert document["versions"]["torch"] == torch.__version__
    assert document["machine"]["threads"] == torch.get_num_threads()
    assert document["machine"]["processor"]
    assert document["load_average"].keys() == {"before", "after"}
    parameters = sum(parameter.numel() for parameter in load_pocket()[0].parameters())
    model = {"name": "pocket", "type": "llava", "parameters": parameters, "dtype": "float32", "attention": "sdpa"}
    assert document["model"] == model
    assert (document["settings"]["rounds"], document["settings"]["prompt"][-1]) == (2, "?")
    assert document["hardware_measured"]["bandwidth"] > 0
    (measured,) = document["batches"]
    whole, cut = measured["variants"]
    token = whole["kv_cache_bytes"]["layers"][0] // (whole["prompt_tokens"] + 2)
    text = whole["prompt_tokens"] - 576
    assert cut["visual_tokens"] == [576, 576, 144, 144, 144, 144]
    assert cut["kv_cache_bytes"]["layers"] == [(visual + text + 2) * token for visual in cut["visual_tokens"]]
    assert cut["kv_cache_ratio"] == pytest.approx(sum(n + text + 2 for n in cut["visual_tokens"]) / (6 * (text + 578)))
    assert "against_unreduced" not in whole
    assert {len(times) for times in cut["rounds"].values()} == {2}
    assert cut["peak_memory_bytes"] is None
    assert cut["ideal"]["by"] == "roofline"
    for part, found in cut["against_unreduced"].items():
        ratios = [a / b for a, b in zip(cut["rounds"][part], whole["rounds"][part], strict=True)]
        assert found["ratio"] == pytest.approx(sum(ratios) / 2)
        assert (found["interval"], found["realised"], found["verdict"]) == (None, None, "too few rounds to tell")


@pytest.mark.usefixtures("quick")
def test_a_model_of_ones_own(capsys, monkeypatch, tmp_path):
    """A folder without a chat template, a picture, two batch sizes, two methods, eager attention and bfloat16."""
    from transformers import CLIPImageProcessor, LlavaProcessor

    folder, file, picture = tmp_path / "model", tmp_path / "bench.json", tmp_path / "grey.png"
    model, tokenizer = zoo.load(decoder="qwen2"), build_tokenizer()
    model.config.image_token_index = tokenizer.convert_tokens_to_ids("<image>")
    model.resize_token_embeddings(len(tokenizer) + 8)
    model.save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": zoo.SIDE}, crop_size={"height": zoo.SIDE, "width": zoo.SIDE})
    options = dict(patch_size=zoo.PATCH, vision_feature_select_strategy="default", num_additional_image_tokens=1)
    LlavaProcessor(image_processor=images, tokenizer=tokenizer, **options).save_pretrained(folder)
    Image.new("RGB", (150, 150), (90, 120, 128)).save(picture)
    asked = ("--model", str(folder), "--image", str(picture), "--prompt", "what is it ?", "--dtype", "bfloat16", "--attn", "eager")
    more = ("--device", "cpu", "--batch", "2,1", "--rounds", "6", "--new-tokens", "4", "--json", str(file))
    methods = ("--method", "prumerge+", "--method", "fastv", "--budget", "0.25")
    code, _, err = invoke(capsys, monkeypatch, "bench", *asked, *more, *methods)
    assert code == 0, err
    document = json.loads(file.read_text())
    assert (document["model"]["dtype"], document["model"]["attention"]) == ("bfloat16", "eager")
    assert (document["settings"]["picture"], document["settings"]["prompt"]) == (str(picture), "what is it ?")
    assert any("no chat template" in note for note in document["notes"])
    assert [each["batch"] for each in document["batches"]] == [2, 1]
    kept = zoo.TOKENS // 4
    for each in document["batches"]:
        whole, front, inside = each["variants"]
        assert [variant["name"] for variant in each["variants"]] == ["unreduced", "prumerge+", "fastv"]
        assert front["visual_tokens"] == [each["batch"] * kept] * 4
        assert inside["visual_tokens"] == [each["batch"] * n for n in (zoo.TOKENS, zoo.TOKENS, kept, kept)]
        assert len(each["orders"]) == len(whole["rounds"]["prefill"]) == 6
        found = front["against_unreduced"]["prefill"]
        ratios = [a / b for a, b in zip(front["rounds"]["prefill"], whole["rounds"]["prefill"], strict=True)]
        assert found["interval"] == pytest.approx([min(ratios), max(ratios)])  # of six rounds


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--batch", "1,0"), "--batch '1,0' is no list"),
        (("--batch", "2,2"), "is no list of different batch sizes"),
        (("--method", "fastv", "--method", "fastv"), "the method fastv is given twice"),
        (("--method", "dance"), "dance"),
        (("--method", "spatial"), "'spatial' has no rule of its own"),
        (("--dtype", "int3"), "choose one of float32, bfloat16, float16"),
        (("--device", "abacus"), "cannot be used here"),
        (("--device", "mps"), "cannot be used here"),
        (("--attn", "telepathy"), "cannot be loaded: Specified `attn_implementation"),
        (("--json", "pyproject.toml/bench.json"), "cannot be written"),
        (("--image", "no-such-picture.png"), "there is no file no-such-picture.png"),
        (("--model", "./no-such-model"), "there is no folder ./no-such-model"),
        (("--new-tokens", "1"), "new-tokens"),
    ],
)
def test_the_command_refuses(capsys, monkeypatch, arguments, message):
    code, out, err = invoke(capsys, monkeypatch, "bench", *arguments)
    assert code == 2
    assert message in err
    assert out == ""


@pytest.mark.usefixtures("quick")
def test_a_batch_that_does_not_fit(capsys, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(runs.TimedRunner, "inspect", full)
    code, _, err = invoke(capsys, monkeypatch, "bench", "--batch", "64")
    assert code == 2
    assert "a batch of 64 does not fit into the memory of cpu" in err


def test_help_has_an_example(capsys, monkeypatch):
    code, out, _ = invoke(capsys, monkeypatch, "bench", "--help")
    assert code == 0
    assert "foveate bench --model" in out
