"""foveate serve --launch under bad clients and kills of vLLM: good requests get their answer, or are told that there is none."""

from __future__ import annotations

import asyncio
import base64
import collections
import contextlib
import functools
import json
import os
import select
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import httpx
import psutil
import pytest
import torch
from PIL import Image

from foveate.loading import load_encoder
from foveate.pocket.native.clips import draw_clip
from foveate.pocket.scenes import draw_scene
from foveate.serving.encoding import PictureEncoder
from foveate.serving.gateway.app import create_app
from foveate.serving.gateway.gateway import GatewaySettings
from tests.serving_fakes import data_url, events, served, shown

from .stack import PATIENCE, Stack, running

QUESTIONS = ("what color is the circle ?", "how many shapes are there ?", "what is written ?", "is there a red star ?")
METHODS = ({"method": "prumerge+"}, {"method": "prumerge+", "budget": 40}, {"method": "spatial", "budget": 16}, {"method": "full"})
AT_ONCE = 8
CLOSE = 1e-3  # log-probabilities of two words between which rounding may decide
# several answers: 10 s of work, and more than fits into the buffers of a connection that nobody reads
LONG = {"max_tokens": 900, "ignore_eos": True, "n": 8, "temperature": 1}
ENDED = ("stop", "length")
UNAVAILABLE = ("502", "503")


@functools.cache
def scene(number: int) -> str:
    return data_url(Image.fromarray(draw_scene(Random(number)).image))


@functools.cache
def clip(number: int) -> dict[str, Any]:
    """A moving picture, as a video."""
    frames = [Image.fromarray(frame) for frame in draw_clip(Random(number), (5, 112, 96)).frames]
    return {"type": "video_url", "video_url": {"url": data_url(frames[0], "GIF", save_all=True, append_images=frames[1:])}}


def asked(number: int, clips: bool = False, **options: Any) -> dict[str, Any]:
    """A good request; every third one is streamed, every fourth has an answer of fixed length, every fifth may be about a clip."""
    about = clip(number) if clips and number % 5 == 4 else shown(scene(number))
    content = [about, {"type": "text", "text": QUESTIONS[number % len(QUESTIONS)]}]
    length = {"max_tokens": 40, "ignore_eos": True} if number % 4 == 3 else {"max_tokens": 16}
    sent = {"messages": [{"role": "user", "content": content}], "temperature": 0, "foveate": METHODS[number % len(METHODS)]}
    return {**sent, **length, "stream": number % 3 == 0, **options}


def said(*content: Any, **options: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(content)}], **options}


TEXT = {"type": "text", "text": "what is written ?"}
GREY, LARGE = (data_url(Image.new("L", size)) for size in ((64, 64), (900, 900)))
NOISE = base64.b64encode(Random(0).randbytes(3000)).decode()
BAD: dict[str, tuple[Any, int, str]] = {
    "half a body": (b'{"messages": [{"role"', 400, "no JSON"),
    "no unicode": (b'{"messages": "\xff\xfe"}', 400, "no JSON"),
    "a list": (b"[1, 2]", 400, "no JSON object"),
    "deep": (b"[" * 50_000, 400, "no JSON"),
    "NaN": (json.dumps(said(TEXT, temperature=float("nan"))).encode(), 400, "NaN is no number"),
    "-Infinity": (json.dumps(said(TEXT, top_p=-float("inf"))).encode(), 400, "Infinity is no number"),
    "beyond floats": (json.dumps(said(TEXT)).encode()[:-1] + b', "temperature": 1e999}', 400, "too large a number"),
    "budget beyond floats": (json.dumps(said(TEXT)).encode()[:-1] + b', "foveate": {"budget": 1e999}}', 400, "too large a number"),
    "half a character": (said({"type": "text", "text": "what is \ud800 ?"}), 400, "half a character"),
    "half a character beside a picture": (said(shown(scene(0)), {"type": "text", "text": "\udfff ?"}), 400, "half a character"),
    "half a character in an option": (said(TEXT, stop=["\ud800"]), 400, "half a character"),
    "wrong role": ({"messages": [{"role": ["user"], "content": "a"}]}, 400, "needs a role"),
    "wrong content": ({"messages": [{"role": "user", "content": {"type": "text"}}]}, 400, "a list of parts"),
    "wrong part": (said("text"), 400, "text or image_url"),
    "wrong picture": (said({"type": "image_url", "image_url": [scene(0)]}), 400, "must be a text"),
    "wrong stream": (said(TEXT, stream="yes"), 400, "true or false"),
    "wrong temperature": (said(TEXT, temperature="hot"), 400, "temperature"),
    "wrong number of words": (said(TEXT, max_tokens=-5), 400, "max_tokens"),
    "wrong stop": (said(TEXT, stop={"a": 1}), 400, "stop"),
    "too long": (said({"type": "text", "text": "red " * 2000}), 400, "1024"),
    "unknown method": (said(TEXT, foveate={"method": "magic"}), 400, "magic"),
    "method of the decoder": (said(shown(scene(0)), TEXT, foveate={"method": "fastv", "budget": 0.5}), 400, "inside the language"),
    "wrong budget": (said(shown(scene(0)), TEXT, foveate={"budget": -4}), 400, "budget"),
    "large body": (said(TEXT, user="x" * 2**20), 413, "larger than 1048576 bytes"),
    "large picture": (said(shown(data_url(Image.new("1", (2000, 2000)))), TEXT), 400, "1000000 are allowed"),
    "small picture": (said(shown(data_url(Image.new("RGB", (1, 1)))), TEXT), 400, "at least 4"),
    "half a picture": (said(shown(scene(0)[: len(scene(0)) // 2 // 4 * 4]), TEXT), 400, "picture 1"),
    "noise for a picture": (said(shown(f"data:image/png;base64,{NOISE}"), TEXT), 400, "not a picture"),
    "text for a picture": (said(shown("data:text/plain;base64,aGVsbG8="), TEXT), 400, "none of a picture"),
    "no base64": (said(shown("data:image/png;base64,%%%"), TEXT), 400, "not valid base64"),
    "a file": (said(shown("file:///etc/passwd"), TEXT), 400, "taken from data URLs"),
    "another host": (said(shown("http://127.0.0.1:9/a.png"), TEXT), 400, "taken from data URLs"),
    "no rate": (said({"type": "video", "video": [scene(0)], "fps": 0}), 400, "fps"),
    "no frames": (said({"type": "video", "video": []}), 400, "a list of URLs"),
    "a video of the assistant": ({"messages": [{"role": "assistant", "content": [clip(0)]}]}, 400, "messages of the user"),
    "embeddings": (said({"type": "prompt_embeds", "data": NOISE}), 400, "text or image_url"),
    "another model": (said(TEXT, model="gpt"), 404, "no model 'gpt'"),
}
OWN: dict[str, dict[str, tuple[Any, int, str]]] = {
    "pocket": {
        "placeholder": (said({"type": "text", "text": "<prompt_embeds> ?"}), 400, "stands for pictures"),
        "a video": (said(clip(0), TEXT), 400, "without videos"),
    },
    "pocket-qwen": {
        "placeholder": (said({"type": "text", "text": "<|video_pad|> ?"}), 400, "stands for pictures"),
        "noise for a video": (said({"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{NOISE}"}}), 400, "video 1"),
        "too many frames": (said({"type": "video", "video": [GREY] * 33}), 400, "at most 32"),
        "a large video": (said({"type": "video", "video": [LARGE] * 32}), 400, "together"),
        "embeddings with places": (said({"type": "image_embeds", "image_embeds": {"image_embeds": NOISE}}), 400, "must be of type"),
    },
}


class Served(Stack):
    """A stack with one of the pocket models, and what clients saw of it."""

    def __init__(self, folder: Path, model: str) -> None:
        self.model, self.clips = model, model == "pocket-qwen"
        limits = ("--max-body-mb", "1", "--max-pixels", "1000000", "--max-video-pixels", "20000000", "--timeout", "100")
        super().__init__(folder, "--model", model, *limits)
        self.seen = collections.Counter[str]()
        self.pids: set[int] = set()
        self.slow: socket.socket | None = None

    def wait(self) -> None:
        super().wait()
        self.pids |= {child.pid for child in self.process.children(recursive=True)}

    def asked(self, number: int, **options: Any) -> dict[str, Any]:
        """A good request."""
        return asked(number, self.clips, **options)

    def core(self) -> psutil.Process:
        """The process of vLLM that schedules and computes."""
        (found,) = [child for child in self.engine().children(recursive=True) if "EngineCore" in " ".join(child.cmdline())]
        return found

    def raw(self, sent: dict[str, Any], length: int | None = None) -> socket.socket:
        """A connection on which a request was sent, or a part of its body."""
        body = json.dumps(sent).encode()
        host, port = self.url.removeprefix("http://").split(":")
        opened = socket.create_connection((host, int(port)), timeout=60)
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n\r\n"
        opened.sendall(head.encode() + body[:length])
        return opened

    def slow_told(self, seconds: float) -> None:
        """What the client is told whose body does not come, if it is within some seconds."""
        if self.slow is not None and select.select([self.slow], [], [], seconds)[0]:
            with self.slow:
                assert self.slow.recv(1000).startswith(b"HTTP/1.1 408")
            self.slow = None
            self.seen["408"] += 1


@pytest.fixture(scope="module", params=OWN)
def gateway(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with running(Served(tmp_path_factory.mktemp("faults"), request.param)) as found:
        yield found


async def ask(gateway: Served, client: httpx.AsyncClient, sent: Any) -> tuple[str, str]:
    """Status and answer, or the message of an error; a stream counts by how it ends, and one that only ends is a fault."""
    content = sent if isinstance(sent, bytes) else json.dumps(sent).encode()
    answer = await client.post(f"{gateway.url}/v1/chat/completions", content=content)
    found = read(answer)
    gateway.seen[found[0]] += 1
    return found


def read(answer: httpx.Response) -> tuple[str, str]:
    if not answer.headers["content-type"].startswith("text/event-stream"):
        told = answer.json()
        if answer.status_code != 200:
            assert told["error"]["code"] == answer.status_code
            return str(answer.status_code), told["error"]["message"]
        choice = told["choices"][0]
        assert choice["finish_reason"] in ENDED, told
        return "200", choice["message"]["content"].strip()
    told = events(answer.text)
    if isinstance(told[-1], dict) and "error" in told[-1]:
        return str(told[-1]["error"]["code"]), told[-1]["error"]["message"]
    assert told[-1] == "[DONE]", f"a stream that only ends: {told[-1]}"
    choices = [piece["choices"][0] for piece in told[:-1] if piece["choices"]]
    assert choices[-1]["finish_reason"] in ENDED, told[-3:]
    return "200", "".join(choice["delta"].get("content") or "" for choice in choices).strip()


def connected(gateway: Served) -> httpx.AsyncClient:
    # where connections expire soon, httpx may close one that it has just chosen for a request, if the machine stands still then
    bounds = httpx.Limits(max_connections=64, max_keepalive_connections=8, keepalive_expiry=60)
    return httpx.AsyncClient(timeout=110, limits=bounds)


@pytest.fixture(scope="module")
def right(gateway: Served) -> dict[int, str]:
    """The answers to good requests, one after the other; without those in which rounding may choose a word."""
    found: dict[int, str] = {}
    for number in range(24):
        sent = gateway.asked(number, stream=False, logprobs=True, top_logprobs=2)
        choice = httpx.post(f"{gateway.url}/v1/chat/completions", json=sent, timeout=60).json()["choices"][0]
        gateway.seen["200"] += 1
        steps = [[each["logprob"] for each in step["top_logprobs"]] for step in choice["logprobs"]["content"]]
        if all(first - second > CLOSE for first, second in steps):
            found[number] = choice["message"]["content"].strip()
    assert len(found) >= 16
    assert len({*found.values()}) >= 6
    return found


def test_good_requests_among_bad_ones(gateway: Served, right: dict[int, str]) -> None:
    """Each good request gets its answer, each bad one its reason, and nothing is left of clients that went away."""
    gateway.slow = gateway.raw(gateway.asked(0), 100)  # the rest of its body never comes

    async def leave_early(client: httpx.AsyncClient) -> None:
        sent = gateway.asked(1, stream=True, **LONG)
        async with client.stream("POST", f"{gateway.url}/v1/chat/completions", json=sent) as answer:
            assert answer.status_code == 200
            await anext(answer.aiter_lines())
        gateway.seen["499"] += 1

    one_by_one, bad_ones = asyncio.Lock(), {**BAD, **OWN[gateway.model]}

    async def leave(part: int | None) -> None:
        async with one_by_one:
            core = gateway.core()
            core.suspend()  # a busy machine stands still for seconds, and there must be no answer before the client leaves
            try:
                opened = gateway.raw(gateway.asked(2, stream=False, **LONG), part)
                await asyncio.sleep(0.2)
                opened.close()
            finally:
                core.resume()
        gateway.seen["499"] += 1

    async def good(client: httpx.AsyncClient, number: int) -> None:
        assert await ask(gateway, client, gateway.asked(number)) == ("200", right[number])

    async def bad(client: httpx.AsyncClient, name: str) -> None:
        sent, status, why = bad_ones[name]
        found = await ask(gateway, client, sent)
        assert found[0] == str(status), (name, found)
        assert why in found[1], (name, found)

    async def everything() -> None:
        async with connected(gateway) as client:
            numbers = [*right] * 3
            works = [functools.partial(good, client, number) for number in numbers[:52]]
            works += [functools.partial(bad, client, name) for name in bad_ones]
            works += [functools.partial(leave_early, client)] * 4
            works += [functools.partial(leave, part) for part in (None, None, None, 100, 5000)]
            Random(0).shuffle(works)
            queue, faults = iter(works), []

            async def work() -> None:
                for each in queue:
                    try:
                        await each()
                    except (AssertionError, httpx.HTTPError) as error:
                        faults.append(f"{type(error).__name__}: {error}"[:600])

            await asyncio.gather(*(work() for _ in range(AT_ONCE)))
            assert not faults, "\n".join(faults)

    asyncio.run(everything())
    adds_up(gateway)


def adds_up(gateway: Served) -> None:
    """No request is in progress, one whose body does not come included, and the gateway counted what clients saw."""
    end = time.monotonic() + 10
    while True:
        gateway.slow_told(0)
        found = gateway.metrics()
        counted = {key.split('"')[1]: value for key, value in found.items() if key.startswith("foveate_requests_total")}
        if (found["foveate_requests_running"] == 0 and counted == gateway.seen) or time.monotonic() > end:
            break
        time.sleep(0.2)
    assert (counted, found["foveate_requests_running"]) == (dict(gateway.seen), 0)
    assert found["foveate_encoder_queue"] == 0
    assert found["foveate_prompt_mismatches_total"] == 0
    assert not [child for child in gateway.process.children(recursive=True) if child.status() == psutil.STATUS_ZOMBIE]


def test_features_that_are_not_finite_never_reach_vllm(gateway: Served, right: dict[int, str]) -> None:
    """In vLLM they would spoil answers to others."""
    encoder = PictureEncoder(load_encoder(gateway.model))
    last = encoder.parts.projector or encoder.loaded.model.model.visual.merger
    for parameter in last.parameters():
        torch.nn.init.constant_(parameter, float("nan"))
    engine = gateway.engine()
    url = f"http://127.0.0.1:{engine.cmdline()[engine.cmdline().index('--port') + 1]}"
    broken = create_app(GatewaySettings(gateway.model, url, vllm_key=engine.environ()["VLLM_API_KEY"]), [encoder])

    async def both(there: str) -> None:
        async with connected(gateway) as client:
            for number in [*right][:12]:
                refused = await client.post(f"{there}/v1/chat/completions", json=gateway.asked(number))
                assert (refused.status_code, "finite" in refused.text) == (400, True)
                assert await ask(gateway, client, gateway.asked(number)) == ("200", right[number])
            text = await client.post(f"{there}/v1/chat/completions", json=said(TEXT, max_tokens=4))
            assert text.status_code == 200  # it does reach vLLM

    with served(broken) as there:
        asyncio.run(both(there))
    adds_up(gateway)


def good(found: list[tuple[int, tuple[str, str]]]) -> int:
    """How many requests were answered."""
    return [status for _, (status, _) in found].count("200")


@pytest.mark.parametrize("part", ["engine core", "process group", "told to end"])
def test_vllm_is_killed_and_comes_back(gateway: Served, right: dict[int, str], part: str) -> None:
    """Requests on the way are answered or told so; new ones too, until vLLM is there again by itself."""
    found: list[tuple[int, tuple[str, str]]] = []
    health: list[bool] = []

    async def load(client: httpx.AsyncClient, first: int, back: asyncio.Event) -> None:
        numbers = [*[*right][first::AT_ONCE], *right]
        for turn in range(500):
            if back.is_set():
                return
            number = numbers[turn % len(numbers)]
            found.append((number, await ask(gateway, client, gateway.asked(number))))
            if found[-1][1][0] != "200":
                await asyncio.sleep(1)

    async def watch(client: httpx.AsyncClient, back: asyncio.Event) -> None:
        end = time.monotonic() + PATIENCE
        while not (health and health[-1] and not all(health)):
            assert time.monotonic() < end, "vLLM does not come back"
            health.append((await client.get(f"{gateway.url}/health")).status_code == 200)
            await asyncio.sleep(0.1)
        while good(found[-AT_ONCE:]) < AT_ONCE // 2:
            assert time.monotonic() < end, "vLLM is back and does not answer"
            await asyncio.sleep(0.1)
        back.set()

    async def kill() -> None:
        while good(found) < AT_ONCE:  # it is under load
            await asyncio.sleep(0.1)
        engine = gateway.engine()
        if part == "told to end":
            engine.terminate()
        elif part == "process group":
            os.killpg(engine.pid, signal.SIGKILL)
        else:
            gateway.core().kill()

    async def everything() -> None:
        back = asyncio.Event()
        async with connected(gateway) as client:
            await asyncio.gather(*(load(client, first, back) for first in range(AT_ONCE)), watch(client, back), kill())

    before = gateway.engine().pid
    asyncio.run(everything())
    gateway.wait()
    assert gateway.engine().pid != before
    wrong = [each for each in found if each[1] != ("200", right[each[0]]) and each[1][0] not in UNAVAILABLE]
    assert not wrong, wrong
    assert len(found) > good(found)  # requests were on the way, or came while it was gone
    adds_up(gateway)


def test_a_body_that_does_not_come(gateway: Served) -> None:
    """It was begun before all the rest, and disturbed none of it."""
    gateway.slow_told(60)
    assert gateway.slow is None
    adds_up(gateway)


def test_nothing_is_left_when_it_ends(gateway: Served) -> None:
    """An answer that has begun is completed; then the gateway, vLLM and all that it started are gone."""
    gateway.pids |= {child.pid for child in gateway.process.children(recursive=True)}
    sent = gateway.asked(1, stream=True, max_tokens=100, ignore_eos=True)
    with httpx.stream("POST", f"{gateway.url}/v1/chat/completions", json=sent, timeout=60) as answer:
        lines = answer.iter_lines()
        next(lines)
        gateway.process.terminate()
        assert [line for line in lines if line][-1] == "data: [DONE]"
    assert gateway.process.wait(40) in (0, -signal.SIGTERM)
    left = [pid for pid in gateway.pids if psutil.pid_exists(pid)]
    with contextlib.suppress(psutil.NoSuchProcess):
        left = [pid for pid in left if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]
    assert not left
    log = gateway.log.read_text()
    for fault in ("a request failed", "never retrieved", "Exception in ASGI"):
        assert fault not in log, log[log.index(fault) - 500 :][:3000]
