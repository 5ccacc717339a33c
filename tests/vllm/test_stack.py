"""OpenAI's client, ``foveate serve --launch`` and vLLM together give the answers of transformers with the same method."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

import foveate
from foveate.evaluation.pocket import picture, questions
from foveate.pocket import load_pocket
from foveate.serving.encoding import method_of
from tests.serving_fakes import data_url, shown

from .stack import Stack, running

WORDS = 24  # enough for an answer of the pocket model with its end
NUMBER = 6  # of questions


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with running(Stack(tmp_path_factory.mktemp("stack"))) as found:
        yield found


@pytest.fixture(scope="module")
def client(stack: Stack) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{stack.url}/v1", api_key="none", max_retries=0)


@functools.cache
def pocket() -> Any:
    return load_pocket()


@functools.cache
def documents() -> list[dict[str, Any]]:
    return questions("pocket_vqav2", 2 * NUMBER, 77)


def by_transformers(turns: list[tuple[int, str]], said: list[str], method: str, budget: float | None) -> tuple[str, int, int]:
    """The answer of the pocket model to the last of some turns, by generate(); tokens of its prompt, and visual ones of these."""
    model, processor = pocket()
    messages: list[dict[str, Any]] = []
    for number, (shown_picture, question) in enumerate(turns):
        shown = [{"type": "image", "image": picture(documents()[shown_picture])[0]}] if shown_picture >= 0 else []
        messages.append({"role": "user", "content": [*shown, {"type": "text", "text": question}]})
        if number < len(turns) - 1:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": said[number]}]})
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    with foveate.attach(model, method_of(method, budget)) as session:
        out = model.generate(**inputs, do_sample=False, max_new_tokens=WORDS)
        kept = sum(session.report.after)
    length = inputs["input_ids"].shape[1]
    prompt = length - int((inputs["input_ids"] == model.config.image_token_id).sum()) + kept
    return processor.decode(out[0, length:], skip_special_tokens=True).strip(), prompt, kept


def asked(turns: list[tuple[int, str]], said: list[str]) -> list[Any]:
    """The same for OpenAI's client."""
    messages: list[dict[str, Any]] = []
    for number, (shown_picture, question) in enumerate(turns):
        parts = [shown(data_url(picture(documents()[shown_picture])[0]))] if shown_picture >= 0 else []
        messages.append({"role": "user", "content": [*parts, {"type": "text", "text": question}]})
        if number < len(turns) - 1:
            messages.append({"role": "assistant", "content": said[number]})
    return messages


def streamed(client: openai.OpenAI, messages: list[Any], **options: Any) -> tuple[str, Any, int]:
    """An answer, what is told of its tokens, and the number of pieces that it came in."""
    pieces = [
        *client.chat.completions.create(
            model="pocket",
            messages=messages,
            stream=True,
            stream_options={"include_usage": True},
            temperature=0,
            max_tokens=WORDS,
            **options,
        )
    ]
    said = [piece.choices[0].delta.content for piece in pieces if piece.choices and piece.choices[0].delta.content]
    return "".join(said).strip(), pieces[-1].usage, len(said)


@pytest.mark.parametrize(
    ("method", "budget"), [(None, None), ("prumerge+", 64), ("prumerge", None), ("spatial", 16), ("full", None)]
)
def test_openai_client_streams_the_answers_of_transformers(client: openai.OpenAI, method: str | None, budget: float | None) -> None:
    """Without a method, that of the gateway: PruMerge+ with its own count for each picture."""
    options = {} if method is None else {"extra_body": {"foveate": {"method": method, "budget": budget}}}
    found, counts = [], set()
    for number in range(NUMBER):
        turns = [(number, documents()[number]["question"])]
        answer, prompt, kept = by_transformers(turns, [], method or "prumerge+", budget)
        told, usage, pieces = streamed(client, asked(turns, []), **options)
        assert (told, usage.prompt_tokens, usage.foveate["visual_tokens"]) == (answer, prompt, kept)
        assert usage.foveate["method"] == (method or "prumerge+")
        assert usage.foveate["visual_tokens_before"] == 576
        assert pieces == usage.completion_tokens - 1  # word by word; the end of an answer is no word
        found.append(told)
        counts.add(kept)
    assert len({*found}) > 2
    assert (len(counts) > 1) == (budget is None and method != "full")  # of their own


def test_conversations(client: openai.OpenAI, stack: Stack) -> None:
    """A second turn about the same picture, which is not encoded again, and a third with another one."""
    turns = [(0, documents()[0]["question"]), (-1, "how many objects are there ?"), (1, documents()[1]["question"])]
    said: list[str] = []
    remembered = []
    for number in range(len(turns)):
        answer, prompt, kept = by_transformers(turns[: number + 1], said, "prumerge+", None)
        told, usage, _ = streamed(client, asked(turns[: number + 1], said))
        assert (told, usage.prompt_tokens, usage.foveate["visual_tokens"]) == (answer, prompt, kept)
        said.append(told)
        remembered.append(stack.metrics()["foveate_pictures_remembered_total"])
    assert remembered[1] == remembered[0] + 1


def test_the_launched_engine_is_for_the_gateway_only(stack: Stack) -> None:
    command = stack.engine().cmdline()
    host, port = (command[command.index(name) + 1] for name in ("--host", "--port"))
    assert host == "127.0.0.1"
    assert httpx.get(f"http://{host}:{port}/v1/models", timeout=10).status_code == 401
