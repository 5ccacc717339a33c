"""The gateway against a stand-in for vLLM, over real sockets: what arrives there, and what clients get."""

from __future__ import annotations

import concurrent.futures
from typing import Any

import openai
import pytest

from foveate.serving.encoding import PictureEncoder, method_of
from foveate.serving.gateway.memory import Memory, RememberedPicture
from tests.serving_fakes import FakeEngine, data_url, events, metric, shown

from .asked import ASKED, body, expected, picture, post, said, started


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


def test_tools_and_formats_go_on(gateway: str, engine: FakeEngine) -> None:
    """With the turns in which a tool was called and answered."""
    call = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    options = {
        "tools": [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}],
        "tool_choice": "auto",
        "response_format": {"type": "json_object"},
    }
    asked = [shown(data_url(picture(1))), said(ASKED)]
    messages = [
        {"role": "user", "content": asked},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "a red star"},
    ]
    answer = post(gateway, {"messages": messages, **options})
    assert answer.status_code == 200, answer.text
    (seen,) = engine.seen
    assert {name: seen[name] for name in options} == options
    assert [part["type"] for part in seen["messages"][0]["content"]] == ["prompt_embeds", "text"]
    assert seen["messages"][1]["tool_calls"] == [call]
    assert seen["messages"][2]["tool_call_id"] == "c1"
    assert metric(gateway, "foveate_prompt_mismatches_total") == 0  # templates write tools into prompts: nothing is expected


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
    made = [RememberedPicture({"data": "x" * 40}, 576, number) for number in range(3)]
    memory.add(keys[:2], made[:2])
    assert memory.get(keys[:1]) == made[:1]  # asked for last
    memory.add(keys[2:], made[2:])
    assert memory.get(keys[1:2]) is None
    assert memory.get([keys[2], keys[0]]) == [made[2], made[0]]
    memory.add(keys[:1], made[:1])
    assert memory.held == 80
    memory.add(keys[1:2], [RememberedPicture({"data": "x" * 200}, 576, 1)])  # larger than all of it
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
