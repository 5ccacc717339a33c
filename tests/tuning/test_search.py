"""Searches on a calibration set."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

import foveate
from foveate.lab.scoring import begins
from foveate.methods.g_search import read_plan
from foveate.methods.p_sigmoid import PSigmoid
from foveate.methods.yopo import read_heads
from foveate.tuning.search import _HeadRatios, g_search, head_mask, p_sigmoid_search

from .. import zoo
from ..cli.test_main import invoke


def needs(*rates: float):
    """A model that is right where each layer keeps at least its rate."""
    asked = []

    def evaluate(method: foveate.Method) -> float:
        kept = method.keep_rates(len(rates), None)
        asked.append(kept)
        return 0.9 - 0.1 * sum(max(0.0, wanted - rate) for wanted, rate in zip(rates, kept, strict=True))

    return evaluate, asked


def test_g_search_finds_the_least_rates():
    evaluate, asked = needs(1, 1, 0.5, 0.3125, 0.3125, 0)
    plan = g_search(evaluate, 6, epsilon=1e-9)
    assert plan.rates == (1, 1, 0.5, 0.3125, 0.3125, 0)
    assert plan.evaluations == len(asked) <= 1 + 4 * 5
    assert plan.accuracy == plan.full == 0.9
    assert plan.mean == pytest.approx(sum(plan.rates) / 6)


def test_g_search_without_and_with_all_tolerance():
    evaluate, _ = needs(1, 1, 1, 1)
    assert g_search(evaluate, 4, epsilon=0).rates == (1, 1, 1, 1)
    assert g_search(evaluate, 4, epsilon=1).rates == (1, 1, 0, 0)
    with pytest.raises(foveate.InputError, match="first"):
        g_search(evaluate, 4, first=4)


def test_p_sigmoid_search_takes_the_best(tmp_path):
    def evaluate(method: foveate.Method) -> float:
        return 1 - abs(method.keep_rates(8, None)[4] - 0.4)

    plan = p_sigmoid_search(evaluate, 8, 0.5)
    assert sum(plan.rates) / 8 == pytest.approx(0.5)
    assert plan.accuracy == pytest.approx(evaluate(foveate.get("g-search", rates=plan.rates)))
    plan.save(tmp_path / "plan.json")
    assert read_plan(tmp_path / "plan.json") == plan.rates
    found = foveate.Method.load(tmp_path / "plan.json")  # as --config does
    assert isinstance(found, PSigmoid)
    assert found.keep_rates(8, None) == plan.rates
    with pytest.raises(foveate.InputError, match="run all tokens"):
        p_sigmoid_search(evaluate, 8, 0.2)


@pytest.mark.parametrize("decoder", ["llama", "qwen3"])
def test_head_mask_by_the_matrices_of_eager_attention(decoder):
    model, plain = zoo.load(decoder=decoder), zoo.load(decoder=decoder, attn="eager")
    prompts = [zoo.batch(rows=(row,)) for row in (0, 1, 3)]
    found = head_mask(model, prompts, share=0.5, votes=0.4)
    ratios = []
    for inputs in prompts:
        visual = inputs["input_ids"][0] == zoo.IMAGE
        matrices = plain(**inputs, output_attentions=True).attentions
        of_heads = torch.stack([torch.stack([m[0, :, :, visual].sum((1, 2)), m[0, :, :, ~visual].sum((1, 2))]) for m in matrices])
        on = of_heads.view(4, 2, 2, -1).sum(-1)  # both queries of a key head
        ratios.append(on[:, 0] / on[:, 1])
    watch = _HeadRatios()
    with watch(model):
        for inputs in prompts:
            model(**inputs)
    torch.testing.assert_close(torch.cat(watch.ratios), torch.stack(ratios)[:, :3], rtol=1e-3, atol=1e-5)
    second = torch.stack(ratios).sort(dim=0, descending=True).values[1]  # two of three votes are more than 40 %
    kept = second[2] >= torch.quantile(second[2], 0.5)
    assert found == [[True] * 2, [True] * 2, kept.tolist(), [True] * 2]
    with pytest.raises(foveate.InputError, match="picture"):
        head_mask(model, [])


def test_search_on_the_command_line(capsys, monkeypatch, tmp_path):
    plan, heads = tmp_path / "plan.json", tmp_path / "heads.json"
    code, out, err = invoke(capsys, monkeypatch, "search", str(plan), "--examples", "4", "--steps", "2")
    assert code == 0, err
    assert "keep rates 100% 100%" in out
    assert len(read_plan(plan)) == 6
    code, out, err = invoke(capsys, monkeypatch, "search", str(heads), "--method", "yopo", "--examples", "3")
    assert code == 0, err
    assert len(read_heads(heads)) == 6
    model, _ = foveate.load_pocket()
    foveate.get("g-search", plan=str(plan))(model).attach().detach()
    foveate.get("yopo", heads=str(heads))(model).attach().detach()


def test_search_on_data_of_ones_own(capsys, monkeypatch, tmp_path):
    data, plan = tmp_path / "data.jsonl", tmp_path / "plan.json"
    Image.new("RGB", (192, 192), (200, 30, 30)).save(tmp_path / "red.png")
    data.write_text(json.dumps({"image": "red.png", "question": "what color is the star ?", "answer": "red"}) + "\n")
    code, _, err = invoke(capsys, monkeypatch, "search", str(plan), "--data", str(data), "--steps", "1")
    assert code == 0, err
    assert json.loads(plan.read_text())["settings"]["data"] == str(data)
    for text, message in (("{}\n", "Line 1"), ("", "no rows"), ("not json\n", "no file of JSON lines")):
        data.write_text(text)
        code, _, err = invoke(capsys, monkeypatch, "search", str(plan), "--data", str(data))
        assert code == 2
        assert message in " ".join(err.split())
    data.write_text(json.dumps({"image": "red.png", "question": "q", "answer": " ."}) + "\n")
    code, _, err = invoke(capsys, monkeypatch, "search", str(plan), "--data", str(data))
    assert code == 2
    assert "an answer is empty" in " ".join(err.split())
    assert begins("No, there is not.", "no")
    assert not begins("Nothing.", "no")
    assert not begins("12", "1")
    code, _, err = invoke(capsys, monkeypatch, "search", str(tmp_path), "--examples", "2")
    assert code == 2
    assert "folder" in err
    code, _, err = invoke(capsys, monkeypatch, "search", str(plan), "--method", "fastv", "--examples", "2")
    assert code == 2
    assert "g-search, p-sigmoid, yopo" in err
    code, _, err = invoke(capsys, monkeypatch, "search", str(plan), "--model", "somewhere")
    assert code == 2
    assert "--data" in err
