"""The benchmark scripts run, on sizes that say nothing about speed."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys

import pytest
import torch

import foveate
from benchmarks.selection import make_tokens, released_loop


def run(module: str, *options: str) -> None:
    subprocess.run([sys.executable, "-m", module, *options], check=True, capture_output=True, timeout=600)


def test_selection(tmp_path):
    file = tmp_path / "selection.json"
    run("benchmarks.selection", "--side", "8", "--channels", "64", "--rounds", "1", "--encoder-layers", "1", "--json", str(file))
    ledger = json.loads(file.read_text())
    assert {"command", "hardware", "versions", "date", "rows"} <= set(ledger)
    assert [(row["batch"], row["method"]) for row in ledger["rows"]] == [(b, m) for b in (1, 8) for m in ("prumerge", "prumerge+")]
    assert all(row["faster_than_loop"] > 0 for row in ledger["rows"])


def test_selectors(tmp_path):
    """Every method that chooses is in the table; YOPO and a smaller picture choose nothing."""
    file, small = tmp_path / "selectors.json", ("--width", "64", "--decoder-width", "128", "--encoder-layers", "1", "--rounds", "1")
    run("benchmarks.selectors", *small, "--numbers", "576", "--batches", "2", "--large", "", "--json", str(file))
    rows = {row["method"]: row for row in json.loads(file.read_text())["rows"]}
    assert set(rows) - {"encoder"} == {info.name for info in foveate.methods()} - {"yopo", "resize"}
    assert all(row["time"]["median_ms"] > 0 for row in rows.values())


def test_selectors_of_large_photos(tmp_path):
    """Each method in a process of its own: seconds, memory, and shares of all layers of the encoder."""
    file, small = tmp_path / "large.json", ("--width", "64", "--decoder-width", "128", "--encoder-layers", "4", "--numbers", "")
    run("benchmarks.selectors", *small, "--large", "512,2048", "--methods", "prumerge+,evit,yopo", "--json", str(file))
    rows = json.loads(file.read_text())["rows"]
    assert [(row["tokens"], row["method"]) for row in rows] == [
        (n, m) for n in (512, 2048) for m in ("encoder", "evit", "prumerge+")
    ]
    for number in (512, 2048):
        whole, *others = (row for row in rows if row["tokens"] == number)
        assert whole["share_of_encoder"] == 1
        assert all(row["share_of_encoder"] == pytest.approx(row["seconds"] / whole["seconds"]) for row in others)
    assert all(0 <= row["peak_bytes"] < 2**27 for row in rows)
    assert max(row["peak_bytes"] for row in rows) > 0


def test_peak_memory_is_that_of_the_call():
    """In a process of its own, as the benchmark measures: one that has freed memory before would take from that."""
    program = (
        "import json, torch; from benchmarks.large import measured; "
        "print(json.dumps(measured(lambda: torch.ones(2**24).sum().item())))"
    )
    found = json.loads(subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout)
    assert 0.9 * 2**26 < found["peak_bytes"] < 2**27
    assert found["seconds"] > 0


def test_encoder(tmp_path):
    file, small = tmp_path / "encoder.json", ("--width", "64", "--layers", "6", "--side", "12", "--rounds", "1")
    run("benchmarks.encoder", *small, "--budgets", "36", "--batches", "2", "--json", str(file))
    rows = {row["method"]: row for row in json.loads(file.read_text())["rows"]}
    assert set(rows) == {"all", "tome", "crossget", "evit", "ats", "resize"}
    assert rows["all"]["share"] == rows["all"]["flops"] == 1
    assert rows["tome"]["tokens_per_layer"] == [145, 123, 101, 79, 58, 37, 37]
    # by hand: embedding, and per layer four projections and attention of what enters, the MLP of what leaves
    width, counts = 64, rows["tome"]["tokens_per_layer"]

    def cost(counts):
        blocks = sum(n * 4 * width**2 + 2 * n * n * width + m * 8 * width**2 for n, m in itertools.pairwise(counts))
        return counts[0] * 3 * 14 * 14 * width + blocks

    assert abs(rows["tome"]["flops"] - cost(counts) / cost([145] * 7)) < 1e-9


def test_the_loop_it_is_compared_with_computes_the_same():
    tokens = make_tokens(2, 64, 64, torch.float32, 6)
    tap = tokens.taps["last"]
    for name, plus in (("prumerge:released", False), ("prumerge+:released", True)):
        reduction = foveate.get(name, iqr_scope="image").reduce(tokens)
        mine, valid = reduction.apply(tokens.features), reduction.mask()
        for b, theirs in enumerate(released_loop(tokens.features, tap.query, tap.keys, plus)):
            torch.testing.assert_close(mine[b][valid[b]], theirs, atol=1e-4, rtol=1e-4)


def test_prefill(tmp_path):
    file = tmp_path / "prefill.json"
    run("benchmarks.prefill", "--size", "small", "--rounds", "1", "--steps", "3", "--json", str(file))
    rows = json.loads(file.read_text())["rows"]
    assert [row["name"] for row in rows] == ["576 (all)", "144 reduced", "144 native", "32 reduced", "32 native"]
    assert all(row["prefill"]["median_ms"] > 0 and row["decode"]["median_ms"] > 0 for row in rows)


def test_decoder(tmp_path):
    file = tmp_path / "decoder.json"
    run("benchmarks.decoder", "--size", "decoder-small", "--rounds", "1", "--steps", "3", "--json", str(file))
    rows = {row["name"]: row for row in json.loads(file.read_text())["rows"]}
    assert {"all tokens", "fastv", "pyramiddrop", "aim", "yopo", "usual fastv"} <= set(rows)
    assert rows["fastv"]["layers"] == rows["usual fastv"]["layers"] == [576, 576, 288, 288]
    assert rows["all tokens"]["prefill_of_all"] == 1
    assert all(row["realised"] > 0 and row["total"]["median_ms"] > 0 for row in rows.values())


def test_the_usual_fastv_keeps_the_same_tokens():
    """The comparison in benchmarks/decoder.py: attention weights of an eager layer instead of one row."""
    from benchmarks.decoder import UsualFastV
    from foveate.methods.fastv import FastV

    from .. import zoo

    model, kept = zoo.load(), []
    for method in (FastV(), UsualFastV()):
        undo = method.attach(model) if isinstance(method, UsualFastV) else []
        with method(model) as session:
            model.generate(**zoo.batch(rows=(1,)), max_new_tokens=1)
            kept.append([image.stages[0].kept for image in session.report.images])
        for each in undo:
            each()
    assert kept[0] == kept[1]


def test_pixels(tmp_path):
    file, small = tmp_path / "pixels.json", ("--side", "6", "--width", "160", "--layers", "2", "--rounds", "1")
    run("benchmarks.pixels", *small, "--shares", "1.0,0.25", "--json", str(file))
    rows = json.loads(file.read_text())["rows"]
    assert [row["share"] for row in rows] == [1.0, 0.25]
    assert all(row["of_whole"] > 0 and 0 < row["choosing"] < 1 for row in rows)


def test_videos(tmp_path):
    file, small = tmp_path / "videos.json", ("--frames", "4", "--tokens", "16", "--width", "32", "--encoder-width", "160")
    run("benchmarks.videos", *small, "--timed-frames", "2", "--rounds", "1", "--json", str(file))
    found = json.loads(file.read_text())
    assert {row["method"] for row in found["rows"]} == {"evs", "vidcom2", "v-cast", "flashvid", "fewer-frames"}
    assert all(row["of_encoder"] == pytest.approx(row["seconds"] / found["encoder_seconds"]) for row in found["rows"])
