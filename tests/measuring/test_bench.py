"""The measurement: statistics by enumeration, parts by a clock that only the model moves, bytes by hand. Nothing is timed."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import random
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from transformers import DynamicCache

import foveate
from foveate.analysis.hardware import Hardware
from foveate.cli import bench as benching
from foveate.families import FAMILIES
from foveate.measuring import bench, runs
from foveate.measuring.noise import median_interval, paired, quartiles

from .. import families
from ..cli.test_main import invoke

MACHINE = Hardware("a machine", 1e10, 1e12, 1e12)
RUNS_AT_ONCE = Hardware("no memory wall", 1e30, 1e12, 1e12)


# -- statistics


@pytest.mark.parametrize("number", range(1, 13))
def test_the_interval_is_the_narrowest_of_its_kind_that_covers(number):
    """Each value falls on either side of the median with the same chance: count the patterns in which an interval holds it."""
    patterns = [sum(sides) for sides in itertools.product((0, 1), repeat=number)]  # how many values lie below the median

    def coverage(rank):  # of the interval from value `rank` to the one as far from the other end
        return sum(rank < below <= number - 1 - rank for below in patterns) / len(patterns)

    enough = [rank for rank in range(number // 2) if coverage(rank) >= 0.95]
    found = median_interval([10.0 * value for value in random.Random(0).sample(range(number), number)])
    assert found == ((10.0 * max(enough), 10.0 * (number - 1 - max(enough))) if enough else None)
    assert (found is None) == (number < 6)


def test_verdicts_and_what_is_realised():
    def of(ratios):
        return paired(ratios, [1.0] * len(ratios))

    fast, slow = of([0.4, 0.5, 0.5, 0.6, 0.5, 0.5]), of([1.1, 1.2, 1.3, 1.2, 1.1, 1.4])
    assert (fast.verdict, fast.interval, fast.median) == ("faster", (0.4, 0.6), 0.5)
    assert fast.realised(0.4) == pytest.approx((0.8, 0.4 / 0.6, 1.0))  # 2 times faster where 2.5 times were possible
    assert slow.verdict == "slower"
    unclear = of([0.5, 0.5, 0.5, 0.5, 0.5, 1.01])  # a win in five rounds of six
    assert unclear.verdict == of([1.0] * 6).verdict == "no difference beyond noise"
    few = of([0.5] * 5)
    assert (few.verdict, few.interval) == ("too few rounds to tell", None)
    assert [ratio.realised(0.4) for ratio in (slow, unclear, few)] == [None, None, None]
    assert fast.realised(None) is None
    assert paired([1.0], [0.0]) is None


def test_noise_is_no_win():
    """The same model beside itself, on a machine whose speed drifts by a factor of four and hiccups: 2000 measurements."""
    drawn, verdicts = random.Random(1), []
    for _ in range(2000):
        drift = [4 ** drawn.random() for _ in range(7)]
        one, other = ([d * (1 + drawn.expovariate(8)) for d in drift] for _ in range(2))
        verdicts.append(paired(one, other).verdict)
    assert 0 < 2000 - verdicts.count("no difference beyond noise") <= 0.05 * 2000
    drift = [4.0**number for number in range(7)]  # cancels in the ratios; the quartiles of the times show it
    assert paired([0.9 * d for d in drift], drift).verdict == "faster"
    assert quartiles(drift) == (10.0, 64.0, 640.0)


# -- one run


@pytest.fixture
def clock(monkeypatch):
    """``time.perf_counter`` stands still but for what ``spend`` adds."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def spend(seconds):
        def hook(*_):
            now[0] += seconds

        return hook

    return spend


@pytest.fixture
def slow_model(clock):
    """A model whose vision encoder takes 5 seconds, its projector 1 for 64 tokens, embedding words 0.25, a decoder layer 2 for a
    prompt and 0.25 for a step, and its head 0.5.
    """
    model = families.load("llava")
    decoder = model.get_decoder()
    handles = [
        model.model.vision_tower.register_forward_hook(clock(5)),
        model.model.multi_modal_projector.register_forward_hook(lambda _, args, out: clock(out.shape[:-1].numel() / 64)()),
        model.get_input_embeddings().register_forward_hook(clock(0.25)),
        model.lm_head.register_forward_hook(clock(0.5)),
    ]
    for layer in decoder.layers:
        handles.append(layer.register_forward_hook(lambda _, args, out: clock(2 if out.shape[1] > 1 else 0.25)()))
    yield model
    for handle in handles:
        handle.remove()


def test_parts_of_a_run(slow_model, clock, monkeypatch):
    run = runs.TimedRunner(slow_model, families.batch("llava", rows=[0]), new_tokens=5)
    expected = {"vision": 6, "prefill": 8.5, "decode": 1.75, "first token": 14.75, "end to end": 14.75 + 4 * 1.75}
    assert run(None).seconds == pytest.approx(expected)
    assert run(None).peak is None
    method = foveate.get("spatial", budget=9)
    reduce = type(method).reduce

    def slow(self, tokens):
        clock(3)()
        return reduce(self, tokens)

    monkeypatch.setattr(type(method), "reduce", slow)
    vision = 5 + (1 + 9) / 64  # one token tells that the projector is there, then it sees what is kept
    first = vision + 3 + 0.25 + 8.5
    expected |= {"vision": vision, "selection": 3, "first token": first, "end to end": first + 4 * 1.75}
    assert run(method).seconds == pytest.approx(expected)


def test_choosing_inside_the_decoder_is_part_of_its_prefill(slow_model, clock, monkeypatch):
    method = foveate.get("fastv", budget=0.5)
    cut = type(method).cut

    def slow(self, tokens):
        clock(3)()
        return cut(self, tokens)

    monkeypatch.setattr(type(method), "cut", slow)
    hook = slow_model.get_decoder().register_forward_pre_hook(clock(1))  # as a method's own, which was there first
    try:
        found = runs.TimedRunner(slow_model, families.batch("llava", rows=[0]), new_tokens=3)(method).seconds
    finally:
        hook.remove()
    own = {part: found[part] for part in ("vision", "selection", "prefill", "decode")}
    assert own == pytest.approx({"vision": 6, "selection": 3, "prefill": 12.5, "decode": 2.75})


def test_a_run_leaves_the_model_as_it_was():
    model = families.load("llava")

    def state():
        hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
        return {*model.__dict__}, {*model.model.__dict__}, hooks

    before, run = state(), runs.TimedRunner(model, families.batch("llava", rows=[0]), new_tokens=2)
    for method in (None, foveate.get("prumerge+")):
        run(method)
        run.inspect(method)
    run.inputs["pixel_values"] = run.inputs["pixel_values"][:0]
    with pytest.raises(Exception):  # noqa: B017, PT011
        run(None)
    assert state() == before


class FakeGpu:
    """What torch.cuda is asked for; a clock that only the model moves, and a peak that grows until it is reset."""

    def __init__(self, monkeypatch):
        self.calls, self.peak = [], 0
        event = type("Event", (), {"record": lambda e: setattr(e, "at", time.perf_counter()), "synchronize": lambda e: None})
        event.elapsed_time = lambda begin, end: 1000 * (end.at - begin.at)
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: event())
        monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        for name in ("synchronize", "reset_peak_memory_stats", "max_memory_allocated"):
            monkeypatch.setattr(torch.cuda, name, lambda device, name=name: self.note(name))

    def note(self, name):
        self.calls.append(name)
        self.peak = 0 if name.startswith("reset") else self.peak
        return self.peak


def test_on_a_gpu_events_take_the_time_and_each_run_has_its_own_peak(slow_model, monkeypatch):
    run = runs.TimedRunner(slow_model, families.batch("llava", rows=[0]), new_tokens=3)
    gpu, run.device = FakeGpu(monkeypatch), torch.device("cuda")
    handle = slow_model.register_forward_hook(lambda *_: setattr(gpu, "peak", gpu.peak + 1000))
    try:
        samples = [run(None) for _ in range(2)]
    finally:
        handle.remove()
    assert [sample.peak for sample in samples] == [3000, 3000]  # three forwards each
    expected = {"vision": 6, "prefill": 8.5, "decode": 1.75, "first token": 14.75, "end to end": 18.25}
    assert samples[0].seconds == pytest.approx(expected)
    assert gpu.calls == ["reset_peak_memory_stats", "synchronize", "synchronize", "max_memory_allocated"] * 2


# -- memory


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_repeated_is_a_batch_of_it(family):
    """Rows, tiles, patches, grids and sizes, as a processor returns them for three equal prompts."""
    medium = next(media for media in families.SPECS[family].rows if media)[0]
    ids, media = families.prompt(family, [medium], 3, 4, seed=0), [(medium, families.pixels(family, medium, 0))]
    three = families.inputs_of(family, [ids] * 3, [media] * 3)
    found = runs.repeated(families.inputs_of(family, [ids], [media]), 3)
    assert found.keys() == three.keys()
    for name in three:
        assert torch.equal(found[name], three[name]), name


def per_token(model):
    """Bytes of the keys and values of one token in one layer."""
    config = model.config.get_text_config()
    return 2 * config.num_key_value_heads * config.head_dim * 4


def test_cache_bytes_count_what_each_layer_holds():
    model, rows, new = families.load("llava"), 3, 4
    inputs = runs.repeated(families.batch("llava", rows=[0]), rows)
    length, token = inputs["input_ids"].shape[1], per_token(model)
    text, run = length - 64, runs.TimedRunner(model, inputs, new)
    assert run.inspect(None).cache == [rows * (length + new - 1) * token] * 4  # the last token is never read
    short = run.inspect(foveate.get("prumerge+", budget=16))
    assert short.cache == [rows * (text + 16 + new - 1) * token] * 4
    both = foveate.Compose(foveate.get("spatial", budget=32), foveate.get("fastv", layer=2, budget=0.25))
    cut = run.inspect(both)
    assert cut.cache == [rows * (text + visual + new - 1) * token for visual in (32, 32, 8, 8)]
    assert cut.report.layers == [rows * visual for visual in (32, 32, 8, 8)]


def test_cache_bytes_of_layers_with_states():
    """Qwen3.5: every fourth layer has keys and values, the others a state of the same size for any prompt, counted by hand."""
    model, inputs = families.load("qwen3_5"), families.batch("qwen3_5", rows=[0])
    config = model.config.get_text_config()
    keys = config.linear_num_key_heads * config.linear_key_head_dim
    values = config.linear_num_value_heads * config.linear_value_head_dim
    state = 4 * ((2 * keys + values) * config.linear_conv_kernel_dim + values * config.linear_key_head_dim)
    whole = runs.TimedRunner(model, inputs, 3)
    length = inputs["input_ids"].shape[1] + 2
    for method, tokens in ((None, length), (foveate.get("spatial", budget=0.5), None)):
        run = whole.inspect(method)
        left = tokens if run.report is None else length - sum(run.report.before) + sum(run.report.after)
        assert run.cache == [state if kind == "linear_attention" else left * per_token(model) for kind in config.layer_types]
    assert {"linear_attention", "full_attention"} <= set(config.layer_types)


def test_cache_bytes_of_layers_with_both_and_with_neither():
    both = SimpleNamespace(
        keys=torch.zeros(3), values=torch.zeros(5), conv_states={0: torch.zeros(7), 1: None}, recurrent_states={}
    )
    assert runs.cache_bytes(SimpleNamespace(layers=[both])) == [4 * (3 + 5 + 7)]
    with pytest.raises(foveate.CacheError, match="does not show"):
        runs.cache_bytes(SimpleNamespace(layers=[SimpleNamespace()]))


def test_cache_bytes_of_sliding_layers_and_of_views():
    model, inputs = families.load("gemma3"), families.batch("gemma3", rows=[0])
    assert inputs["input_ids"].shape[1] > 2 * families.WINDOW
    found = runs.TimedRunner(model, inputs, 3).inspect(None).cache
    held = inputs["input_ids"].shape[1] + 2
    kinds = model.config.get_text_config().layer_types
    expected = {"full_attention": held, "sliding_attention": families.WINDOW}  # one less is seen, but that is a view
    assert found == [expected[kind] * per_token(model) for kind in kinds]
    cache, store = DynamicCache(), torch.zeros(1, 2, 50, 8)
    cache.update(torch.zeros(1, 2, 5, 8), torch.zeros(1, 2, 5, 8), 0)
    cache.layers[0].keys, cache.layers[0].values = store[:, :, :10], store[:, :, 10:20]
    assert runs.cache_bytes(cache) == [store.numel() * 4]  # counted whole, and once
    cache.layers[0].keys = None
    with pytest.raises(foveate.CacheError, match="dynamic cache"):
        runs.cache_bytes(cache)
    with pytest.raises(foveate.CacheError, match="no key-value cache"):
        runs.cache_bytes(None)


# -- rounds


@pytest.fixture
def stubbed(monkeypatch):
    """Runs that take as long as their method says, on a machine that gets slower all the time and hiccups."""
    noise, seen = random.Random(3), []

    def call(self, method):
        seen.append(method)
        factor = (1 + 0.01 * len(seen)) * (1 + noise.expovariate(40)) * (1.0 if method is None else method.speed)
        return runs.Sample({"vision": 0.5, "prefill": 2 * factor, "decode": factor, "end to end": 4 * factor}, None)

    monkeypatch.setattr(runs.TimedRunner, "__call__", call)
    return seen


def with_speed(name, speed, **fields):
    method = foveate.get(name, **fields)
    method.speed = speed
    return method


def stub_methods():
    return {
        "half": with_speed("spatial", 0.5, budget=16),
        "same": with_speed("random", 1.0, budget=16),
        "worse": with_speed("prumerge+", 1.5),
    }


def measured(rounds=9, seed=0, **options):
    model, inputs = families.load("llava"), families.batch("llava", rows=[0])
    return bench.measure(model, inputs, stub_methods(), hardware=MACHINE, rounds=rounds, new_tokens=2, seed=seed, **options)


def test_rounds_are_interleaved_and_paired(stubbed):
    told = []
    found = measured(tell=lambda *what: told.append(what))
    names = ["unreduced", *stub_methods()]
    assert [sorted(order) for order in found.orders] == [sorted(names)] * 9
    assert len({*map(tuple, found.orders)}) > 3
    assert found.orders == measured().orders != measured(seed=1).orders
    assert len(told) == told[0][2] == 4 * (9 + bench.WARM_UP)
    assert all(len(variant.samples) == 9 for variant in found.variants)  # the warm-up is in none
    by_name = {variant.name: variant.against(found.base) for variant in found.methods}
    assert [by_name[name]["prefill"].verdict for name in by_name] == ["faster", "no difference beyond noise", "slower"]
    assert by_name["half"]["prefill"].median == pytest.approx(0.5, rel=0.05)


def test_what_is_printed_claims_no_win_within_noise(stubbed):
    def printed(rounds):
        document = {
            "model": {"name": "m", "parameters": 1, "dtype": "float32", "attention": "sdpa"},
            "machine": {"processor": "p", "threads": 1, "device": "cpu"},
            "hardware_measured": vars(MACHINE),
            "notes": [],
        }
        console = Console(width=150, record=True, file=io.StringIO())
        benching.show(document, [measured(rounds)], console)
        text = console.export_text()
        rows = text.partition("beside the unreduced")[2].partition("median [")[0]
        return [part.partition("│ KV cache")[0] for part in rows.split("├")][:3]

    half, same, worse = printed(9)
    assert half.count("x faster") == 3  # prefill, decode, end to end
    assert half.count("%") == 9  # of which each has a share of the ideal, with an interval
    assert same.count("no difference beyond noise") == 4
    assert "x faster" not in same + worse
    assert "%" not in same + worse
    assert worse.count("x slower") == 3
    assert all("x faster" not in rows and rows.count("too few rounds to tell") == 4 for rows in printed(5))


def test_the_ledger_on_stdout_is_alone(capsys, monkeypatch):
    """``--json -`` is for programs."""
    monkeypatch.setattr(benching, "run_bench", lambda *_: ({"benchmark": "bench"}, None))
    monkeypatch.setattr(benching, "show", lambda *_: pytest.fail("a table was printed"))
    code, out, _ = invoke(capsys, monkeypatch, "bench", "--json", "-")
    assert (code, json.loads(out)) == (0, {"benchmark": "bench"})
    assert not Path("-").exists()
