"""Clients that read nothing or send half a body: they hold no place, and a server that is told to end ends."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from foveate.cli import serve
from foveate.cli.main import app
from foveate.serving.encoding import PictureEncoder
from foveate.serving.gateway.launch import free_port
from foveate.serving.gateway.requests import Limits
from tests.serving_fakes import FakeEngine, events, metric, served, wait_for

from .asked import MESSAGE, post, started

LONG = "word " * 400_000
ENDLESS = 1000  # times LONG, which no socket holds


@contextlib.contextmanager
def connected(url: str, sent: bytes) -> Iterator[socket.socket]:
    host, port = url.removeprefix("http://").split(":")
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect((host, int(port)))
        client.sendall(sent)
        yield client


def asking(body: Any, *, length: int | None = None) -> bytes:
    content = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: {length or len(content)}\r\n\r\n"
    return head.encode() + content


def streaming(text: str = LONG) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "stream": True}


def test_a_stream_that_nobody_reads_lets_its_place_go(engine: FakeEngine, encoder: PictureEncoder) -> None:
    def limits(seconds: float) -> Limits:
        return Limits(waiting=1, seconds=seconds, characters=len(LONG))

    sent, engine.repeats = asking(streaming()), ENDLESS
    with started(engine, encoder, limits=limits(600)) as url, connected(url, sent):  # long before its deadline
        wait_for(lambda: metric(url, "foveate_requests_running") == 1)
        assert post(url, {"messages": [MESSAGE]}).status_code == 429
    with started(engine, encoder, limits=limits(8)) as url, connected(url, sent):
        wait_for(lambda: metric(url, 'foveate_requests_total{status="499"}') == 1, 60)  # as if the client had gone
        engine.repeats = 1
        assert metric(url, "foveate_requests_running") == 0
        assert post(url, {"messages": [MESSAGE]}).status_code == 200
        assert metric(url, "foveate_held_bytes") == 0


def test_an_answer_that_nobody_reads_holds_no_place(engine: FakeEngine, encoder: PictureEncoder) -> None:
    sent = asking({**streaming(), "stream": False})
    with (
        started(engine, encoder, limits=Limits(waiting=1, characters=len(LONG))) as url,
        connected(url, sent),
        connected(url, sent),
    ):
        wait_for(lambda: metric(url, 'foveate_requests_total{status="200"}') >= 1)
        wait_for(lambda: metric(url, "foveate_requests_running") == 0)
        assert post(url, {"messages": [MESSAGE]}).status_code == 200


def test_a_slow_reader_in_time_gets_all(engine: FakeEngine, encoder: PictureEncoder) -> None:
    text = "word " * 100_000
    with started(engine, encoder) as url, connected(url, asking(streaming(text))) as client:
        time.sleep(1)
        received = b""
        while b"[DONE]" not in received:
            received += client.recv(2**16)
    assert text.encode() in received


def test_half_a_body_holds_no_place(engine: FakeEngine, encoder: PictureEncoder) -> None:
    half = asking({"messages": [MESSAGE]}, length=10_000)
    with started(engine, encoder, limits=Limits(waiting=1)) as url, connected(url, half), connected(url, half):
        wait_for(lambda: metric(url, "foveate_held_bytes") > 0)
        assert metric(url, "foveate_requests_running") == 0
        assert post(url, {"messages": [MESSAGE]}).status_code == 200
    with started(engine, encoder, limits=Limits(held=200)) as url, connected(url, half), connected(url, half), connected(url, half):
        answer = post(url, {"messages": [{**MESSAGE, "content": "a" * 100}]})  # for which there is no memory left
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")


def test_streams_that_are_read_are_whole_although_there_is_a_deadline(engine: FakeEngine, encoder: PictureEncoder) -> None:
    engine.pause = 0.1
    with started(engine, encoder, limits=Limits(seconds=3.0)) as url:
        assert events(post(url, streaming("a")).text)[-1] == "[DONE]"


def test_a_server_ends_although_a_client_reads_nothing(engine: FakeEngine) -> None:
    port = free_port()
    program = "import sys; from foveate.cli import serve, main; serve.SHUTDOWN = 2; main.app(sys.argv[1:])"
    options = ["serve", "--port", str(port), "--vllm-url"]
    engine.repeats = ENDLESS
    with served(engine.app) as behind:
        process = subprocess.Popen([sys.executable, "-c", program, *options, behind], stderr=subprocess.DEVNULL)
        url = f"http://127.0.0.1:{port}"
        try:
            wait_for(lambda: answers(url), 90)
            asked = streaming("word " * 100_000)
            with connected(url, asking(asked)), connected(url, asking(asked, length=10**7)):
                wait_for(lambda: metric(url, "foveate_requests_running") == 1)
                time.sleep(0.5)
                process.terminate()
                assert process.wait(20) in (0, -signal.SIGTERM)
        finally:
            process.kill()


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def test_connections_of_clients_that_take_nothing_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the kernel: an application cannot."""
    taken: dict[str, Any] = {}

    class Server:
        def __init__(self, config: Any) -> None:
            self.config = config
            taken["config"] = config

        def run(self, sockets: list[socket.socket]) -> None:
            (own,) = sockets
            taken["seconds"] = own.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) / 1000
            own.close()

    monkeypatch.setattr("uvicorn.Server", Server)
    assert CliRunner().invoke(app, ["serve", "--port", "0", "--vllm-url", "http://127.0.0.1:1"]).exit_code == 0
    assert taken["seconds"] == serve.STALLED
    assert taken["config"].timeout_graceful_shutdown == serve.SHUTDOWN
