"""Fields of requests: harmless ones are taken, what would change answers or smuggle in words for pictures is refused."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from foveate.serving.encoding import PictureEncoder
from foveate.serving.gateway.app import create_app
from foveate.serving.gateway.gateway import CHECKED, GatewaySettings
from foveate.serving.gateway.requests import Limits, RequestError, RequestReader
from tests.serving_fakes import FakeEngine, data_url, shown

from .asked import ASKED, GREY, MESSAGE, body, picture, post, said, started

CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": "{}"}}


def called(arguments: str, name: str = "look") -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": [{**CALL, "function": {"name": name, "arguments": arguments}}]}


TOOL = {"type": "function", "function": {"name": "look", "description": "a", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def shared(encoder: PictureEncoder) -> Iterator[tuple[str, FakeEngine]]:
    engine = FakeEngine()
    with started(engine, encoder) as url:
        yield url, engine


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": [*parts]}


HARMLESS: dict[str, Any] = {
    "store": True,
    "service_tier": "auto",
    "prompt_cache_key": "k",
    "prompt_cache_retention": "24h",
    "safety_identifier": "s",
    "modalities": ["text"],
    "verbosity": "medium",
    "metadata": {"a": "b"},
    "user": "u",
    "prediction": {"type": "content", "content": "a"},
    "audio": None,
    "functions": None,
    "web_search_options": None,
    "something_new": None,
    "model": None,
    "tools": None,
    "stream_options": {"include_obfuscation": False, "continuous_usage_stats": True, "other": None},
}


@pytest.mark.parametrize("name", HARMLESS)
def test_fields_that_change_no_answer_are_taken(shared: tuple[str, FakeEngine], name: str) -> None:
    url, engine = shared
    answer = post(url, {"messages": [MESSAGE], name: HARMLESS[name]})
    assert answer.status_code == 200, answer.text
    assert engine.seen[-1].keys() == {"messages", "model", "stream"}


CHANGING: dict[str, Any] = {
    "modalities": ["text", "audio"],
    "verbosity": "low",
    "audio": {"voice": "a"},
    "functions": [{"name": "a"}],
    "web_search_options": {},
    "something_new": False,
    "stream_options": {"include_thoughts": True},
    "chat_template_kwargs": {"a": 1},
    "prompt_embeds": "AAAA",
}


ODD: dict[str, tuple[dict[str, Any], str]] = {
    **{f"method {value!r}": ({"foveate": {"method": value}}, "foveate") for value in (False, 0, [], {})},
    **{f"stream {value!r}": ({"stream": value}, "stream") for value in (0, "", [], {})},
    **{f"logprobs {value!r}": ({"logprobs": value}, "logprobs") for value in (0, "", [], {})},
    **{f"stream_options {value!r}": ({"stream_options": value}, "stream_options") for value in (0, "", [], False)},
    **{
        f"tool_calls {value!r}": (
            {"messages": [MESSAGE, {"role": "assistant", "content": "a", "tool_calls": value}]},
            "messages[1]",
        )
        for value in (0, "", {}, False)
    },
}


@pytest.mark.parametrize("name", ODD)
def test_what_is_empty_has_its_type_all_the_same(shared: tuple[str, FakeEngine], name: str) -> None:
    sent, param = ODD[name]
    answer = post(shared[0], {"messages": [MESSAGE], **sent})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text


def test_settings_that_say_nothing_of_the_method_leave_the_servers() -> None:
    reader = RequestReader("pocket", "divprune", 0.25)
    for told in (None, {}, {"frames": 8}, {"method": None, "budget": None}, {"method": "", "frames": 8}):
        found = reader.read(json.dumps({"messages": [MESSAGE], "foveate": told}).encode())
        assert (found.name, found.budget, found.method.budget) == ("divprune", 0.25, 0.25), told
    own = reader.read(json.dumps({"messages": [MESSAGE], "foveate": {"method": "prumerge+", "frames": 8}}).encode())
    assert (own.name, own.budget) == ("prumerge+", None), "a method comes without the budget of another"


@pytest.mark.parametrize("name", CHANGING)
def test_fields_that_would_change_it_are_refused(shared: tuple[str, FakeEngine], name: str) -> None:
    answer = post(shared[0], {"messages": [MESSAGE], name: CHANGING[name]})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, name)


def test_what_openai_client_sends_by_itself_is_taken(shared: tuple[str, FakeEngine]) -> None:
    """An answer goes back as the client dumps it, with all the fields that are null."""
    url, engine = shared
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    options: dict[str, Any] = {"store": False, "service_tier": "auto", "metadata": {"a": "b"}, "modalities": ["text"]}
    first = client.chat.completions.create(model="pocket", messages=[MESSAGE], **options)
    turn = {**first.choices[0].message.model_dump(), "refusal": None, "annotations": [], "audio": None, "tool_calls": None}
    turn |= {"reasoning_content": None}
    client.chat.completions.create(model="pocket", messages=[MESSAGE, turn, MESSAGE], **options)
    assert engine.seen[-1]["messages"][1].keys() == {"role", "content"}


MESSAGES: dict[str, dict[str, Any]] = {
    "reasoning": {"role": "assistant", "content": "a", "reasoning_content": "b"},
    "refusal": {"role": "assistant", "content": "a", "refusal": "b"},
    "prefix": {"role": "assistant", "content": "a", "prefix": True},
    "any": {"role": "user", "content": "a", "any": {"b": "c"}},
    "calls of the user": {"role": "user", "content": "a", "tool_calls": [CALL]},
    "field of a part": user({"type": "text", "text": "a", "extra": 1}),
    "field of a picture": user({"type": "image_url", "image_url": {"url": GREY, "extra": 1}}),
    "detail": user({"type": "image_url", "image_url": {"url": GREY, "detail": "low"}}),
    "field of a call": {"role": "assistant", "tool_calls": [{**CALL, "extra": 1}]},
    "call of nothing": {"role": "assistant", "tool_calls": [{"id": "1"}]},
    "call of another kind": {"role": "assistant", "tool_calls": [{**CALL, "type": "custom"}]},
    "arguments of no JSON": called("{"),
    "deep arguments": called('{"a":' * 900 + "1" + "}" * 900),
    "name of no text": {"role": "user", "content": "a", "name": {"a": 1}},
}


@pytest.mark.parametrize("name", MESSAGES)
def test_unknown_fields_of_messages_are_refused(shared: tuple[str, FakeEngine], name: str) -> None:
    url, engine = shared
    before = len(engine.seen)
    answer = post(url, {"messages": [MESSAGE, MESSAGES[name]]})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"].startswith("messages[1]")
    assert len(engine.seen) == before


def test_empty_contents_are_taken(shared: tuple[str, FakeEngine]) -> None:
    for role in ("user", "assistant", "tool"):
        assert post(shared[0], {"messages": [MESSAGE, {"role": role, "content": []}]}).status_code == 200


def test_details_that_change_nothing_are_taken(shared: tuple[str, FakeEngine]) -> None:
    for detail in (None, "auto", "high"):
        part = {"type": "image_url", "image_url": {"url": data_url(picture(1)), "detail": detail}, "cache_control": {"type": "a"}}
        assert post(shared[0], {"messages": [user(part, said(ASKED))]}).status_code == 200


WORD = "<prompt_embeds>"
HIDDEN: dict[str, dict[str, Any]] = {
    "two parts": {"messages": [user(said("<prompt_"), said("embeds>"))]},
    "two parts with spaces": {"messages": [user(said("<prompt_ "), said("\nembeds>"))]},
    "around a picture": {"messages": [user(said("<ima"), shown(GREY), said("ge>"))]},
    "two messages": {"messages": [{"role": "system", "content": "<ima"}, {"role": "user", "content": "ge>"}]},
    "name": {"messages": [{"role": "user", "content": "a", "name": WORD}]},
    "id of a call": {"messages": [{"role": "tool", "content": "a", "tool_call_id": WORD}]},
    "function": {"messages": [called("{}", WORD)]},
    "arguments": {"messages": [called(json.dumps({"a": [WORD]}))]},
    "arguments with escapes": {"messages": [called('{"a": "<prompt_\\u0065mbeds>"}')]},
    "tools": {"messages": [MESSAGE], "tools": [{**TOOL, "function": {"name": "a", "description": f"see {WORD}"}}]},
    "fields of tools": {"messages": [MESSAGE], "tools": [{**TOOL, "function": {"name": "a", "parameters": {"<image>": {}}}}]},
    "capitals": {"messages": [user(said("a <IMAGE> of")), user(said("<Prompt_Embeds>"))]},
    "capitals beside a picture": {"messages": [user(shown(GREY), said("a <PROMPT_EMBEDS>"))]},
    "format": {"messages": [MESSAGE], "response_format": {"type": "json_schema", "json_schema": {"name": WORD}}},
}


@pytest.mark.parametrize("name", HIDDEN)
def test_words_for_pictures_are_found_wherever_a_template_may_write_them(shared: tuple[str, FakeEngine], name: str) -> None:
    url, engine = shared
    before = len(engine.seen)
    answer = post(url, HIDDEN[name])
    assert (answer.status_code, "stands for pictures" in answer.text) == (400, True), answer.text
    assert len(engine.seen) == before


def test_what_a_template_makes_of_texts_is_counted(encoder: PictureEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it changes them before it joins them."""
    processor = encoder.loaded.processor
    own = processor.chat_template.replace("part['text']", "part['text'].replace('-', '')")
    assert own != processor.chat_template
    monkeypatch.setattr(processor, "chat_template", own)
    with started(FakeEngine(), encoder) as url:
        assert post(url, {"messages": [user(said("a-b"))]}).status_code == 200
        assert post(url, body(1, 2, text="a-b")).status_code == 200
        answer = post(url, {"messages": [user(said("<im-age>"))]})
        assert (answer.status_code, "stands for pictures" in answer.text) == (400, True)


def test_half_characters_in_arguments_are_refused(shared: tuple[str, FakeEngine]) -> None:
    answer = post(shared[0], {"messages": [called('{"a": "\\ud800"}')]})
    assert (answer.status_code, "half a character" in answer.text) == (400, True), answer.text


def test_texts_are_limited(shared: tuple[str, FakeEngine]) -> None:
    """Also of tools, and in few messages: they are read where pictures of others wait."""
    text = "a " * (Limits().characters // 2)
    assert post(shared[0], {"messages": [user(said(text))]}).status_code == 200
    tool = {**TOOL, "function": {"name": "a", "description": text}}
    for more in ({"messages": [user(said(text), said("b"))]}, {"messages": [MESSAGE], "tools": [tool]}):
        assert post(shared[0], more).status_code == 413


def test_stop_may_name_what_no_prompt_holds(shared: tuple[str, FakeEngine]) -> None:
    assert post(shared[0], {"messages": [MESSAGE], "stop": ["<image>"]}).status_code == 200


def test_a_url_in_capitals(shared: tuple[str, FakeEngine]) -> None:
    url = data_url(picture(1))
    for written in (url.replace("data:", "DATA:"), url.replace("image/png;base64", "Image/PNG;BASE64")):
        assert post(shared[0], {"messages": [user(shown(written), said(ASKED))]}).status_code == 200


LARGE = "x" * 2_000_000
ECHOED: dict[str, dict[str, Any]] = {
    "argument": {"messages": [MESSAGE], LARGE: 1},
    "model": {"messages": [MESSAGE], "model": LARGE},
    "method": {"messages": [MESSAGE], "foveate": {"method": LARGE}},
    "preset": {"messages": [MESSAGE], "foveate": {"method": f"prumerge:{'x' * 60}"}},
    "budget": {"messages": [MESSAGE], "foveate": {"budget": int("9" * 4000)}},
    "role": {"messages": [{"role": LARGE, "content": "a"}]},
    "field": {"messages": [{**MESSAGE, LARGE: "a"}]},
    "kind": {"messages": [user({"type": LARGE})]},
    "detail": {"messages": [user({"type": "image_url", "image_url": {"url": GREY, "detail": LARGE}})]},
    "url": {"messages": [user(shown(f"http://{LARGE}/a.png"))]},
    "scheme": {"messages": [user(shown(LARGE))]},
    "odd url": {"messages": [user(shown(f"http://[{LARGE}"))]},
    "data": {"messages": [user(shown(f"data:{LARGE},"))]},
    "options of a stream": {"messages": [MESSAGE], "stream_options": {LARGE: 1}},
    "tools": {"messages": [MESSAGE], "tools": [{LARGE: WORD}]},
}


@pytest.mark.parametrize("name", ECHOED)
def test_messages_repeat_little_of_what_was_sent(shared: tuple[str, FakeEngine], name: str) -> None:
    answer = post(shared[0], ECHOED[name])
    assert 400 <= answer.status_code < 500, answer.text[:500]
    assert len(answer.text) < 1500
    assert max(map(answer.text.count, ("x" * 90, "9" * 90))) == 0


def nested(depth: int) -> Any:
    found: Any = 1
    for _ in range(depth):
        found = [found]
    return found


@pytest.mark.parametrize("depth", [65, 500, 970, 5000])
@pytest.mark.parametrize("name", ["metadata", "tools", "messages", "something_new", "response_format", "logit_bias"])
def test_deep_bodies_are_refused(shared: tuple[str, FakeEngine], name: str, depth: int) -> None:
    content = json.dumps({"messages": [MESSAGE]})[:-1] + f', "{name}": {"[" * depth}{"]" * depth}}}'
    answer = httpx.post(f"{shared[0]}/v1/chat/completions", content=content, timeout=60)
    assert answer.status_code == 400, answer.text
    assert "deep" in answer.text or "no JSON" in answer.text


def test_many_messages_are_refused_and_disturb_nobody(shared: tuple[str, FakeEngine]) -> None:
    url, _ = shared
    many = json.dumps({"messages": [{"role": "user", "content": "a"}] * 300_000}).encode()
    parts = json.dumps({"messages": [user(*[said("a")] * 5000)]}).encode()
    waits: list[float] = []
    done = threading.Event()

    def look() -> None:
        with httpx.Client(timeout=30) as client:
            while not done.is_set():
                begin = time.perf_counter()
                client.get(f"{url}/v1/models")
                waits.append(time.perf_counter() - begin)
                time.sleep(0.01)

    looking = threading.Thread(target=look)
    looking.start()
    codes = [httpx.post(f"{url}/v1/chat/completions", content=each, timeout=60).status_code for each in (many, parts, many)]
    done.set()
    looking.join()
    assert codes == [413] * 3
    assert sorted(waits)[-1] < 0.5  # other work on this machine included


def test_many_messages_are_refused_before_they_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foveate.serving.gateway.requests.json.loads", lambda *_, **__: pytest.fail("it was read"))
    with pytest.raises(RequestError, match="commas and opening brackets"):
        RequestReader("pocket", "prumerge+").read(b'{"messages": [' + b'{"role":"user","content":"a"},' * 300_000 + b"{}]}")


def test_settings_are_forgotten(encoder: PictureEncoder) -> None:
    gateway = create_app(GatewaySettings("pocket", "http://127.0.0.1:1"), [encoder]).state.gateway
    for budget in range(1, CHECKED + 50):
        gateway.check("prumerge+", budget / 1000, "")
    assert gateway.check.cache_info().currsize == CHECKED
    assert not [name for name, value in vars(gateway).items() if isinstance(value, dict) and len(value) > CHECKED]


def test_a_name_that_is_there_twice_is_refused() -> None:
    """Of two budgets one would win without a word."""
    reader = RequestReader("pocket", "prumerge+")
    asked = b'{"messages": [{"role": "user", "content": "a"}], "foveate": {"budget": 9, "budget": 144}}'
    with pytest.raises(RequestError, match="the name 'budget' is there twice"):
        reader.read(asked)
