"""``foveate serve --launch`` with a program in the place of vLLM that fails, or dies, or ends with the gateway."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from foveate.serving.export import export
from foveate.serving.gateway.launch import free_port
from tests.serving_fakes import wait_for

from .asked import body, post

SERVER = """
import argparse, os, sys
import uvicorn
from tests.serving_fakes import FakeEngine

parser = argparse.ArgumentParser()
for name in ("--model", "--host", "--dtype", "--chat-template-content-format"):
    parser.add_argument(name)
parser.add_argument("--port", type=int)
parser.add_argument("--enable-prompt-embeds", action="store_true")
parser.add_argument("--fail", action="store_true")
told = parser.parse_args()
if told.fail:
    print("(Worker pid=3) ERROR 11-27 08:04:55 [executor.py:953] ValueError: Available memory is less than desired. Decrease it.")
    raise RuntimeError("Engine core initialization failed. See root cause above.")
uvicorn.run(FakeEngine(os.environ["VLLM_API_KEY"]).app, host=told.host, port=told.port, log_level="warning")
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("launch") / "text"
    export("pocket", folder)
    return folder


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """In which Python finds a vLLM that is none."""
    package = tmp_path / "found" / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    for folder in (package, package.parent, package.parent.parent):
        (folder / "__init__.py").touch()
    (package / "api_server.py").write_text(SERVER)
    proxies = dict.fromkeys(("HTTP_PROXY", "http_proxy", "ALL_PROXY"), "http://127.0.0.1:9")  # where nobody is: none is asked
    return {**os.environ, **proxies, "PYTHONPATH": os.pathsep.join([str(tmp_path / "found"), str(Path(__file__).parents[3])])}


def command(exported: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "foveate", "serve", "--launch", "--export", str(exported), *options]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [("--fail", "ValueError: Available memory is less than desired. Decrease it."), ("--magic", "unrecognized arguments: --magic")],
)
def test_an_engine_that_does_not_start(exported: Path, environment: dict[str, str], arguments: str, said: str) -> None:
    options = {"capture_output": True, "text": True, "timeout": 120, "check": False}
    found: Any = subprocess.run(command(exported, "--port", "0", "--vllm-args", arguments), env=environment, **options)
    assert found.returncode == 2
    assert "error: vLLM ended while it started." in found.stderr
    assert said in found.stderr
    assert "Traceback" not in found.stderr


def test_a_port_that_is_taken(exported: Path, environment: dict[str, str]) -> None:
    """It is told before vLLM starts."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        asked = command(exported, "--port", str(taken.getsockname()[1]))
        found = subprocess.run(asked, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert found.returncode == 2
    assert "already in use" in found.stderr.lower()
    assert "Give another --port" in found.stderr
    assert "vLLM starts at http" not in found.stderr.partition("foveate.serving INFO")[2]


@pytest.fixture
def running(exported: Path, environment: dict[str, str]) -> Iterator[tuple[str, psutil.Popen]]:
    port = free_port()
    process = psutil.Popen(command(exported, "--port", str(port)), env=environment, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for(lambda: healthy(url), 60)
        yield url, process
    finally:
        everything = [process, *process.children(recursive=True)] if process.poll() is None else []
        for each in everything:
            each.kill()


def healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


@pytest.mark.parametrize("told", [signal.SIGTERM, signal.SIGINT])
def test_an_engine_that_dies_is_started_again_and_ends_with_the_gateway(running: tuple[str, psutil.Popen], told: int) -> None:
    url, process = running
    assert post(url, body(1)).status_code == 200
    (first,) = process.children()
    first.kill()
    wait_for(lambda: post(url, body(1)).status_code == 503, 10)
    wait_for(lambda: healthy(url), 60)
    assert post(url, body(2)).status_code == 200
    (second,) = process.children()
    assert second.pid != first.pid
    process.send_signal(told)
    assert process.wait(30) in (0, -told)
    end = time.monotonic() + 10
    while second.is_running() and second.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < end, "vLLM is left running"
        time.sleep(0.1)
