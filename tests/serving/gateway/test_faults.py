"""Engines that fail or go, clients that leave, and what the gateway counts of all this."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from foveate.errors import InputError
from foveate.serving.encoding import PictureEncoder
from foveate.serving.gateway.app import create_app
from foveate.serving.gateway.gateway import GatewaySettings
from tests.serving_fakes import FakeEngine, describe, events, metric, served, wait_for

from .asked import MESSAGE, body, expected, post


def test_what_the_engine_refuses_or_breaks_is_told(gateway: str, engine: FakeEngine) -> None:
    engine.behave = "refuses"
    answer = post(gateway, body(1, max_tokens=10**9))
    assert (answer.status_code, answer.json()["error"]["message"]) == (400, "max_tokens is too large")
    assert post(gateway, body(1, stream=True)).status_code == 400
    engine.behave = "fails"
    answer = post(gateway, body(1))
    assert (answer.status_code, "EngineCore died" in answer.text) == (502, True)
    for behave, code in (("breaks", 503), ("tells", 502)):
        engine.behave = behave
        told = events(post(gateway, body(1, stream=True)).text)
        assert told[-1]["error"]["code"] == code
        assert "[DONE]" not in told
        assert len(told) == 3
    client = openai.OpenAI(base_url=f"{gateway}/v1", api_key="none", max_retries=0)
    stream = client.chat.completions.create(model="pocket", messages=[MESSAGE], stream=True)
    with pytest.raises(openai.APIError, match="out of memory"):
        list(stream)
    engine.behave = "well"
    assert post(gateway, body(1)).status_code == 200
    assert metric(gateway, "foveate_requests_running") == 0


@pytest.mark.parametrize(
    ("behave", "code", "why"), [("breaks", 503, "went away"), ("babbles", 503, "which model"), ("hides", 502, "Not")]
)
def test_an_engine_that_does_not_say_its_model(gateway: str, engine: FakeEngine, behave: str, code: int, why: str) -> None:
    engine.behave = behave
    for sent in (body(1), body(1, stream=True), {"messages": [MESSAGE]}):
        answer = post(gateway, sent)
        assert (answer.status_code, why in answer.json()["error"]["message"]) == (code, True), answer.text
    engine.behave = "well"
    assert post(gateway, body(1)).status_code == 200


def test_connections_are_not_kept_until_the_engine_closes_them(gateway: str, engine: FakeEngine) -> None:
    """vLLM closes those that were idle for 5 s; a request that comes at this moment would be lost."""
    for pause in (0, 2.5, 0):
        time.sleep(pause)
        assert post(gateway, {"messages": [MESSAGE]}).status_code == 200
    first, second, third = engine.ports
    assert first != second == third


@pytest.mark.parametrize("url", ["127.0.0.1:8001", "localhost:8001", "ftp://localhost", "http://", "http://[1", "http://a:b", ""])
def test_addresses_that_are_none(encoder: PictureEncoder, url: str) -> None:
    with pytest.raises(InputError, match="no address of a vLLM"):
        create_app(GatewaySettings("pocket", url), [encoder])


def test_an_engine_that_goes_and_comes_back(engine: FakeEngine, encoder: PictureEncoder) -> None:
    behind = served(engine.app)
    there = behind.__enter__()
    port = int(there.rpartition(":")[2])
    with served(create_app(GatewaySettings("pocket", there), [encoder])) as url:
        assert httpx.get(f"{url}/health").status_code == 200
        assert post(url, body(1)).status_code == 200
        behind.__exit__(None, None, None)
        answer = post(url, body(1))
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
        assert post(url, body(1, stream=True)).status_code == 503
        assert httpx.get(f"{url}/health").status_code == 503
        assert metric(url, "foveate_engine_up") == 0
        with served_at(engine.app, port):
            wait_for(lambda: httpx.get(f"{url}/health").status_code == 200)
            assert post(url, body(1)).status_code == 200
            assert metric(url, "foveate_engine_up") == 1


def served_at(app: Any, port: int) -> Any:
    import contextlib
    import threading

    import uvicorn

    @contextlib.contextmanager
    def run() -> Iterator[None]:
        server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="critical"))
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        try:
            yield
        finally:
            server.should_exit = True
            thread.join(20)

    return run()


def test_clients_that_leave_are_forgotten(gateway: str, engine: FakeEngine) -> None:
    engine.pause = 0.3
    with httpx.stream("POST", f"{gateway}/v1/chat/completions", json=body(1, stream=True), timeout=60) as stream:
        assert next(stream.iter_lines()).startswith("data: ")
    wait_for(lambda: engine.cancelled == 1)
    engine.pause = 3
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{gateway}/v1/chat/completions", json=body(1), timeout=httpx.Timeout(1.5))
    wait_for(lambda: metric(gateway, "foveate_requests_running") == 0, 2.5)  # before the engine has answered
    wait_for(lambda: metric(gateway, 'foveate_requests_total{status="499"}') == 2)
    engine.pause = 0
    assert post(gateway, body(1)).status_code == 200


def test_an_engine_of_another_model_is_noticed(gateway: str, engine: FakeEngine, caplog: pytest.LogCaptureFixture) -> None:
    post(gateway, body(1))
    assert metric(gateway, "foveate_prompt_mismatches_total") == 0
    engine.offset = 3
    post(gateway, body(2))
    assert metric(gateway, "foveate_prompt_mismatches_total") == 1


def test_metrics_add_up(gateway: str, engine: FakeEngine) -> None:
    for sent in (body(1), body(1, 2), body(1, stream=True)):
        assert post(gateway, sent).status_code == 200
    post(gateway, {"messages": []})
    kept = [*expected("prumerge+", None, 1)[0] * 2, *expected("prumerge+", None, 1, 2)[0]]
    found = {
        name: metric(gateway, name)
        for name in (
            'foveate_requests_total{status="200"}',
            'foveate_requests_total{status="400"}',
            'foveate_pictures_total{method="prumerge+"}',
            'foveate_visual_tokens_total{method="prumerge+"}',
            'foveate_visual_tokens_before_total{method="prumerge+"}',
            "foveate_prompt_tokens_total",
            "foveate_request_seconds_count",
            "foveate_first_token_seconds_count",
        )
    }
    prompts = sum(describe(seen["messages"])[1] for seen in engine.seen)
    assert [*found.values()] == [3, 1, 4, sum(kept), 4 * 576, prompts, 3, 1]
