"""``foveate batch`` with vLLM, in whose place a module of that name answers as transformers does, and with actors of Ray."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from foveate.errors import FoveateError, InputError, MissingExtraError
from foveate.serving import files
from foveate.serving.batch import offline, vllm_engine
from foveate.serving.batch.base import EngineError
from foveate.serving.batch.ray_batch import Cluster, EncoderActor, EngineActor, answered_by_ray, shares
from foveate.serving.batch.rows import AnswerSettings, Source
from foveate.serving.batch.vllm_engine import MissingEngineError, Ready, VllmEngine
from foveate.serving.encoding import EncodedPrompt
from foveate.serving.export import export
from foveate.serving.handover import ImageEmbeds
from foveate.serving.placing import Places
from tests.cli.test_main import invoke

from .asked import GOOD, alone, answers, broken, mixed, white_is_nan, written


def test_vllm_answers_as_transformers(vllm, exported, pictures, tmp_path, engine, capsys, monkeypatch):
    path = written(tmp_path, mixed(pictures))
    options = ("--engine", "vllm", "--export", str(exported))
    code, out, _ = invoke(capsys, monkeypatch, "batch", str(path), str(tmp_path / "out.jsonl"), *options)
    assert code == 0
    assert "12 answered, 0 failed" in out
    assert answers(tmp_path / "out.jsonl") == alone(engine, Source(path))
    told = json.loads((tmp_path / "out.jsonl.settings.json").read_text())
    assert (told["engine"], told["model"], told["method"], told["budget"]) == ("vllm", "pocket", "prumerge+", None)


def test_vllm_and_failed_rows(vllm, exported, pictures, tmp_path, engine):
    path, said = broken(pictures, tmp_path)
    made = VllmEngine("pocket", AnswerSettings(), exported)
    white_is_nan(made.encoder.encoder.loaded.model)
    source = Source(path)
    found = {row["id"]: row for batch in offline.answered(source, source.lines(), AnswerSettings(), made, 64) for row in batch}
    for name, message in said.items():
        assert message in found[name]["error"]["message"]
    clean = alone(engine, Source(written(tmp_path, mixed(pictures, GOOD), "clean.jsonl")))
    assert {name: row for name, row in found.items() if name not in said} == clean
    # prompts go in one call, but for those of batches with another method
    assert made.text.model.calls[0] > 4


def test_vllm_refuses_or_stops(vllm, exported, pictures, tmp_path):
    made = VllmEngine("pocket", AnswerSettings(), exported)
    documents = [{"id": word, "question": f"what is a {word} ?"} for word in ("star", "king", "ring", "moon")]
    found = alone_in_one(made, Source(written(tmp_path, documents)))
    assert found["king"]["error"] == {"type": "ValueError", "message": "a prompt that is refused"}
    assert "answer" in found["star"]
    assert "answer" in found["ring"]
    assert "abort" in found["moon"]["error"]["message"]
    made.text.model.left = True
    with pytest.raises(EngineError, match="vLLM has stopped"):
        alone_in_one(made, Source(tmp_path / "questions.jsonl"))
    with pytest.raises(EngineError, match="out of order"):
        alone_in_one(made, Source(written(tmp_path, [{"question": "what is a wing ?"}])))


def alone_in_one(engine, source: Source) -> dict:
    return {row["id"]: row for batch in offline.answered(source, source.lines(), AnswerSettings(), engine, 64) for row in batch}


def test_vllm_that_is_missing_or_broken(monkeypatch, exported, vllm, tmp_path):
    def no_memory(**_):
        raise RuntimeError("no memory")

    vllm.LLM = no_memory
    with pytest.raises(EngineError, match="does not start: no memory"):
        vllm_engine.TextEngine(exported)
    with pytest.raises(InputError, match="no export"):
        vllm_engine.TextEngine(tmp_path)
    monkeypatch.delitem(sys.modules, "vllm")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(MissingEngineError, match="pip install vllm"):
        vllm_engine.TextEngine(exported)
    (tmp_path / "vllm.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    with pytest.raises(EngineError, match="cannot be imported: operator"):
        vllm_engine.TextEngine(exported)


def test_prompts_travel_as_bytes():
    embeds = [torch.randn(3, 4).bfloat16(), torch.randn(1, 4).bfloat16()]
    prompt = EncodedPrompt([1, 4, 4, 4, 7, 4], [False, True, True, True, False, True], embeds, [9, 9])
    found = Ready.unpacked(Ready(prompt, 5, 0.3, 2**60 - 1).packed())
    assert (found.prompt.ids, found.prompt.visual, found.prompt.before) == (prompt.ids, prompt.visual, prompt.before)
    assert (found.max_new_tokens, found.temperature, found.seed) == (5, 0.3, 2**60 - 1)
    assert all(torch.equal(a, b) for a, b in zip(found.prompt.embeds, embeds, strict=True))
    assert [each.dtype for each in found.prompt.embeds] == [torch.bfloat16] * 2
    text = Ready(EncodedPrompt([1, 2], [False, False], [], []), 5, 0.0, 0)
    assert Ready.unpacked(text.packed()) == text


PLACED = [Places(torch.tensor([[0, 0, 1], [0, 2, 0], [0, 2, 2]]), 3), Places(torch.tensor([[0, 1, 1]]), 2)]
EMBEDS = [torch.randn(3, 4), torch.randn(1, 4)]


@pytest.mark.parametrize(("before", "after"), [([], [9]), ([1, 2], [3]), ([4], [4, 4])])
def test_prompts_with_places_travel_as_bytes_and_name_each_picture_once(before, after):
    """7 is the placeholder; what vLLM repeats has to be the prompt again."""
    ids = [*before, 7, 7, 7, 5, 7, *after]
    prompt = EncodedPrompt(ids, [each == 7 for each in ids], EMBEDS, [9, 4], PLACED)
    found = Ready.unpacked(Ready(prompt, 5, 0.3, 1).packed()).prompt
    assert [each.extent for each in found.places] == [3, 2]
    config = SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=2))
    asked = ImageEmbeds.prompt(found, config, torch.bfloat16)
    fields, counts = asked["multi_modal_data"]["image"], iter([3, 1])
    assert [each for token in asked["prompt_token_ids"] for each in [token] * (next(counts) if token == 7 else 1)] == ids
    assert torch.equal(fields["image_positions"], torch.cat([each.positions for each in PLACED]))
    assert torch.equal(fields["image_embeds"], torch.cat(EMBEDS).bfloat16())
    assert fields["image_grid_thw"].prod(-1).tolist() == [4 * 3, 4 * 1]


def test_vllm_without_the_plugin_is_refused(vllm, tmp_path, monkeypatch):
    export("pocket-qwen", tmp_path / "whole")
    monkeypatch.setattr(vllm_engine, "entry_points", lambda **_: ())
    with pytest.raises(MissingEngineError, match="does not find foveate's plugin"):
        vllm_engine.TextEngine(tmp_path / "whole")


def test_actors_hand_on_what_fails(vllm, exported, pictures, tmp_path, engine):
    source = Source(written(tmp_path, [*mixed(pictures, 6), "{", {"question": "q", "method": "magic"}]))
    lines = source.lines()
    places = {
        "number": np.array([line.number for line in lines]),
        "id": np.array([json.dumps(line.id) for line in lines], dtype=object),
        "start": np.array([line.start for line in lines]),
        "line": np.array([line.line for line in lines], dtype=object),
    }
    encoded = EncoderActor(source.path, "pocket", AnswerSettings())(places)
    sent = {name: np.array(values, dtype=object) for name, values in encoded.items()}
    assert sum(map(len, sent["prompt"])) > 6 * 150 * 192 * 4  # the embeddings
    found = [json.loads(row) for row in EngineActor(exported)(sent)["row"]]
    assert {row["id"]: row for row in found} == alone(engine, source)
    assert sum("error" in row for row in found) == 2


def test_ray_that_is_missing(monkeypatch, pictures, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    source = Source(written(tmp_path, mixed(pictures, 2)))
    with pytest.raises(MissingExtraError, match=r"foveate\[ray\]"):
        next(answered_by_ray(source, source.lines(), AnswerSettings(), "pocket", tmp_path, 8, Cluster()))


def test_gpus_of_actors():
    assert shares({"CPU": 8.0}, Cluster(2, 2)) == (0, 0)
    assert shares({"CPU": 64.0, "GPU": 8.0}, Cluster(2, 6)) == (1, 1)
    assert shares({"CPU": 64.0, "GPU": 8.0}, Cluster(3, 6)) == (0.5, 1)  # two and one
    assert shares({"CPU": 64.0, "GPU": 2.0}, Cluster(1, 2)) == (0, 1)  # encoders on CPUs
    for resources, said in (({"CPU": 3.0}, "3 CPUs"), ({"CPU": 9.0, "GPU": 1.0}, "1 GPUs")):
        with pytest.raises(FoveateError, match=said):
            shares(resources, Cluster(2, 2))


def test_fingerprints_of_models(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(bytes(3 * files.CHUNK * files.CHUNKS))
    first = offline.fingerprint(str(tmp_path))
    (tmp_path / "notes.md").write_text("notes")
    assert offline.fingerprint(str(tmp_path)) == first
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.write(b"other")
    second = offline.fingerprint(str(tmp_path))
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    third = offline.fingerprint(str(tmp_path))
    (base / "config.json").write_text("[]")
    assert len({first, second, third, offline.fingerprint(str(tmp_path)), offline.fingerprint("pocket")}) == 5
