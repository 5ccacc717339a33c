"""What the playground answers, without a browser."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path

import pytest
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM

import foveate
from foveate.app import comparison
from foveate.app.comparison import MOST, Choice, Playground, open_upload
from foveate.chat import make_inputs
from foveate.engine.install import installed_on
from foveate.lab.examples import examples
from foveate.loading import Loaded
from foveate.video import Video


@pytest.fixture(scope="module")
def playground() -> Playground:
    return Playground(["pocket", "pocket-qwen"])


def scene(playground: Playground, name: str, number: int = 1):
    return examples(playground.models[name], 7)[number]


def test_answers_are_those_of_the_library(playground):
    _, picture, question = scene(playground, "pocket")
    found = playground.compare("pocket", picture, question.text, [Choice("prumerge+"), Choice("fastv", 0.25)])
    assert [each.label for each in found.outcomes] == ["all tokens", "prumerge+, its own rule", "fastv, 25% kept"]
    loaded = playground.models["pocket"]
    inputs, _ = make_inputs(loaded.processor, loaded.model, picture, question.text)
    start = inputs["input_ids"].shape[1]
    ways = [None, foveate.PruMergePlus(), foveate.FastV(budget=0.25)]
    for way, outcome in zip(ways, found.outcomes, strict=True):
        with (way or foveate.KeepAll())(loaded.model) as session:
            out = loaded.model.generate(**inputs, max_new_tokens=64, do_sample=False)
        assert outcome.answer.text == loaded.processor.decode(out[0, start:], skip_special_tokens=True).strip()
        assert outcome.answer.layers == session.report.layers
        assert outcome.answer.prefill > 0
        assert outcome.answer.seconds > 0
    full, fewer, inside = (outcome.answer for outcome in found.outcomes)
    assert fewer.cache < inside.cache < full.cache
    assert inside.layers[0] == 576 > inside.layers[-1] == 144
    assert found.frames[0].size == (336, 336) or found.frames[0].size == picture.size
    assert found.notes == []


def test_kv_bytes_are_counted_by_hand(playground):
    _, picture, question = scene(playground, "pocket")
    found = playground.compare("pocket", picture, question.text, [Choice("spatial", 0.25)])
    config = playground.models["pocket"].model.config.get_text_config()
    token = 2 * config.num_key_value_heads * config.head_dim * 4 * config.num_hidden_layers
    full, fewer = (outcome.answer for outcome in found.outcomes)
    assert full.cache - fewer.cache == (576 - 144) * token


def test_times_are_medians_of_rounds(playground, monkeypatch):
    """Of rounds in which all ways run; only as many as there is patience for."""
    _, picture, question = scene(playground, "pocket")
    run, called = comparison.ask, []

    def slow(model, processor, inputs, method, **options):
        answer = run(model, processor, inputs, method, **options)
        called.append(method and method.name)
        return dataclasses.replace(answer, prefill=float(len(called)), seconds=10.0 * len(called))

    monkeypatch.setattr(comparison, "ask", slow)
    monkeypatch.setattr(comparison, "PATIENCE", 1000.0)
    found = playground.compare("pocket", picture, question.text, [Choice("spatial", 0.1)])
    assert called == [None, *[None, "spatial"] * 5], "one warms up"
    assert [each.answer.prefill for each in found.outcomes] == [6.0, 7.0]
    assert [each.answer.seconds for each in found.outcomes] == [60.0, 70.0]
    monkeypatch.setattr(comparison, "PATIENCE", 0.0)
    called.clear()
    playground.compare("pocket", picture, question.text, [Choice("spatial", 0.1)])
    assert called == [None, None, "spatial"]


def test_a_clip_has_counts_for_each_frame(playground):
    _, clip, question = scene(playground, "pocket-qwen", 2)
    assert isinstance(clip, Video)
    found = playground.compare("pocket-qwen", clip, question.text, [Choice("vidcom2", 0.25)])
    assert len(found.frames) == len(found.seconds) == len(clip.frames)
    assert found.counts[0] == []
    assert sum(frame["after"] for frame in found.counts[1]) == found.outcomes[1].answer.visual_tokens


def test_one_method_that_fails_leaves_the_others(playground):
    _, picture, question = scene(playground, "pocket-qwen", 0)
    found = playground.compare(
        "pocket-qwen", picture, question.text, [Choice("spatial"), Choice("no-such"), Choice("spatial", 0.5)]
    )
    assert [each.answer is None for each in found.outcomes] == [False, True, True, False]
    assert "no rule of its own" in found.outcomes[1].problem
    assert "unknown method" in found.outcomes[2].problem
    assert installed_on(playground.models["pocket-qwen"].model) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shown": None}, "there is no picture"),
        ({"question": " \n "}, "the question is empty"),
        ({"question": "a" * 1001}, "at most 1000"),
        ({"question": "what is <image> ?"}, "which stands for the picture"),
        ({"choices": []}, "Choose one to 3"),
        ({"choices": [Choice("spatial", 0.5)] * (MOST + 1)}, "Choose one to 3"),
        ({"model": "other"}, "there is no model 'other' here. Choose one of pocket, pocket-qwen"),
    ],
)
def test_errors_are_in_words(playground, change, message):
    _, picture, question = scene(playground, "pocket")
    asked = {"model": "pocket", "shown": picture, "question": question.text, "choices": [Choice("spatial", 0.5)]} | change
    with pytest.raises(foveate.InputError, match=message):
        playground.compare(**asked)


def test_several_ask_at_once(playground):
    """Each gets the answer to its own question."""
    _, picture, _ = scene(playground, "pocket")
    alone = {n: playground.compare("pocket", picture, "how many objects are there ?", [Choice("spatial", n)]) for n in (0.1, 0.5)}
    found: dict[float, list] = {0.1: [], 0.5: []}

    def run(share: float) -> None:
        for _ in range(3):
            one = playground.compare("pocket", picture, "how many objects are there ?", [Choice("spatial", share)])
            found[share].append(one.outcomes[1].answer)

    threads = [threading.Thread(target=run, args=(share,)) for share in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for share, answers in found.items():
        expected = alone[share].outcomes[1].answer
        assert [(answer.text, answer.layers) for answer in answers] == [(expected.text, expected.layers)] * 3


def test_models_that_cannot_be_used(tmp_path):
    with pytest.raises(foveate.InputError, match="there is no folder"):
        Playground(["./nowhere"])


def test_a_model_that_sees_nothing_is_refused_at_the_start(monkeypatch):
    config = LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    monkeypatch.setattr(comparison, "load", lambda name, **_: Loaded(name, LlamaForCausalLM(config), None))
    with pytest.raises(foveate.UnsupportedModelError):
        Playground(["text"])


def test_uploads(tmp_path):
    Image.new("RGB", (40, 30), "red").save(tmp_path / "a.png")
    shown, _ = open_upload(tmp_path / "a.png")
    assert shown.size == (40, 30)
    frames = [Image.new("RGB", (40, 30), color) for color in ("red", "green", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=100)
    shown, _ = open_upload(tmp_path / "a.gif")
    assert len(shown.frames) == 3


@pytest.mark.parametrize(
    ("name", "contents", "message"),
    [
        ("a.png", b"no picture", "a.png is not a picture"),
        ("a.jpg", b"\xff\xd8\xff\xe0 broken", "a.jpg"),
        ("a.txt", b"hello", "a.txt is not a picture"),
        ("a.mp4", b"no film at all", "a.mp4"),
    ],
)
def test_uploads_that_cannot_be_used(tmp_path: Path, name, contents, message):
    (tmp_path / name).write_bytes(contents)
    with pytest.raises(foveate.FoveateError, match=message) as error:
        open_upload(tmp_path / name)
    assert str(tmp_path) not in str(error.value)


def test_uploads_that_are_too_large(tmp_path):
    Image.new("1", (5000, 2500)).save(tmp_path / "large.png")
    with pytest.raises(foveate.InputError, match="5000 x 2500 pixels; at most 12,000,000"):
        open_upload(tmp_path / "large.png")
