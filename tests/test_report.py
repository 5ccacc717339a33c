"""``session.report``: what happened, JSON-able."""

from __future__ import annotations

import base64
import io
import json
import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import foveate
import foveate.report
from foveate.notebook import token_map

from . import families, zoo


@pytest.fixture(scope="module")
def session():
    model = zoo.load()
    with foveate.PruMergePlus(append_rest=True)(model) as session:
        model.generate(**zoo.batch(), max_new_tokens=3, min_new_tokens=3, do_sample=False)
    return session


def test_counts_and_rows(session):
    report = session.report
    assert [image.row for image in report.images] == [0, 1, 1, 3], "row 2 has no picture"
    assert report.before == [zoo.TOKENS] * 4
    assert report.after == [image.after for image in report.images] == [len(image.kept) for image in report.images]
    assert report.layers == [sum(report.after)] * 4
    assert report.decoder_layers == 4


def test_the_source_map_counts_only_real_outputs(session):
    encoded = foveate.encode(session.model, session.method, **zoo.batch())
    for i, image in enumerate(session.report.images):
        assert len(image.source) == zoo.TOKENS
        assert set(image.source) <= set(range(-1, image.after))
        assert all(image.source[cell] == number for number, cell in enumerate(image.kept))
        weights = encoded.reduction.matrix(zoo.TOKENS)[i][encoded.reduction.mask()[i]]
        for cell in range(zoo.TOKENS):
            if cell not in image.kept and image.source[cell] >= 0:
                assert weights[image.source[cell], cell] == weights[:, cell].max() > 0


def test_scores_and_threshold(session):
    for image in session.report.images:
        outliers = {cell for cell in range(zoo.TOKENS) if image.scores[cell] > image.threshold}
        assert outliers <= set(image.kept)


def test_times(session):
    seconds = session.report.seconds
    assert set(seconds) == {"vision", "selection", "prefill", "decode"}
    assert all(0 < value < 60 for value in seconds.values())


def test_json_and_text(session):
    document = json.loads(session.report.to_json())
    assert document["method"]["name"] == "prumerge+"
    assert document["method"]["append_rest"] is True
    assert document["images"][0]["grid"] == [8, 8]
    assert document["layers"] == session.report.layers
    text = str(session.report)
    assert f"64 -> {session.report.after[0]}" in text
    assert "prefill" in text


def test_a_report_is_of_the_last_call_only(session):
    model = session.model
    with foveate.Spatial(budget=5)(model) as spatial:
        model.generate(**zoo.batch(), max_new_tokens=1)
        first = spatial.report
        model(**zoo.batch(rows=(0,)))
        assert spatial.report.after == [5]
        assert first.after == [5] * 4
        assert set(spatial.report.seconds) == {"vision", "selection", "prefill"}
        assert first.images[0].scores is None


def test_right_padding_is_noted():
    model = zoo.load()
    with foveate.PruMergePlus()(model) as session:
        model.generate(**zoo.batch("left"), max_new_tokens=1)
        assert session.report.warnings == []
        model.generate(**zoo.batch("right"), max_new_tokens=1)
    assert "padded on the right" in session.report.warnings[0]
    assert "warning: " in str(session.report)


def test_reports_hold_no_graph():
    model = zoo.load()
    with foveate.PruMergePlus()(model) as session:
        model(**zoo.batch(), labels=zoo.batch()["input_ids"]).loss.backward()
    reduction = session.report.reduction
    for tensor in (reduction.index, reduction.valid, reduction.weights, reduction.scores, reduction.threshold):
        assert not tensor.requires_grad
    assert isinstance(json.dumps(session.report.to_dict()), str)
    assert torch.is_tensor(reduction.weights)


def test_reports_are_short_in_a_console_and_tables_in_a_notebook(caplog):
    foveate.report._log_once.cache_clear()
    model, inputs = zoo.load(), zoo.batch("right")
    with caplog.at_level("WARNING", "foveate"), foveate.PruMergePlus(budget=20)(model) as session:
        for _ in range(2):
            model.generate(**inputs, max_new_tokens=1)
    found = session.report
    assert repr(found) == "<Report of prumerge+: 256 -> 80 visual tokens, 1 warnings>"
    assert [record.message for record in caplog.records] == found.warnings, "once, however often it is met"
    shown = found._repr_html_()
    assert shown.count("<tr>") == 1 + len(found.items)
    assert "padded on the right" in shown
    named = foveate.Report({"name": "<b>"}, 4, found.clock)
    assert "<b>" not in named._repr_html_()
    assert repr(named) == "<Report of <b>: no image>"


def test_maps_of_a_notebook_are_the_kept_tokens(session):
    """A pixel for each token, read back from the page: kept ones have full brightness, and the colours of a picture differ."""
    image = session.report.images[0]
    urls = re.findall(r'src="data:image/png;base64,([^"]+)"', session.report._repr_html_())
    assert len(urls) == len(session.report.images)
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(urls[0])))).reshape(-1, 3).astype(int)
    assert len(pixels) == image.grid[0] * image.grid[1]
    assert set((pixels.max(1) > 250).nonzero()[0].tolist()) == set(image.kept)
    assert len({tuple(pixels[cell]) for cell in image.kept}) == len(image.kept)
    dropped = {cell for cell, output in enumerate(image.source) if output < 0}
    assert set((pixels == pixels[:, :1]).all(1).nonzero()[0].tolist()) == dropped


def test_maps_tell_what_went_to_another_frame():
    """Pale grey, darker than what is kept, and only then in words."""
    frames = families.Medium((8, 8), frames=6)
    pixels = families.pixels("qwen2_5_vl", frames, seed=1)
    pixels = pixels[: 8 * 8].repeat(len(pixels) // 64, 1)  # the first grid again and again
    ids = [families.prompt("qwen2_5_vl", [frames], before=2, after=3, seed=1)]
    model = families.load("qwen2_5_vl")
    with foveate.PixelPrune()(model) as session:
        model(**families.inputs_of("qwen2_5_vl", ids, [[(frames, pixels)]]))
    first, *others = session.report.images
    assert set(map(min, (image.source for image in others))) == {-2}
    shades = [np.asarray(token_map(image)).reshape(-1, 3) for image in (first, others[0])]
    assert (shades[0].max(1) > 250).all()
    assert (shades[1] == 110).all()
    assert "merged into another frame" in session.report._repr_html_()
    with foveate.FastV(budget=0.5)(zoo.load()) as plain:
        plain.model(**zoo.batch(rows=(0,)))
    assert "another frame" not in plain.report._repr_html_()


def test_maps_show_what_decoder_layers_drop():
    """All tokens enter the decoder, and a part of them reaches its last layer: that part alone is bright."""
    with foveate.FastV(budget=0.25)(zoo.load()) as session:
        session.model(**zoo.batch(rows=(0,)))
    shown, (image,) = session.report._repr_html_(), session.report.images
    (url,) = re.findall(r'src="data:image/png;base64,([^"]+)"', shown)
    bright = np.asarray(Image.open(io.BytesIO(base64.b64decode(url)))).max(-1).reshape(-1)
    last = image.stages[-1].kept
    assert 0 < len(last) < len(image.kept) == len(bright)
    assert sorted(last) == np.flatnonzero(bright > 250).tolist()
    assert f"{len(last)} in the last layer" in shown
    assert "dropped between decoder layers" in shown


def test_a_report_as_a_table_of_pandas(session, monkeypatch):
    pandas = pytest.importorskip("pandas")
    frame = session.report.to_pandas()
    assert isinstance(frame, pandas.DataFrame)
    assert frame["before"].tolist() == session.report.before
    assert frame["after"].tolist() == session.report.after
    assert frame["row"].tolist() == [0, 1, 1, 3]
    model = zoo.load()
    with foveate.FastV(layer=1, budget=9)(model) as cut:
        assert list(cut.report.to_pandas().columns) == list(frame.columns), "before the first call"
        model.generate(**zoo.batch(), max_new_tokens=1)
    assert cut.report.to_pandas()["from_layer_1"].tolist() == [9] * 4
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(foveate.MissingExtraError, match=r"foveate\[pandas\]"):
        cut.report.to_pandas()


def test_a_session_tells_of_itself():
    model = zoo.load()
    with foveate.PruMergePlus(budget=20)(model) as session:
        model.generate(**zoo.batch(), max_new_tokens=1)
        inside = repr(session)
        assert session.report._repr_html_() in session._repr_html_()
    assert inside.startswith("<Session of prumerge+ on LlavaForConditionalGeneration, attached; <Report of prumerge+: 256 -> 80")
    assert "detached" in repr(session)
