"""Requests that the gateway refuses: a status of 4xx that says why, and the engine never hears of it."""

from __future__ import annotations

import concurrent.futures
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from PIL import Image

from foveate.serving.encoding import PictureEncoder
from tests.serving_fakes import FakeEngine, data_url, shown

from .asked import ASKED, GREY, MESSAGE, body, picture, post, started

REFUSED: dict[str, tuple[Any, str]] = {
    "no JSON": (b"{", "no JSON"),
    "no object": (b"[]", "no JSON object"),
    "NaN": (b'{"messages": [{"role": "user", "content": "a"}], "temperature": NaN}', "NaN is no number"),
    "not unicode": (b'{"messages": "\xff"}', "no JSON"),
    "deep": (b"[" * 100_000, "no JSON"),
    "no messages": ({}, "at least one message"),
    "empty messages": ({"messages": []}, "at least one message"),
    "odd role": ({"messages": [{"role": "robot", "content": "a"}]}, "needs a role"),
    "odd content": ({"messages": [{"role": "user", "content": 3}]}, "text or a list"),
    "no content": ({"messages": [{"role": "user", "content": None}]}, "text or a list"),
    "odd part": ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "text or image_url"),
    "embeddings": ({"messages": [{"role": "user", "content": [{"type": "prompt_embeds", "data": "AAAA"}]}]}, "text or image_url"),
    "text of no text": ({"messages": [{"role": "user", "content": [{"type": "text", "text": 3}]}]}, "must be a text"),
    "url of no text": ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "must be a text"),
    "unknown argument": ({"messages": [MESSAGE], "chat_template": "{{ x }}"}, "unknown argument 'chat_template'"),
    "other model": ({"messages": [MESSAGE], "model": "gpt"}, "no model 'gpt'"),
    "many answers": ({"messages": [MESSAGE], "n": 10**6}, "from 1 to 8"),
    "odd stream": ({"messages": [MESSAGE], "stream": "yes"}, "true or false"),
    "unknown method": ({"messages": [MESSAGE], "foveate": {"method": "magic"}}, "magic"),
    "inside the decoder": ({"messages": [MESSAGE], "foveate": {"method": "fastv", "budget": 0.5}}, "inside the language model"),
    "odd budget": ({"messages": [MESSAGE], "foveate": {"budget": 0}}, "no visual token"),
    "budget of no number": ({"messages": [MESSAGE], "foveate": {"budget": "many"}}, "must be a name and"),
    "true budget": ({"messages": [MESSAGE], "foveate": {"budget": True}}, "must be a name and"),
    "other field": ({"messages": [MESSAGE], "foveate": {"positions": "original"}}, "must be an object"),
    "no budget": ({"messages": [MESSAGE], "foveate": {"method": "divprune"}}, "no rule of its own"),
    "placeholder": ({"messages": [{"role": "user", "content": "an <image> here"}]}, "stands for pictures"),
    "placeholder of vLLM": ({"messages": [{"role": "user", "content": "<prompt_embeds>"}]}, "stands for pictures"),
    "picture of the assistant": ({"messages": [{"role": "assistant", "content": [shown(GREY)]}]}, "messages of the user"),
    "file": ({"messages": [{"role": "user", "content": [shown("file:///etc/passwd")]}]}, "taken from data URLs"),
    "path": ({"messages": [{"role": "user", "content": [shown("/etc/passwd")]}]}, "taken from data URLs"),
    "remote": ({"messages": [{"role": "user", "content": [shown("http://127.0.0.1:1/a.png")]}]}, "taken from data URLs"),
    "odd data": ({"messages": [{"role": "user", "content": [shown("data:text/html,hello")]}]}, "none of a picture"),
    "no base64": ({"messages": [{"role": "user", "content": [shown("data:image/png;base64,***")]}]}, "not valid base64"),
    "no picture": ({"messages": [{"role": "user", "content": [shown("data:image/png;base64,aGVsbG8=")]}]}, "not a picture"),
    "damaged": ({"messages": [{"role": "user", "content": [shown(data_url(picture(1))[:400] + "=")]}]}, "picture 1"),
    "small": ({"messages": [{"role": "user", "content": [shown(data_url(Image.new("RGB", (2, 2))))]}]}, "at least 4"),
    "large": ({"messages": [{"role": "user", "content": [shown(data_url(Image.new("1", (9000, 9000))))]}]}, "25000000 are allowed"),
    "many pictures": ({"messages": [{"role": "user", "content": [shown(GREY)] * 9}]}, "at most 8"),
}


@pytest.fixture(scope="module")
def shared_gateway(encoder: PictureEncoder) -> Iterator[tuple[str, FakeEngine]]:
    engine = FakeEngine()
    with started(engine, encoder) as url:
        yield url, engine


@pytest.mark.parametrize("name", REFUSED)
def test_bad_requests(shared_gateway: tuple[str, FakeEngine], name: str) -> None:
    (url, engine), (sent, why) = shared_gateway, REFUSED[name]
    content = sent if isinstance(sent, bytes) else json.dumps(sent).encode()
    answer = httpx.post(f"{url}/v1/chat/completions", content=content, timeout=60)
    assert answer.status_code == (404 if name == "other model" else 400), answer.text
    error = answer.json()["error"]
    assert why in error["message"]
    assert error["code"] == answer.status_code
    assert not engine.seen


def test_a_bad_picture_disturbs_no_other(gateway: str) -> None:
    bad = {"messages": [{"role": "user", "content": [shown("data:image/png;base64,aGVsbG8="), {"type": "text", "text": "a"}]}]}
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        answers = [*pool.map(lambda i: post(gateway, bad if i % 3 == 0 else body(i)), range(12))]
    assert [answer.status_code for answer in answers] == [400 if i % 3 == 0 else 200 for i in range(12)]


def test_features_that_are_not_finite_never_reach_the_engine(engine: FakeEngine, encoder: PictureEncoder) -> None:
    broken = encoder.copied("cpu")
    next(broken.parts.projector.parameters()).data.fill_(float("nan"))
    with started(engine, broken) as url:
        answer = post(url, body(1))
        assert answer.status_code == 400
        assert "finite" in answer.json()["error"]["message"]
        assert post(url, {"messages": [MESSAGE]}).status_code == 200
    assert [len(seen["messages"][0]["content"]) for seen in engine.seen] == [1]


def test_an_encoder_that_fails_fails_alone(engine: FakeEngine, encoder: PictureEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    own = encoder.encode

    def encode_all(conversations: Any, method: Any) -> Any:
        if any("trap" in part.get("text", "") for messages in conversations for part in messages[0]["content"]):
            raise RuntimeError("out of memory")
        return own(conversations, method)

    monkeypatch.setattr(encoder, "encode", encode_all)
    with started(engine, encoder) as url, concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = [*pool.map(lambda i: post(url, body(i, text="trap" if i == 3 else ASKED)), range(8))]
    assert [answer.status_code for answer in answers] == [500 if i == 3 else 200 for i in range(8)]
    assert "out of memory" in answers[3].json()["error"]["message"]
