"""The gateway against a stand-in for vLLM, over real sockets: what arrives there, what clients get, and what disturbs nobody."""

from __future__ import annotations

import concurrent.futures
import functools
import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
import torch
from PIL import Image

from foveate import encode
from foveate.pocket import load_pocket
from foveate.serving.app import create_app
from foveate.serving.encoding import PictureEncoder, load_encoder, method_of
from foveate.serving.gateway import Settings
from foveate.serving.memory import Memory, Picture
from foveate.serving.requests import Limits

from .serving_fakes import FakeEngine, checksum, data_url, describe, events, metric, served, shown, wait_for

ASKED = "what color is the star ?"


def picture(seed: int, size: tuple[int, int] = (192, 192)) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, 256, (6, 6, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(coarse.numpy()).resize(size, Image.Resampling.BICUBIC)


def said(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def body(*pictures: int, text: str = ASKED, **options: Any) -> dict[str, Any]:
    parts = [*(shown(data_url(picture(seed))) for seed in pictures), {"type": "text", "text": text}]
    return {"model": "pocket", "messages": [{"role": "user", "content": parts}], **options}


@pytest.fixture(scope="module")
def encoder() -> PictureEncoder:
    return PictureEncoder(load_encoder("pocket"))


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def gateway(engine: FakeEngine, encoder: PictureEncoder) -> Iterator[str]:
    with started(engine, encoder) as url:
        yield url


class started:
    """A gateway in front of an engine, both served."""

    def __init__(self, engine: FakeEngine, encoder: PictureEncoder, *encoders: PictureEncoder, **settings: Any) -> None:
        self.engine, self.encoders, self.settings = engine, [encoder, *encoders], settings

    def __enter__(self) -> str:
        self.behind = served(self.engine.app)
        url = self.behind.__enter__()
        self.app = create_app(Settings("pocket", url, **self.settings), self.encoders)
        self.front = served(self.app)
        return self.front.__enter__()

    def __exit__(self, *_: object) -> None:
        self.front.__exit__(None, None, None)
        self.behind.__exit__(None, None, None)


def post(url: str, sent: Any, **options: Any) -> httpx.Response:
    return httpx.post(f"{url}/v1/chat/completions", json=sent, timeout=60, **options)


@functools.cache
def pocket() -> Any:
    return load_pocket()


def expected(method: str, budget: float | None, *pictures: int, text: str = ASKED) -> tuple[list[int], list[str]]:
    """Counts and sums of what foveate.encode gives for the whole model on one prompt."""
    model, processor = pocket()
    content = [*({"type": "image", "image": picture(seed)} for seed in pictures), {"type": "text", "text": text}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    found = encode(model, method_of(method, budget), **inputs)
    return [len(each) for each in found.embeds], [checksum(each) for each in found.embeds]


# -- what arrives, and what comes back


@pytest.mark.parametrize(("method", "budget"), [("prumerge+", None), ("prumerge", 40), ("cdpruner", 0.25), ("full", None)])
def test_the_engine_gets_what_the_whole_model_would_read(gateway: str, engine: FakeEngine, method: str, budget: Any) -> None:
    answer = post(gateway, body(1, 2, foveate={"method": method, "budget": budget})).json()
    counts, sums = expected(method, budget, 1, 2)
    assert answer["choices"][0]["message"]["content"].split()[:2] == [
        f"[{n}x192:{total}]" for n, total in zip(counts, sums, strict=True)
    ]
    usage = answer["usage"]
    assert usage["prompt_tokens"] == sum(counts) + 9  # <s> user: ... what color is the star ? assistant:
    assert usage["foveate"] == {
        "method": method,
        "budget": budget,
        "visual_tokens": sum(counts),
        "visual_tokens_before": 1152,
        "pictures": [{"visual_tokens": n, "visual_tokens_before": 576} for n in counts],
    }
    assert answer["model"] == "pocket"
    assert engine.seen[0]["model"] == "text-model"
    assert "foveate" not in engine.seen[0]


def test_openai_client_streams(gateway: str) -> None:
    client = openai.OpenAI(base_url=f"{gateway}/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == ["pocket"]
    sent = body(1)
    stream = client.chat.completions.create(
        model="pocket", messages=sent["messages"], stream=True, stream_options={"include_usage": True}, max_tokens=5
    )
    pieces = [*stream]
    text = "".join(piece.choices[0].delta.content for piece in pieces if piece.choices)
    whole = client.chat.completions.create(model="pocket", messages=sent["messages"], max_tokens=5)
    assert text.strip() == whole.choices[0].message.content
    assert {piece.model for piece in pieces} == {"pocket"}
    assert pieces[-1].usage.foveate["visual_tokens"] == whole.usage.foveate["visual_tokens"] == expected("prumerge+", None, 1)[0][0]


def test_a_stream_ends_with_usage_only_where_it_was_asked_for(gateway: str) -> None:
    plain = events(post(gateway, body(1, stream=True)).text)
    assert plain[-1] == "[DONE]"
    assert all("usage" not in piece and piece["choices"] for piece in plain[:-1])
    asked = events(post(gateway, body(1, stream=True, stream_options={"include_usage": True})).text)
    assert asked[-2]["usage"]["foveate"]["visual_tokens_before"] == 576


def test_options_go_on_and_texts_stay_in_their_order(gateway: str, engine: FakeEngine) -> None:
    options = {"temperature": 0.5, "top_p": 0.9, "seed": 3, "max_tokens": 7, "stop": ["x"], "n": 2, "logprobs": True}
    messages = [
        {"role": "system", "content": "answer in a word"},
        {
            "role": "user",
            "content": [{"type": "text", "text": "one"}, shown(data_url(picture(1))), {"type": "text", "text": "two"}],
        },
        {"role": "assistant", "content": "red"},
        {"role": "user", "content": "and now ?"},
    ]
    answer = post(gateway, {"messages": messages, **options}).json()
    assert len(answer["choices"]) == 2
    (seen,) = engine.seen
    assert {name: seen[name] for name in options} == options
    kinds = [[part["type"] for part in message["content"]] for message in seen["messages"]]
    assert kinds == [["text"], ["text", "prompt_embeds", "text"], ["text"], ["text"]]
    assert [message["role"] for message in seen["messages"]] == ["system", "user", "assistant", "user"]


def test_pictures_of_earlier_turns_are_remembered(gateway: str, engine: FakeEngine) -> None:
    batches = "foveate_encoder_batch_count"
    first = post(gateway, body(1)).json()
    assert metric(gateway, batches) == 1
    again = post(gateway, body(1, text="and now ?")).json()
    assert metric(gateway, batches) == 1
    assert metric(gateway, "foveate_pictures_remembered_total") == 1
    assert again["usage"]["foveate"] == first["usage"]["foveate"]
    sent = [[part["data"] for part in seen["messages"][0]["content"] if part["type"] == "prompt_embeds"] for seen in engine.seen]
    assert sent[0] == sent[1]
    post(gateway, body(1, 2))  # one of which is new
    post(gateway, body(2))
    assert metric(gateway, batches) == 2
    for other in ({"method": "prumerge+", "budget": 40}, {"method": "prumerge:paper"}, {"method": "prumerge"}):
        post(gateway, body(1, foveate=other))
    assert metric(gateway, batches) == 5
    counts = [seen["messages"][0]["content"][0]["data"] for seen in engine.seen[-3:]]
    assert len({*counts}) == 3
    for text in ("is there a star ?", "what color is the moon ?"):  # which it reads
        post(gateway, body(1, text=text, foveate={"method": "cdpruner", "budget": 40}))
    assert metric(gateway, batches) == 7


def test_memory_is_bounded() -> None:
    memory, method = Memory(100), method_of("prumerge+")
    keys = memory.keys([b"a", b"b", b"c"], method)
    assert keys == memory.keys([b"a", b"b", b"c"], method_of("prumerge+", None))
    assert not {*keys} & {*memory.keys([b"a", b"b", b"c"], method_of("prumerge+", 1))}
    assert memory.keys([b"a"], method_of("prumerge+", 1)) != memory.keys([b"a"], method_of("prumerge+", 1.0))
    made = [Picture({"data": "x" * 40}, 576, number) for number in range(3)]
    memory.add(keys[:2], made[:2])
    assert memory.get(keys[:1]) == made[:1]  # asked for last
    memory.add(keys[2:], made[2:])
    assert memory.get(keys[1:2]) is None
    assert memory.get([keys[2], keys[0]]) == [made[2], made[0]]
    memory.add(keys[:1], made[:1])
    assert memory.held == 80
    memory.add(keys[1:2], [Picture({"data": "x" * 200}, 576, 1)])  # larger than all of it
    assert memory.held == 0
    assert Memory(0).keys([b"a"], method) == []


def test_text_alone_needs_no_encoder(gateway: str, engine: FakeEngine) -> None:
    answer = post(gateway, {"messages": [{"role": "user", "content": "is there a star ?"}]}).json()
    assert answer["usage"]["foveate"]["visual_tokens"] == 0
    assert metric(gateway, "foveate_encoder_batch_count") == 0


def test_many_at_once_each_get_their_own(gateway: str, engine: FakeEngine) -> None:
    """Different methods, counts and numbers of pictures in the same batches."""
    asked = [((1,), "prumerge+", None), ((2, 3), "prumerge+", None), ((4,), "spatial", 16), ((1, 5), "divprune", 40)] * 4

    def ask(number: int) -> str:
        pictures, method, budget = asked[number]
        text = f"is there a star ? {number}"
        sent = body(*pictures, text=text, foveate={"method": method, "budget": budget}, stream=number % 2 == 0)
        answer = post(gateway, sent)
        if number % 2:
            return answer.json()["choices"][0]["message"]["content"]
        return "".join(piece["choices"][0]["delta"]["content"] for piece in events(answer.text)[:-1]).strip()

    with concurrent.futures.ThreadPoolExecutor(len(asked)) as pool:
        found = [*pool.map(ask, range(len(asked)))]
    for number, (pictures, method, budget) in enumerate(asked):
        counts, sums = expected(method, budget, *pictures, text=f"is there a star ? {number}")
        words = [f"[{n}x192:{total}]" for n, total in zip(counts, sums, strict=True)]
        assert found[number].startswith(" ".join([*words, f"is there a star ? {number}"]))
    assert metric(gateway, "foveate_encoder_batch_count") < len(asked)  # some went together
    assert metric(gateway, "foveate_requests_running") == 0


def test_several_encoders_work_at_once(engine: FakeEngine, encoder: PictureEncoder) -> None:
    with started(engine, encoder, encoder.copied("cpu")) as url, concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = [*pool.map(lambda seed: post(url, body(seed)).json(), range(8))]
    for seed, answer in enumerate(answers):
        assert answer["choices"][0]["message"]["content"].split()[0].startswith(f"[{expected('prumerge+', None, seed)[0][0]}x192:")


# -- refusals: a status of 4xx that says why, and the engine never hears of it

MESSAGE = {"role": "user", "content": "hello"}
GREY = data_url(Image.new("L", (64, 64)))
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


# -- limits


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


# -- when the engine fails, or the client goes


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


def test_an_engine_that_goes_and_comes_back(engine: FakeEngine, encoder: PictureEncoder) -> None:
    behind = served(engine.app)
    there = behind.__enter__()
    port = int(there.rpartition(":")[2])
    with served(create_app(Settings("pocket", there), [encoder])) as url:
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
