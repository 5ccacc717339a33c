"""``foveate cost``: reported runs, properties, what is refused, the command line."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console
from transformers import AutoModelForImageTextToText

import foveate
from foveate.analysis.configs import read_architecture
from foveate.analysis.cost import cost
from foveate.analysis.hardware import HARDWARE, Hardware, get_hardware
from foveate.analysis.table2 import ROWS, table2
from foveate.analysis.workload import unreduced
from foveate.cli.cost import operator_table
from foveate.viz.roofline_chart import GROUPS, group, save_roofline

from .. import families, zoo
from ..cli.test_main import invoke
from ..family_reference import placeholders
from .test_cost import CONFIGS, IMAGE, SEEN, cache_bytes, counted, idle, llava, products

# -- runs that were reported ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    return zoo.load(attn="eager")


INPUTS = zoo.batch(rows=(0,))
TEXT = int((INPUTS["input_ids"] != IMAGE).sum())


@pytest.mark.parametrize(
    ("method", "more"),
    [
        (foveate.Sequential(budget=1.0), 0),
        (foveate.Resize(budget=36), 0.001),  # [CLS] goes through the projector, too
        (foveate.Spatial(budget=16), 0.001),
        (foveate.FastV(budget=16), 0.001),  # one row of attention
        (foveate.EViT(budget=30), 0.002),
        (foveate.ToMe(budget=40), 0.005),  # similarities
    ],
)
def test_a_report_is_priced_as_the_run_was(model, method, more):
    """Counted operations of the run: those of the report, and a little for choosing."""

    def run():
        return model.generate(**INPUTS, max_new_tokens=3, min_new_tokens=3, do_sample=False, return_dict_in_generate=True)

    with method(model) as session:
        flops, out = counted(run)
        report = session.report
    options = dict(text=TEXT, new_tokens=3, flash=False, dtype="float32", patches=36 if method.name == "resize" else None)
    found = cost(model, report=report, **options)
    assert products(found) <= flops <= (1 + more) * products(found)
    assert found.kv_cache == cache_bytes(out.past_key_values)
    assert cost(model, report=json.loads(report.to_json()), **options) == found
    whole = cost(model, report=unreduced(report.to_dict()), **(options | {"patches": None}))
    assert whole.lines == cost(model, **(options | {"patches": None})).lines
    if method.name == "fastv":
        assert len(set(found.work.run.visual)) > 1
        assert found.kv_cache < cost(model, visual=zoo.TOKENS, text=TEXT, new_tokens=3, dtype="float32").kv_cache


def test_a_report_of_a_batch_counts_its_mean(model):
    with foveate.Sequential(budget=16)(model) as session:
        model.generate(**zoo.batch(rows=(0, 1)), max_new_tokens=2, do_sample=False)
    found = cost(model, report=session.report, text=20)
    assert found.work.run.batch == 2
    assert found.work.run.visual == (1.5 * 16,) * 4  # one picture, and two
    assert found.work.run.pictures == (zoo.TOKENS,) * 3
    assert cost(model, report=session.report, text=20, batch=3).work.run.visual == (16,) * 4, "a third prompt, without a picture"
    with pytest.raises(foveate.InputError, match="batch=1; expected a whole number of 2 or more"):
        cost(model, report=session.report, text=20, batch=1)
    by_hand = cost(model, visual=[24.0] * 4, batch=2, text=20, pictures=1)
    assert [line for line in found.lines if line.part == "decoder"] == [line for line in by_hand.lines if line.part == "decoder"]


@pytest.mark.parametrize("family", SEEN)
@pytest.mark.parametrize("keep", [1.0, 4])
def test_reports_of_tiles_and_of_pictures_of_any_size(family, keep):
    """A prompt with two pictures: a tile and several, or of two sizes."""
    eager = dict(attn_implementation="eager", experts_implementation="eager")
    model = families.running(AutoModelForImageTextToText.from_pretrained(families.saved(family), **eager).eval())
    inputs = families.batch(family, rows=(1,))
    with foveate.Sequential(budget=keep)(model) as session:
        flops, out = counted(lambda: model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, return_dict_in_generate=True))
    text = int((~placeholders(inputs["input_ids"])).sum())
    found = cost(model, report=session.report, text=text, new_tokens=3, flash=False, dtype="float32")
    padded = family in ("mistral3", "lighton_ocr")  # to the larger picture, for the patch embedding
    padding = 2 * (8 * 10 - 6 * 6) * 588 * 48 if padded else 0
    rows = sum(session.report.after) + text + 2  # the prompt, and two tokens after it
    assert products(found) + padding == flops - idle(model, rows)
    assert found.kv_cache == cache_bytes(out.past_key_values)


# -- properties ----------------------------------------------------------------------------------------------------------------

NUMBERS = dict(
    visual=st.integers(0, 3000),
    text=st.integers(1, 500),
    batch=st.integers(1, 64),
    hardware=st.sampled_from(sorted(HARDWARE)),
    flash=st.booleans(),
    convention=st.sampled_from(["foveate", "llm-viewer"]),
    weight_bits=st.sampled_from([2, 4, 8, 16]),
    kv_bits=st.sampled_from([4, 8, 16]),
)
SUMS = ("flops", "bytes", "seconds")


@settings(max_examples=60, deadline=None)
@given(more=st.integers(1, 500), grown=st.sampled_from(["visual", "text", "batch"]), asked=st.fixed_dictionaries(NUMBERS))
def test_more_never_costs_less(more, grown, asked):
    small, large = (cost(new_tokens=3, **(asked | {grown: asked[grown] + extra})) for extra in (0, more))
    for phase in ("prefill", "decode"):
        for name in SUMS:
            assert small.total(name, phase) <= large.total(name, phase) * (1 + 1e-12)
    assert small.footprint < large.footprint


@settings(max_examples=60, deadline=None)
@given(asked=st.fixed_dictionaries(NUMBERS))
def test_every_time_is_on_the_roof(asked):
    found = cost(new_tokens=3, **asked)
    hardware = get_hardware(asked["hardware"])
    for line in found.lines:
        arithmetic, memory = line.flops / hardware.peak(line.bits), line.bytes / hardware.bandwidth
        assert line.seconds >= max(arithmetic, memory) * (1 - 1e-9)
        assert line.seconds <= (arithmetic + memory) * (1 + 1e-9)
        assert line.bound == ("compute" if arithmetic > memory else "memory") or math.isclose(arithmetic, memory)
    parts = found.to_dict()["parts"]
    assert found.prefill_seconds == pytest.approx(sum(part["seconds"] for part in parts["prefill"].values()))
    assert found.prefill_seconds + found.decode_seconds == pytest.approx(found.total("seconds"))


@settings(max_examples=30, deadline=None)
@given(asked=st.fixed_dictionaries(NUMBERS), cut=st.integers(1, 31), left=st.integers(0, 3000))
def test_counts_per_layer(asked, cut, left):
    plain = cost(new_tokens=3, **asked)
    each = asked | {"visual": [asked["visual"]] * 32}
    same = cost(new_tokens=3, pictures=len(plain.work.run.pictures) // asked["batch"], **each)
    assert same == plain
    left = min(left, asked["visual"])
    each["visual"] = [asked["visual"]] * cut + [left] * (32 - cut)
    cheaper = cost(new_tokens=3, pictures=0, **each)
    uncut, short = (cost(new_tokens=3, pictures=0, **(asked | {"visual": count})) for count in (asked["visual"], left))
    for name in ("flops", "kv_cache"):
        values = [each.kv_cache if name == "kv_cache" else each.total(name, part="decoder") for each in (short, cheaper, uncut)]
        mixed = (cut * values[2] + (32 - cut) * values[0]) / 32  # but for embeddings and head, which are not in layers
        assert values[0] <= values[1] <= values[2]
        assert values[1] == pytest.approx(mixed, rel=0.01)


def test_bits():
    options = dict(new_tokens=1, hardware="a100")
    whole = cost(**options)
    four = cost(weight_bits=4, **options)
    matrices = read_architecture("llava-1.5-7b").parameters["decoder matrices"]
    assert sum(whole.weights.values()) - sum(four.weights.values()) == matrices * 12 / 8
    assert cost(kv_bits=8, **options).kv_cache == whole.kv_cache / 2

    def peak(each, name):
        (line,) = (line for line in each.select("prefill", "decoder") if line.name == name)
        return line.flops / line.compute

    assert peak(four, "up_proj") == pytest.approx(312e12), "activations stay in 16 bits: the product runs in 16 bits"
    assert peak(cost(weight_bits=4, activation_bits=8, **options), "up_proj") == pytest.approx(624e12)
    assert peak(cost(weight_bits=4, activation_bits=4, **options), "up_proj") == pytest.approx(1248e12)
    assert peak(cost(weight_bits=4, activation_bits=4, **options), "lm_head") == pytest.approx(312e12), "is not quantised"
    assert peak(cost(weight_bits=4, activation_bits=4, hardware="v100"), "up_proj") == pytest.approx(112e12), "no integers there"
    assert peak(cost(dtype="float32", **options), "up_proj") == pytest.approx(19.5e12)
    assert peak(whole, "mlp activation") == pytest.approx(19.5e12), "not on tensor cores"


def test_the_vision_encoder_is_apart():
    one, five = cost(new_tokens=1), cost(pictures=5, visual=576, new_tokens=1)
    assert five.total("flops", part="vision tower") == pytest.approx(5 * one.total("flops", part="vision tower"))
    assert five.total("flops", part="decoder") == one.total("flops", part="decoder")
    assert one.work.run.visual == (576,) * 32
    assert cost(pictures=5).work.run.visual == (2880,) * 32
    text = cost(visual=0, new_tokens=1)
    assert {line.part for line in text.lines} == {"decoder"}
    fewer = cost(visual=144, new_tokens=1)
    assert fewer.total("flops", part="vision tower") == one.total("flops", part="vision tower")
    assert fewer.total("flops", part="projector") == pytest.approx(one.total("flops", part="projector") / 4)


# -- what cannot be priced -----------------------------------------------------------------------------------------------------


def test_configs_from_files(tmp_path, model):
    model.config.save_pretrained(tmp_path)
    expected = cost(model, text=9)
    for source in (tmp_path, str(tmp_path), tmp_path / "config.json", model.config):
        assert cost(source, text=9).lines == expected.lines


def mixtral():
    return hf.MixtralConfig(hidden_size=64, num_hidden_layers=2)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (mixtral, "text decoder of type 'mixtral'"),
        (lambda: llava(text_config=mixtral()), "text decoder of type 'mixtral'"),
        (lambda: llava(vision_config=hf.ViTConfig()), "vision encoder of type 'vit'"),
        (lambda: hf.MllamaConfig(), "model of type 'mllama'"),
        (lambda: hf.CLIPConfig(), "model of type 'clip'"),
        (lambda: hf.ViTConfig(), "text decoder of type 'vit'"),
    ],
)
def test_what_is_not_known_is_refused(source, message):
    with pytest.raises(foveate.UnsupportedModelError, match=message):
        cost(source())


SEEN, TILED = {"row": 0, "grid": [24, 24]}, {"row": 0, "grid": [36, 48]}


def test_tiles_that_a_report_does_not_tell_apart():
    report = {"layers": [900] * 32, "images": [SEEN, TILED], "encoder_layers": []}
    assert cost(report=report, text=40, pictures=7) == cost(visual=[900.0] * 32, pictures=7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hardware": "abacus"}, "unknown hardware 'abacus'; the table has v100, a100"),
        ({"visual": -1}, "visual=-1; expected a whole number of 0 or more"),
        ({"visual": 5.5}, "visual=5.5"),
        ({"visual": 10**400}, "expected a whole number from 0 to 1,000,000,000"),
        ({"visual": [576] * 31 + [10**400]}, "expected numbers of tokens from 0 to 1,000,000,000"),
        ({"text": 10**10}, "text=10000000000; expected a whole number from 0"),
        ({"batch": 10**20}, "expected a whole number from 1 to 1,000,000"),
        ({"batch": 1000, "pictures": 1001}, "pictures=1001; expected a whole number from 0 to 1,000"),
        ({"new_tokens": 10**7}, "expected a whole number from 1 to 100,000"),
        ({"visual": [576] * 31}, "visual has 31 numbers; llava-1.5-7b has 32 decoder layers"),
        ({"visual": [576] * 31 + [math.nan]}, "visual holds nan"),
        ({"visual": True}, "visual=True"),
        ({"visual": 0, "text": 0}, "there is a layer without tokens"),
        ({"visual": [576] * 31 + [0], "text": 0}, "there is a layer without tokens"),
        ({"batch": 0}, "batch=0"),
        ({"text": -1}, "text=-1"),
        ({"new_tokens": 0}, "new_tokens=0"),
        ({"pictures": -1}, "pictures=-1"),
        ({"patches": 0}, "patches=0"),
        ({"dtype": "int8"}, "unknown dtype 'int8'"),
        ({"weight_bits": 0}, "weight_bits=0"),
        ({"kv_bits": 32}, "kv_bits=32; expected more than 0 and at most 16"),
        ({"convention": "mine"}, "unknown convention 'mine'"),
        ({"model": "./nowhere"}, "there is no ./nowhere"),
        ({"model": 7}, "int has no config"),
        ({"report": {}}, "Give text="),
        ({"report": {}, "text": 40, "visual": 5}, "a report brings its own"),
        ({"report": {}, "text": 40}, "is no report of a session"),
        ({"report": {"layers": [9] * 6, "images": [SEEN], "encoder_layers": []}, "text": 40}, "model with 6 decoder layers"),
        ({"report": {"layers": [], "images": [], "encoder_layers": []}, "text": 40}, "without pictures"),
        ({"report": {"layers": [9] * 32, "images": [TILED], "encoder_layers": []}, "text": 40}, "Give pictures="),
    ],
)
def test_bad_numbers(options, message):
    with pytest.raises(foveate.InputError, match=message.replace(".", r"\.")):
        cost(**options)


def test_encoders_of_any_size_need_patches():
    with pytest.raises(foveate.InputError, match="Give patches="):
        cost(CONFIGS["qwen2_vl"]())
    assert cost(CONFIGS["qwen2_vl"](), patches=64).work.run.visual == (16,) * 4
    assert cost(CONFIGS["qwen2_vl"](), visual=0).work.run.pictures == ()


@pytest.mark.parametrize("field", ["bandwidth", "fp16", "int8"])
def test_hardware_is_checked(field):
    with pytest.raises(foveate.InputError, match=f"{field}=0 of hardware 'mine'"):
        Hardware(**({"name": "mine", "bandwidth": 1, "fp16": 1, "fp32": 1} | {field: 0}))


# -- the command line ----------------------------------------------------------------------------------------------------------


def test_command(capsys, monkeypatch, tmp_path):
    arguments = ("cost", "--visual", "576,144", "--hardware", "h100", "--new-tokens", "8")
    code, out, _ = invoke(capsys, monkeypatch, *arguments)
    assert code == 0
    assert all(
        part in out for part in ("576 visual tokens", "144 visual tokens", "vision tower", "lm_head", "bound by", "side by side")
    )
    assert out.index("prefill TFLOPs: decoder") < out.index("lm_head")  # the summary is first
    code, out, _ = invoke(capsys, monkeypatch, *arguments, "--json", "--save", str(tmp_path / "roof"))
    document = json.loads(out)
    with Image.open(document["picture"]) as picture:
        assert picture.width > picture.height > 600
    assert document["picture"].endswith("roof.png")
    for name, count in (("576 visual tokens", 576), ("144 visual tokens", 144)):
        expected = cost(hardware="h100", visual=count, new_tokens=8)
        assert document["runs"][name] == json.loads(json.dumps(expected.to_dict()))
        assert f"{1e3 * expected.prefill_seconds:.2f} ms" in str(expected)


@pytest.mark.parametrize("run", [{"visual": 144}, {"visual": 2880, "pictures": 5, "batch": 16}, {"hardware": "cpu", "batch": 4}])
def test_tables_fit_a_terminal(run):
    """Of 80 columns: nothing is cut short, and each number is that of the operator."""
    found = cost("llava-1.5-13b", **run)
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(operator_table("run", found))
    lines = console.export_text().splitlines()
    assert "…" not in "".join(lines)
    assert max(map(len, lines)) <= 80
    (shown,) = (line.split() for line in lines if line.startswith("decode x63: decoder"))
    assert float(shown[-1].replace(",", "")) == pytest.approx(1e3 * found.decode_seconds, rel=1e-2)


def test_command_layers_and_other_hardware(capsys, monkeypatch):
    arguments = ("cost", "--layers", "2 x 576, 30x144", "--bandwidth", "1000", "--peak", "200", "--json", "--no-flash")
    code, out, _ = invoke(capsys, monkeypatch, *arguments)
    assert code == 0
    (run,) = json.loads(out)["runs"].values()
    assert run["workload"]["visual"] == [576] * 2 + [144] * 30
    assert (run["hardware"]["bandwidth"], run["hardware"]["fp16"]) == (1e12, 2e14)
    assert (
        run["prefill_seconds"]
        == cost(visual=[576] * 2 + [144] * 30, hardware=Hardware("mine", 1e12, 2e14, 2e14), flash=False).prefill_seconds
    )


def test_command_prices_a_report(capsys, monkeypatch, tmp_path, model):
    with foveate.FastV(budget=16)(model) as session:
        model.generate(**INPUTS, max_new_tokens=2, do_sample=False)
    model.config.save_pretrained(tmp_path)
    (tmp_path / "report.json").write_text(session.report.to_json())
    arguments = ("cost", str(tmp_path), "--report", str(tmp_path / "report.json"), "--text", str(TEXT), "--json")
    code, out, _ = invoke(capsys, monkeypatch, *arguments)
    assert code == 0
    runs = json.loads(out)["runs"]
    assert list(runs) == ["all visual tokens", "fastv"]
    assert runs["all visual tokens"]["workload"]["visual"] == [zoo.TOKENS] * 4
    assert runs["fastv"]["workload"]["visual"] == [64, 64, 16, 16] == session.report.layers
    assert runs["fastv"]["prefill_seconds"] == cost(model, report=session.report, text=TEXT).prefill_seconds
    code, out, _ = invoke(capsys, monkeypatch, *arguments, "--patches", "36")  # of the smaller picture of that run
    pictures = [run["workload"]["pictures"] for run in json.loads(out)["runs"].values()]
    assert pictures == [[zoo.TOKENS], [36]]


def test_command_table_2(capsys, monkeypatch):
    code, out, _ = invoke(capsys, monkeypatch, "cost", "--table", "2")
    assert code == 0
    assert all(cell in out for cell in ("9.3 / 9.33", "151.6 / 151.64", "0.28 / 0.227 *", "4.60 / 4.645"))
    assert out.count(" * ") == 1, "one cell is more than 3.5 % apart"
    assert " ".join(table2()["explanation"].split()) in " ".join(out.split())
    code, out, _ = invoke(capsys, monkeypatch, "cost", "--table", "2", "--json")
    assert json.loads(out) == table2()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (("--table", "2", "--html", "page.html"), "--table brings its own numbers"),
        (("--table", "2", "--save", "roofline.png"), "--table brings its own numbers"),
        (("--table", "2", "--visual", "576"), "--table brings its own numbers"),
        (("--exits", "2:0.4,2:0.5"), "names layer 2 twice"),
        (("--layers", "99999999999x5"), "more than 10000 decoder layers"),
    ],
)
def test_command_refuses_what_it_would_leave_out(capsys, monkeypatch, tmp_path, asked, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = invoke(capsys, monkeypatch, "cost", *asked)
    assert (code, out) == (2, "")
    assert message in err


def test_the_page_says_what_the_command_says():
    page = (Path(__file__).parents[2] / "docs" / "cost.md").read_text()
    document = table2()
    assert document["explanation"] in " ".join(page.split())
    for row, found in zip(ROWS, document["rows"], strict=True):
        (line,) = (each for each in page.splitlines() if f"| {row.method} | {row.backbone} | {row.quantization} |" in each)
        cells = [cell.strip(" *").split(" / ") for cell in line.split("|")[5:-1]]
        for (printed, ours), paper, value in zip(cells, row.printed, found["ours"].values(), strict=True):
            assert printed == paper
            assert float(ours) == round(value, len(ours.partition(".")[2]))
    assert "bound by memory below 130 tokens on a V100, 162 on an A100, 328 on an H100" in " ".join(page.split())
    for hardware, bound in (("v100", 130), ("a100", 162), ("h100", 328)):
        for text, what in ((bound - 1, "memory"), (bound, "compute")):
            lines = cost(hardware=hardware, visual=0, text=text, new_tokens=1).lines
            assert [line.bound for line in lines if line.name == "up_proj"] == [what]
    heads = ("vision encoder", "576", "144", "64")
    assert f"| {' | '.join(heads)} |" in page
    for line in (each for each in page.splitlines() if each.startswith(tuple(f"| `{name}`" for name in HARDWARE))):
        name, *shown, steps = (cell.strip(" `") for cell in line.strip("|").split("|"))
        runs = [cost(hardware=name.split("`")[0], visual=visual) for visual in (576, 144, 64)]
        exact = [runs[0].total("seconds", part="vision tower"), *(run.prefill_seconds for run in runs)]
        exact += [runs[0].token_seconds, runs[2].token_seconds]
        for text, seconds in zip([*shown, *steps.split(" / ")], exact, strict=True):
            assert float(text) == pytest.approx(1e3 * seconds, rel=0.02), line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--hardware", "abacus"), "unknown hardware 'abacus'"),
        (("--peak", "5"), "needs both --bandwidth"),
        (("--visual", "lots"), "--visual 'lots' is no count"),
        (("--visual", "5,"), "--visual '5,' is no count"),
        (("--layers", "32"), "visual has 1 numbers"),
        (("--layers", "ax5"), "--layers 'ax5' is no list"),
        (("--table", "4"), "there is no cost table 4"),
        (("./nowhere",), "there is no ./nowhere"),
        (("--report", "none.json"), "none.json cannot be read"),
        (("--report", "{folder}/bad.json", "--text", "4"), "is no report of a session"),
        (("--report", "{folder}/bad.json", "--visual", "4"), "a report brings its own visual tokens"),
        (("--save", "x.abc"), "cannot be saved as '.abc'"),
    ],
)
def test_command_errors(capsys, monkeypatch, tmp_path, arguments, message):
    (tmp_path / "bad.json").write_text("{}")
    code, out, err = invoke(capsys, monkeypatch, "cost", *(part.format(folder=tmp_path) for part in arguments))
    assert (code, out) == (2, "")
    assert message in err


def test_picture(tmp_path):
    runs = {"all": cost(new_tokens=1, question=9), "fewer": cost(visual=100, new_tokens=1)}
    assert {group(line) for line in runs["all"].lines} == set(GROUPS)
    save_roofline(runs, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 20_000
    with pytest.raises(foveate.InputError, match="on 2 processors"):
        save_roofline({"a": cost(), "b": cost(hardware="l4")}, tmp_path / "b.png")
