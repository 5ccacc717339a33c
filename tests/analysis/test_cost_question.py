"""``foveate cost``: the pass of the decoder over the question alone, for methods that ask for it."""

from __future__ import annotations

import json

import pytest
import torch

import foveate
from foveate.analysis.cost import cost
from foveate.analysis.workload import unreduced

from .. import zoo
from ..cli.test_main import invoke
from .test_cost import counted

OPTIONS = dict(text=9, new_tokens=2, flash=False, dtype="float32")


def of_question(each) -> float:
    return sum(line.flops for line in each.select("prefill", "question") if line.bits)


def test_the_pass_costs_what_the_decoder_computes():
    model, ids = zoo.load(attn="eager"), torch.arange(10, 22)[None]
    flops, _ = counted(lambda: model.get_decoder()(input_ids=ids, use_cache=False))
    found, plain = cost(model, question=12, visual=16, **OPTIONS), cost(model, visual=16, **OPTIONS)
    assert of_question(found) == pytest.approx(flops, rel=1e-6)
    assert of_question(plain) == 0
    for part in ("vision tower", "projector", "decoder"):
        assert found.total("seconds", "prefill", part) == plain.total("seconds", "prefill", part)
    assert found.prefill_seconds - plain.prefill_seconds == pytest.approx(found.total("seconds", "prefill", "question"))
    assert (found.kv_cache, found.decode_seconds, found.weights) == (plain.kv_cache, plain.decode_seconds, plain.weights)
    assert "question" in str(found)
    assert "question" not in found.to_dict()["parts"]["decode"]


def test_a_report_brings_it():
    model, inputs = zoo.load(attn="eager"), zoo.batch()
    tokens = {}
    for reader in ("decoder", "embeddings"):
        with foveate.get("quecc", reader=reader).fresh()(model) as session:
            model(**inputs)
        tokens[reader] = session.report.question_tokens
        found = cost(model, report=session.report, **OPTIONS)
        assert found.work.run.question == tokens[reader] / found.work.run.batch
    asked = inputs["attention_mask"].bool() & (inputs["input_ids"] != zoo.IMAGE)
    assert 0 < tokens["decoder"] <= int(asked.sum())
    assert tokens["embeddings"] == 0
    with foveate.get("quecc").fresh()(model) as session:
        model(**inputs)
        document = session.report.to_dict()
    assert of_question(cost(model, report=document, **OPTIONS)) > 0
    assert of_question(cost(model, report=unreduced(document), **OPTIONS)) == 0
    del document["question_tokens"]  # as in reports of earlier versions
    assert of_question(cost(model, report=document, **OPTIONS)) == 0


def test_what_is_refused():
    with pytest.raises(foveate.InputError, match="question=-1"):
        cost(question=-1)
    with pytest.raises(foveate.InputError, match="Leave out visual= and question="):
        cost(report={}, text=3, question=3)


def test_command(capsys, monkeypatch, tmp_path):
    picture = tmp_path / "roofline.png"
    code, out, _ = invoke(capsys, monkeypatch, "cost", "--visual", "36", "--question", "40", "--json", "--save", str(picture))
    assert picture.stat().st_size > 10_000
    assert code == 0
    parts = json.loads(out)["runs"]["36 visual tokens"]["parts"]["prefill"]
    assert list(parts) == ["vision tower", "projector", "question", "decoder"]
    assert 0.4 < parts["question"]["flops"] / parts["decoder"]["flops"] < 0.6  # 40 tokens beside 36 + 40
    code, out, _ = invoke(capsys, monkeypatch, "cost", "--visual", "36", "--question", "40")
    assert code == 0
    assert "prefill: question" in out
