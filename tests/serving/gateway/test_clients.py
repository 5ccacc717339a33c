"""What the gateway asks of others: of vLLM, without proxies, and of hosts of pictures, which share nothing with it."""

from __future__ import annotations

import gzip
import io
import tracemalloc
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse

from foveate.serving.encoding import PictureEncoder
from foveate.serving.gateway.requests import Limits
from tests.serving_fakes import FakeEngine, served, shown

from .asked import ASKED, MESSAGE, body, picture, post, said, started


def png(seed: int = 1) -> bytes:
    saved = io.BytesIO()
    picture(seed).save(saved, "PNG")
    return saved.getvalue()


def ask(url: str, *links: str) -> httpx.Response:
    return post(url, {"messages": [{"role": "user", "content": [*map(shown, links), said(ASKED)]}]})


class Store:
    """A host of pictures; ``heads`` are the headers of its requests."""

    def __init__(self) -> None:
        self.app, self.heads = FastAPI(), []
        self.app.get("/{name}")(self._picture)

    async def _picture(self, request: Request, name: str) -> Response:
        self.heads.append(dict(request.headers))
        if name == "bomb":
            packed = gzip.compress(gzip.compress(bytes(50_000_000)))
            return Response(packed, headers={"Content-Encoding": "gzip, gzip"})
        if name in ("gzip", "br", "deflate", "zstd"):
            return Response(gzip.compress(png()), headers={"Content-Encoding": name})
        if name == "drips":
            return StreamingResponse(self._drips())
        return Response(png(int(name)), headers={"Set-Cookie": f"session=secret{name}; Path=/"})

    async def _drips(self) -> Any:
        import asyncio

        for _ in range(100):
            yield b"a"
            await asyncio.sleep(0.2)


@pytest.fixture
def store() -> Iterator[tuple[Store, str]]:
    made = Store()
    with served(made.app) as there:
        yield made, there


def test_the_engine_is_asked_without_proxies(monkeypatch: pytest.MonkeyPatch, encoder: PictureEncoder) -> None:
    engine, through = FakeEngine(key="inner"), FastAPI()
    seen: list[str] = []

    @through.middleware("http")
    async def listen(request: Request, _: Any) -> Response:
        seen.append(str(request.url))
        return Response(status_code=502)

    with served(through) as proxy:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "HTTPS_PROXY"):
            monkeypatch.setenv(name, proxy)
        for name in ("NO_PROXY", "no_proxy"):
            monkeypatch.delenv(name, raising=False)
        with started(engine, encoder, vllm_key="inner") as url:
            own = {"trust_env": False, "timeout": 60}
            with httpx.Client(**own) as client:
                for sent in (body(1), body(1, stream=True)):
                    assert client.post(f"{url}/v1/chat/completions", json=sent).status_code == 200
                assert client.get(f"{url}/health").status_code == 200
    assert len(engine.seen) == 2
    assert not seen


def test_no_cookie_goes_anywhere(store: tuple[Store, str], encoder: PictureEncoder) -> None:
    made, there = store
    engine, heads = FakeEngine(), []

    @engine.app.middleware("http")
    async def listen(request: Request, after: Any) -> Response:
        heads.append(dict(request.headers))
        answer = await after(request)
        answer.headers["Set-Cookie"] = "engine=secret; Path=/"
        return answer

    with started(engine, encoder, hosts={there.removeprefix("http://")}) as url:
        for number in (1, 2):
            answer = ask(url, f"{there}/{number}")
            assert answer.status_code == 200, answer.text
            assert "set-cookie" not in answer.headers
    assert len(made.heads) == 2
    assert not [head for head in [*made.heads, *heads] if "cookie" in head]
    assert all("authorization" not in head for head in made.heads)
    assert {head["accept-encoding"] for head in made.heads} == {"identity"}


@pytest.mark.parametrize("name", ["bomb", "gzip", "br", "deflate", "zstd"])
def test_packed_pictures_are_not_unpacked(store: tuple[Store, str], encoder: PictureEncoder, name: str) -> None:
    _, there = store
    with started(FakeEngine(), encoder, hosts={there.removeprefix("http://")}) as url:
        tracemalloc.start()
        answer = ask(url, f"{there}/{name}")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert (answer.status_code, "packed" in answer.text) == (400, True)
    assert name != "bomb" or peak < 200_000_000  # what this test itself packs is 50 MB


def test_all_pictures_of_a_request_share_a_limit(store: tuple[Store, str], encoder: PictureEncoder) -> None:
    _, there = store
    links = [f"{there}/{number}" for number in (1, 2, 3)]
    largest = max(len(png(number)) for number in (1, 2, 3))
    limits = Limits(body_bytes=int(1.5 * largest))
    with started(FakeEngine(), encoder, hosts={there.removeprefix("http://")}, limits=limits) as url:
        assert [ask(url, link).status_code for link in links] == [200] * 3
        assert ask(url, *links).status_code == 413


def test_a_host_that_drips_is_left(store: tuple[Store, str], encoder: PictureEncoder) -> None:
    _, there = store
    limits = Limits(body_seconds=1.0)
    with started(FakeEngine(), encoder, hosts={there.removeprefix("http://")}, limits=limits) as url:
        answer = ask(url, f"{there}/drips")
        assert (answer.status_code, "Timeout" in answer.text) == (400, True)
        assert answer.elapsed.total_seconds() < 5
        assert post(url, {"messages": [MESSAGE]}).status_code == 200
