"""A server of vLLM with the plugin, over HTTP: front end, engine and worker are processes of their own."""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from foveate.pocket import WEIGHTS
from tests.vllm import plugin_engine as engine
from tests.vllm.test_plugin_llava import METHOD, QUESTIONS, Bench, published

BUDGET = 100


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench(WEIGHTS)


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[int]:
    folder = tmp_path_factory.mktemp("server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = dict(model=published(WEIGHTS, folder / "pocket"), port=port, dtype="float32", max_model_len=2048, max_num_seqs=16)
    arguments |= dict(limit_mm_per_prompt='{"image": 2}', hf_overrides=json.dumps({"foveate": dict(method=METHOD, budget=BUDGET)}))
    options = [text for name, value in arguments.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    options += [
        "--enable-mm-embeds",
        "--trust-request-mm-kwargs",
        "--enforce-eager",
        "--host",
        "127.0.0.1",
        "--served-model-name",
        "m",
    ]
    environment = {**os.environ, **engine.ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *options]
    log = folder / "log.txt"
    with log.open("w") as written:
        process = subprocess.Popen(command, env=environment, stdout=written, stderr=written, cwd=folder, start_new_session=True)
    try:
        for _ in range(600):
            assert process.poll() is None, log.read_text()[-6000:]
            try:
                if call(port, "GET", "/health")[0] == 200:
                    break
            except OSError:
                time.sleep(0.3)
        yield port
        assert process.poll() is None, log.read_text()[-6000:]
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


def content(bench: Bench, number: int) -> dict[str, Any]:
    written = io.BytesIO()
    bench.image(number).save(written, "PNG")
    url = "data:image/png;base64," + base64.b64encode(written.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": url}}


def embedded(embeds: torch.Tensor) -> dict[str, Any]:
    written = io.BytesIO()
    torch.save(embeds, written)
    return {"type": "image_embeds", "image_embeds": base64.b64encode(written.getvalue()).decode()}


def call(port: int, method: str, path: str, body: str | None = None) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    try:
        connection.request(method, path, body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def ask(port: int, number: int, parts: Sequence[dict[str, Any]], budget: Any = None) -> tuple[int, str, int]:
    """Status, what was answered, and tokens of the prompt."""
    text = {"type": "text", "text": QUESTIONS[number % len(QUESTIONS)]}
    body: dict[str, Any] = dict(
        model="m", messages=[dict(role="user", content=[*parts, text])], temperature=0, max_tokens=engine.NEW
    )
    body |= dict(ignore_eos=True, skip_special_tokens=False, add_special_tokens=False)
    body |= {} if budget is None else dict(mm_processor_kwargs={"foveate_budget": budget})
    status, answer = call(port, "POST", "/v1/chat/completions", json.dumps(body))
    if status != 200:
        return status, answer, 0
    found = json.loads(answer)
    return status, found["choices"][0]["message"]["content"].strip(), found["usage"]["prompt_tokens"]


def expected(bench: Bench, number: int, budget: float | None, visual: int) -> tuple[int, str, int]:
    tokens, _ = bench.expected(number, METHOD, budget)
    text = len(bench.prompt(number)["prompt_token_ids"]) - 1
    return 200, bench.processor.tokenizer.decode(tokens, skip_special_tokens=False), text + visual


def test_budgets_and_embeddings_at_once(server, bench):
    lengths = [bench.encoded(number, METHOD)[0] for number in range(4, 8)]
    assert len({len(each) for each in lengths}) > 1
    true = [expected(bench, number, budget or BUDGET, budget or BUDGET) for number, budget in enumerate((None, 40, 200, 576))]
    true += [expected(bench, number, None, len(embeds)) for number, embeds in enumerate(lengths, 4)]
    calls = [(server, number, [content(bench, number)], budget) for number, budget in enumerate((None, 40, 200, 576))]
    calls += [(server, number, [embedded(embeds)], None) for number, embeds in enumerate(lengths, 4)]
    with ThreadPoolExecutor(len(calls)) as pool:
        found = list(pool.map(lambda call: ask(*call), calls))
    assert found == true


def test_bad_requests_are_refused_and_the_engine_lives(server, bench):
    (good,) = bench.encoded(4, METHOD)
    broken = good.clone()
    broken[0, 0] = float("nan")
    for embeds in (broken, good[:, :-1], good[:0], good.long(), good[0], good[None, None]):
        status, answer, _ = ask(server, 4, [embedded(embeds)])
        assert status == 400, answer
    for budget in (0, 2.5, "many"):
        status, answer, _ = ask(server, 0, [content(bench, 0)], budget)
        assert (status, "budget" in answer) == (400, True), answer
    assert ask(server, 4, [embedded(good)]) == expected(bench, 4, None, len(good))
