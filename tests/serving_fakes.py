"""A stand-in for vLLM that says what it was sent, and servers in threads, so that tests of the gateway go over real sockets."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import torch
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from PIL import Image

WORDS = 6  # of an answer


class FakeEngine:
    """Answers with the shapes and sums of the embeddings that it gets; ``behave`` says what it does otherwise.

    Of images with places it is as strict as vLLM with the plugin of foveate, or, where it behaves "stock", without.

    Attributes
    ----------
    seen : bodies of the requests.
    ports : of the connections by which they came.
    cancelled : streams that were left before their end.
    repeats : how often a stream says its words; many are more than sockets hold for a client that reads nothing.
    """

    def __init__(self, key: str | None = None) -> None:
        self.key, self.seen, self.ports, self.cancelled, self.pause = key, [], [], 0, 0.0
        self.repeats = 1
        self.behave = "well"
        self.offset = 0  # of the prompt's length
        self.app = FastAPI()
        self.app.get("/health")(self._health)
        self.app.get("/v1/models")(self._models)
        self.app.post("/v1/chat/completions")(self._chat)

    async def _health(self) -> Response:
        return Response(status_code=503 if self.behave == "dead" else 200)

    async def _models(self, request: Request) -> Response:
        if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
            return JSONResponse({"error": "Unauthorized"}, 401)
        if self.behave == "breaks":
            return StreamingResponse(self._half(), headers={"Content-Length": "100"})
        if self.behave == "hides":
            return JSONResponse({"detail": "Not Found"}, 404)
        return JSONResponse({"data": [{"id": "text-model"}]} if self.behave != "babbles" else [])

    async def _half(self) -> Any:
        yield b'{"data": ['
        raise ConnectionResetError

    async def _chat(self, request: Request) -> Response:
        body = await request.json()
        self.seen.append(body)
        self.ports.append(request.client.port)
        if body["model"] != "text-model":
            return JSONResponse({"error": {"message": "no such model"}}, 404)
        if self.behave == "refuses":
            return JSONResponse({"error": {"message": "max_tokens is too large", "code": 400}}, 400)
        if self.behave == "fails":
            return JSONResponse({"error": {"message": "EngineCore died", "code": 500}}, 500)
        placed = [part["image_embeds"] for part in parts_of(body["messages"]) if part["type"] == "image_embeds"]
        if any(("image_extents" in each) != ("image_positions" in each) for each in placed) and self.behave != "stock":
            return JSONResponse({"error": {"message": "image_positions and image_extents go together", "code": 400}}, 400)
        words, tokens = describe(body["messages"])
        usage = {"prompt_tokens": tokens + self.offset, "completion_tokens": WORDS, "total_tokens": tokens + WORDS}
        if body["stream"]:
            return StreamingResponse(self._stream(words, usage, request), media_type="text/event-stream")
        await asyncio.sleep(self.pause)
        message = {"role": "assistant", "content": " ".join(words)}
        choices = [{"index": i, "message": message, "finish_reason": "stop"} for i in range(body.get("n", 1))]
        return JSONResponse({"id": "1", "object": "chat.completion", "model": "text-model", "choices": choices, "usage": usage})

    async def _stream(self, words: list[str], usage: dict[str, int], request: Request) -> Any:
        finished = False
        try:
            for number, word in enumerate(words * self.repeats):
                await asyncio.sleep(self.pause)
                if self.behave == "breaks" and number == 2:
                    raise ConnectionResetError
                if self.behave == "tells" and number == 2:
                    yield f"data: {json.dumps({'error': {'message': 'out of memory', 'code': 500}})}\n\n"
                    return
                choice = {"index": 0, "delta": {"content": f"{word} "}, "finish_reason": None}
                yield f"data: {json.dumps({'id': '1', 'model': 'text-model', 'choices': [choice], 'usage': None})}\n\n"
            yield f"data: {json.dumps({'id': '1', 'model': 'text-model', 'choices': [], 'usage': usage})}\n\n"
            finished = True
            yield "data: [DONE]\n\n"
        finally:
            self.cancelled += not finished


def parts_of(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [part for message in messages for part in message["content"]]


def tensor(text: str) -> torch.Tensor:
    return torch.load(io.BytesIO(base64.b64decode(text)), weights_only=True)


def describe(messages: list[dict[str, Any]]) -> tuple[list[str], int]:
    """What an engine says of its messages: shapes and sums of embeddings, texts; and how many tokens the pocket model has of it."""
    words, tokens = [], 1 + 1  # <s>, assistant:
    if any(part["type"] == "image_embeds" for part in parts_of(messages)):
        tokens += 2 * len(messages)  # of the second one: <|im_start|> user ... <|im_end|>, and <|im_start|> assistant
    for message in messages:
        tokens += 1
        for part in message["content"]:
            if part["type"] == "prompt_embeds":
                embeds = tensor(part["data"])
            elif part["type"] == "image_embeds":
                embeds = tensor(part["image_embeds"]["image_embeds"])
                tokens += 2  # <|vision_start|>, <|vision_end|>
            else:
                words.append(part["text"])
                tokens += len(part["text"].split())
                continue
            words.append(f"[{len(embeds)}x{embeds.shape[1]}:{checksum(embeds)}]")
            tokens += len(embeds)
    return words + ["."] * max(0, WORDS - len(words)), tokens


def checksum(embeds: torch.Tensor) -> str:
    """Of embeddings, up to rounding of batches."""
    return f"{float(embeds.double().abs().sum()):.2f}"


@contextlib.contextmanager
def served(app: Any) -> Iterator[str]:
    """An application behind a port of this machine, in a thread; its URL."""
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        port = opened.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="critical", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        wait_for(lambda: server.started or not thread.is_alive())
        assert server.started, "the server did not start"
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(20)


def wait_for(true: Any, seconds: float = 20.0) -> None:
    """Until something is true."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def data_url(image: Image.Image, kind: str = "PNG", **options: Any) -> str:
    saved = io.BytesIO()
    image.save(saved, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(saved.getvalue()).decode()}"


def shown(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def events(text: str) -> list[Any]:
    """What server-sent events say."""
    told = [line.removeprefix("data: ") for line in text.splitlines() if line]
    return [each if each == "[DONE]" else json.loads(each) for each in told]


def metric(url: str, name: str) -> float:
    """The value of a metric, by its name with labels."""
    lines = httpx.get(f"{url}/metrics", timeout=10).text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.rpartition(" ")[0] == name)
