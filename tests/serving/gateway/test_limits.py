"""What the gateway limits: sizes, numbers, times, hosts and keys."""

from __future__ import annotations

import concurrent.futures
import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from PIL import Image
from typer.testing import CliRunner

from foveate.cli.main import app
from foveate.errors import InputError
from foveate.serving.encoding import PictureEncoder
from foveate.serving.gateway.app import create_app
from foveate.serving.gateway.gateway import GatewaySettings
from foveate.serving.gateway.requests import Limits
from tests.serving_fakes import FakeEngine, events, metric, served, shown, wait_for

from .asked import ASKED, MESSAGE, expected, picture, post, started


def test_bodies_are_limited(engine: FakeEngine, encoder: PictureEncoder) -> None:
    with started(engine, encoder, limits=Limits(body_bytes=10_000, body_seconds=1.0)) as url:
        sent = json.dumps({"messages": [{"role": "user", "content": "a" * 20_000}]}).encode()
        answer = httpx.post(f"{url}/v1/chat/completions", content=sent)
        assert (answer.status_code, "larger than 10000 bytes" in answer.text) == (413, True)

        def pieces() -> Iterator[bytes]:  # without a length that is told before
            yield from (sent[i : i + 3000] for i in range(0, len(sent), 3000))

        assert httpx.post(f"{url}/v1/chat/completions", content=pieces()).status_code == 413
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as slow:
            slow.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 5000\r\n\r\n{")
            slow.settimeout(10)
            begin = time.monotonic()
            assert slow.recv(1000).startswith(b"HTTP/1.1 408")
        assert 0.9 < time.monotonic() - begin < 8
    assert not engine.seen


def test_a_length_that_is_told_in_two_ways(gateway: str) -> None:
    """A proxy in front may take the other one, and give a client the answer of the next."""
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n"
    host, port = gateway.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as opened:
        opened.settimeout(10)
        opened.sendall(head + b"0\r\n\r\nGET /health HTTP/1.1\r\nHost: a\r\n\r\n")
        told = b"".join(iter(lambda: opened.recv(2**16), b""))  # until it is closed
    assert told.startswith(b"HTTP/1.1 400")
    assert told.count(b"HTTP/1.1") == 1


def test_nobody_is_sent_elsewhere(gateway: str) -> None:
    assert httpx.get(f"{gateway}/v1/models/", headers={"Host": "elsewhere.example"}).status_code == 404


def test_more_requests_than_allowed_are_turned_away(engine: FakeEngine, encoder: PictureEncoder) -> None:
    engine.pause = 1.5
    with started(engine, encoder, limits=Limits(waiting=3)) as url:
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            answers = [*pool.map(lambda _: post(url, {"messages": [MESSAGE]}), range(8))]
        codes = sorted(answer.status_code for answer in answers)
        assert codes == [200] * 3 + [429] * 5
        refused = next(answer for answer in answers if answer.status_code == 429)
        assert refused.headers["retry-after"] == "5"
        engine.pause = 0
        assert post(url, {"messages": [MESSAGE]}).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_answers_that_take_too_long(engine: FakeEngine, encoder: PictureEncoder, stream: bool) -> None:
    engine.pause = 0.6 if stream else 5
    with started(engine, encoder, limits=Limits(seconds=1.5)) as url:
        answer = post(url, {"messages": [MESSAGE], "stream": stream})
        if stream:
            told = events(answer.text)
            assert told[-1]["error"]["code"] == 504
            assert "[DONE]" not in told
            wait_for(lambda: engine.cancelled == 1)
        else:
            assert answer.status_code == 504
        assert metric(url, 'foveate_requests_total{status="504"}') == 1


def test_pictures_of_allowed_hosts(engine: FakeEngine, encoder: PictureEncoder) -> None:
    from fastapi import FastAPI, Response
    from fastapi.responses import RedirectResponse

    store, saved = FastAPI(), picture(1)
    store.get("/a.bmp")(lambda: Response(_bytes(saved), media_type="image/bmp"))
    store.get("/large")(lambda: Response(b"0" * 400_000))
    store.get("/away")(lambda: RedirectResponse("http://127.0.0.1:1/secret"))
    with served(store) as there:
        host = there.removeprefix("http://")
        with started(engine, encoder, hosts={host}, limits=Limits(body_bytes=200_000)) as url:

            def ask(link: str) -> httpx.Response:
                return post(url, {"messages": [{"role": "user", "content": [shown(link), {"type": "text", "text": ASKED}]}]})

            answer = ask(f"{there}/a.bmp")
            assert (
                answer.json()["choices"][0]["message"]["content"].split()[0].endswith(f":{expected('prumerge+', None, 1)[1][0]}]")
            )
            assert ask(f"{there}/none").status_code == 400
            assert ask(f"{there}/large").status_code == 413
            assert "status 307" in ask(f"{there}/away").text  # which could lead anywhere
            assert host in ask("http://localhost:1/a.png").json()["error"]["message"]
            assert ask(f"http://{host}@localhost:1/a.png").status_code == 400


def _bytes(image: Image.Image) -> bytes:
    import io

    saved = io.BytesIO()
    image.save(saved, "BMP")
    return saved.getvalue()


def test_keys(encoder: PictureEncoder) -> None:
    engine = FakeEngine(key="inner")
    with started(engine, encoder, api_key="outer", vllm_key="inner") as url:
        assert post(url, {"messages": [MESSAGE]}).status_code == 401
        assert post(url, {"messages": [MESSAGE]}, headers={"Authorization": "Bearer wrong"}).status_code == 401
        assert httpx.get(f"{url}/v1/models").status_code == 401
        assert post(url, {"messages": [MESSAGE]}, headers={"Authorization": "Bearer outer"}).status_code == 200
        assert httpx.get(f"{url}/health").status_code == 200
    with started(engine, encoder, vllm_key="wrong") as url:
        answer = post(url, {"messages": [MESSAGE]})
        assert (answer.status_code, "--vllm-key" in answer.text) == (502, True)


def test_metrics_need_the_key(engine: FakeEngine, encoder: PictureEncoder) -> None:
    """They tell which pictures others have sent."""
    with started(engine, encoder, api_key="outer") as url:
        assert httpx.get(f"{url}/metrics").status_code == 401
        assert httpx.get(f"{url}/metrics", headers={"Authorization": "Bearer wrong"}).status_code == 401
        told = httpx.get(f"{url}/metrics", headers={"Authorization": "Bearer outer"})
        assert (told.status_code, "foveate_requests_running" in told.text) == (200, True)
    with started(engine, encoder) as url:
        assert httpx.get(f"{url}/metrics").status_code == 200


@pytest.mark.parametrize("name", ["api_key", "vllm_key"])
@pytest.mark.parametrize("key", ["", " ", "\t", "a b", "a\n", "schl\u00fcssel"])
def test_keys_that_are_none(encoder: PictureEncoder, name: str, key: str) -> None:
    with pytest.raises(InputError, match=r"is empty|has spaces") as told:
        create_app(GatewaySettings("pocket", "http://127.0.0.1:1", **{name: key}), [encoder])
    assert name.replace("_", "-") in str(told.value)


@pytest.mark.parametrize("name", ["api", "vllm"])
@pytest.mark.parametrize("how", ["option", "variable", "variable of spaces"])
def test_an_empty_key_does_not_start(monkeypatch: pytest.MonkeyPatch, name: str, how: str) -> None:
    """It would turn authentication off."""
    monkeypatch.setattr("uvicorn.Server.run", lambda *_, **__: pytest.fail("it serves"))
    variable, option = f"FOVEATE_{name.upper()}_KEY", f"--{name}-key"
    more = [option, ""] if how == "option" else []
    if not more:
        monkeypatch.setenv(variable, "" if how == "variable" else "  ")
    found = CliRunner().invoke(app, ["serve", "--port", "0", "--vllm-url", "http://127.0.0.1:1", *more])
    assert isinstance(found.exception, InputError)
    assert "empty" in str(found.exception)
    assert variable in str(found.exception)


def test_a_key_on_the_command_line_is_taken_before_an_empty_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    served_: list[bool] = []
    monkeypatch.setattr("uvicorn.Server.run", lambda *_, **__: served_.append(True))
    monkeypatch.setenv("FOVEATE_API_KEY", "")
    assert CliRunner().invoke(app, ["serve", "--port", "0", "--vllm-url", "http://127.0.0.1:1", "--api-key", "a"]).exit_code == 0
    assert served_


def test_an_open_server_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("uvicorn.Server.run", lambda *_, **__: None)
    options = ["serve", "--port", "0", "--vllm-url", "http://127.0.0.1:1"]
    assert "whoever reaches" not in CliRunner().invoke(app, options).output
    assert "whoever reaches" in CliRunner().invoke(app, [*options, "--host", "0.0.0.0"]).output  # noqa: S104
    assert "whoever reaches" not in CliRunner().invoke(app, [*options, "--host", "0.0.0.0", "--api-key", "a"]).output  # noqa: S104


def test_heads_of_requests_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever readers of HTTP are installed: one of them takes heads of any size, from whoever connects."""
    found: list[Any] = []
    monkeypatch.setattr("uvicorn.Server.run", lambda self, **_: found.append(self.config))
    assert CliRunner().invoke(app, ["serve", "--port", "0", "--vllm-url", "http://127.0.0.1:1"]).exit_code == 0
    assert (found[0].http, found[0].ws) == ("h11", "none")


def test_the_engine_is_asked_once_at_a_time_whether_it_is_there(encoder: PictureEncoder) -> None:
    """Nobody needs a key for that question."""
    engine, asked = FakeEngine(), []
    own = engine._health

    async def health() -> Any:
        import asyncio

        asked.append(True)
        await asyncio.sleep(1)
        return await own()

    engine.app.router.routes[:] = [route for route in engine.app.router.routes if getattr(route, "path", "") != "/health"]
    engine.app.get("/health")(health)
    with started(engine, encoder) as url, concurrent.futures.ThreadPoolExecutor(16) as pool:
        assert {*pool.map(lambda _: httpx.get(f"{url}/health", timeout=20).status_code, range(16))} == {200}
    assert len(asked) < 4
