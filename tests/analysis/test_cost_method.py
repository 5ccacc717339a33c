"""What methods cost by themselves, beside operations that are counted on real runs; and exits from decoder layers."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

import foveate
from foveate.analysis.cost import cost
from foveate.cli.main import app
from foveate.errors import InputError

PROMPT = "<image> what color is it ?"
LAYERS, TOKENS = 32, 576  # of LLaVA-1.5-7B


def encoded(model, method, inputs) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        foveate.encode(model, method, **inputs)
    return counter.get_total_flops()


def products(each, part) -> float:
    return sum(line.flops for line in each.select("prefill", part) if line.bits)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("quecc", {"stride": 4, "heads": 4, "reader": "none"}),
        ("quecc", {"stride": 3, "heads": 4, "reader": "embeddings"}),
        ("vistog", {"groups": 36}),
        ("divprune", {"budget": 36}),
        ("prumerge+", {"budget": 36}),
    ],
)
def test_it_is_what_a_real_run_has_more_than_one_that_chooses_nothing(name, fields):
    model, processor = foveate.load_pocket(attn_implementation="eager")
    inputs = processor(images=Image.new("RGB", (192, 192), "red"), text=PROMPT, return_tensors="pt")
    method = foveate.get(name, **fields)
    method = method.fresh() if method.trained() else method
    kept = int(method.layer_tokens(TOKENS, 6)[0])
    own = encoded(model, method, inputs) - encoded(model, foveate.get("sequential", budget=kept), inputs)
    whole, plain = cost(model, method=method, new_tokens=1), cost(model, visual=kept, new_tokens=1)
    found = products(whole, "method") + products(whole, "projector") - products(plain, "projector")
    assert found == pytest.approx(own, rel=0.02)


def test_quecc_on_a_large_model():
    """Its matrices, by the sizes of the paper's modules."""
    found = cost(method="quecc", new_tokens=1)
    C, D, levels, cells, kept = 1024, 4096, 4, 576, 36
    flops = 2 * D * C  # the question
    flops += cells * 2 * (2 * C * C)  # queries
    flops += 2 * cells * 2 * (levels * C * C + C * C)  # keys and values
    flops += kept * 16 * 2 * C  # the convolution, channel by channel
    flops += 2 * (cells * 2 * 2 * C * C + kept * 2 * 2 * C * C) / 2  # projections inside the attention
    flops += 2 * cells * 2 * C  # scores, and their sums
    (line,) = found.select("prefill", "method")
    assert line.flops == pytest.approx(flops, rel=1e-3)
    assert line.weights / 4 == pytest.approx(21.0e6, rel=0.003)
    assert found.weights["method"] == line.weights
    assert set(found.work.run.visual) == {36.0}
    assert found.work.run.question == 40
    assert cost(method="quecc", question=0, new_tokens=1).work.run.question == 0
    assert cost(method=foveate.get("quecc", reader="none"), new_tokens=1).work.run.question == 0


def test_methods_whose_counts_depend_on_the_picture_want_them():
    with pytest.raises(InputError, match="depends on the picture"):
        cost(method="prumerge")
    assert set(cost(method="prumerge", visual=83).work.run.visual) == {83}
    assert not cost(visual=0, method="prumerge").select(part="method")


@pytest.mark.parametrize(("name", "fields"), [("tome", {"budget": 64}), ("evit", {"budget": 200}), ("resize", {"budget": 144})])
def test_an_encoder_that_sees_less_costs_less(name, fields):
    """As the run costs that a report tells of."""
    model, processor = foveate.load_pocket()
    inputs = processor(images=Image.new("RGB", (192, 192), "red"), text=PROMPT, return_tensors="pt")
    with foveate.get(name, **fields)(model) as session:
        model(**inputs)
    small = {"patches": 144} if name == "resize" else {}
    told = cost(model, report=session.report, text=8, new_tokens=1, **small)
    ours, whole = cost(model, method=foveate.get(name, **fields), text=8, new_tokens=1), cost(model, text=8, new_tokens=1)
    for part in ("vision tower", "projector", "decoder"):
        assert products(ours, part) == pytest.approx(products(told, part))
        assert products(ours, part) < products(whole, part)


def test_exits_are_a_mean_over_prompts():
    exits = {4: 0.3, 16: 0.5}
    found = cost(visual=TOKENS, exits=exits)
    runs = [(0.2, cost(visual=TOKENS))]
    runs += [(share, cost(visual=[TOKENS] * layer + [0] * (LAYERS - layer))) for layer, share in exits.items()]
    for name in ("flops", "bytes", "seconds"):
        assert found.total(name) == pytest.approx(sum(share * run.total(name) for share, run in runs))
    assert found.kv_cache == pytest.approx(sum(share * run.kv_cache for share, run in runs))
    assert found.work.run.visual[4] == pytest.approx(0.7 * TOKENS)
    assert found.prefill_seconds > cost(visual=[float(count) for count in found.work.run.visual]).prefill_seconds * 0.99
    gates = cost(visual=TOKENS, exits=exits, method="dyvte")
    assert gates.total("flops") - found.total("flops") == pytest.approx(2 * gates.weights["method"] / 4)


@pytest.mark.parametrize("exits", [{0: 0.5}, {LAYERS: 0.5}, {3: 1.2}, {3: 0.7, 4: 0.7}, {3: -0.1}, {True: 0.1}])
def test_exits_that_are_none(exits):
    with pytest.raises(InputError, match="shares of prompts"):
        cost(visual=TOKENS, exits=exits)


def test_on_the_command_line():
    def run(*arguments: str):
        return CliRunner().invoke(app, ["cost", *arguments])

    found = run("--method", "quecc", "--set", "stride=6", "--json")
    runs = json.loads(found.stdout)["runs"]
    assert [each["workload"]["visual"][0] for each in runs.values()] == [576, 16]
    assert runs["quecc"]["parts"]["prefill"]["method"]["flops"] > 0
    found = run("--visual", "576,144", "--exits", "4:0.5", "--json")
    assert list(json.loads(found.stdout)["runs"]) == ["576 visual tokens", "144 visual tokens", "exits, 576", "exits, 144"]
    for arguments, told in (
        (["--exits", "4"], "no list of exits"),
        (["--budget", "64"], "belong to --method"),
        (["--method", "nothing"], "nothing"),
        (["--report", "r.json", "--exits", "4:0.5"], "cannot be read"),
        (["--layers", "32x576", "--exits", "40:0.5"], "shares of prompts"),
    ):
        result = run(*arguments)
        assert result.exit_code != 0
        assert told in str(result.exception) + result.output
