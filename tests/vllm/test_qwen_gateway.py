"""The gateway before vLLM with a model whose visual tokens have (t, h, w) positions: it writes what transformers writes."""

from __future__ import annotations

import base64
import functools
import io
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from random import Random
from typing import Any

import httpx
import openai
import pytest
import torch
from PIL import Image

from foveate.chat import as_sampled
from foveate.films import Bounds
from foveate.pocket import load_pocket
from foveate.pocket.native.clips import RATE, draw_clip
from foveate.pocket.native.pictures import draw_picture
from foveate.pocket.native.questions import exam
from foveate.serving.encoding import method_of
from foveate.video import video_in
from tests.serving_fakes import data_url, shown

from .stack import Stack, running

NEW, TOP = 6, 10  # tokens of an answer and what comes after its end; log-probabilities at each
BLOCK = 32  # tokens of a block of the prefix cache
CLIPS = ((8, 144, 96), (6, 96, 160), (16, 80, 80))  # the last one is longer in time than in space
SIZES = ((320, 240), (160, 352), (192, 192), (384, 384), (128, 208), (272, 272))
ENGINE = {
    "whole prompts": f"--block-size {BLOCK} --enable-prompt-tokens-details",
    "prefill in pieces": f"--block-size {BLOCK} --max-num-batched-tokens 64 --max-num-seqs 4",
}

av = pytest.importorskip("av")


@dataclass(frozen=True)
class Asked:
    """A question about pictures, and by what they are reduced."""

    pictures: tuple[int, ...]
    method: str
    budget: float | None = None
    clip: int | None = None  # after the pictures
    frames: int = 16


# adaptive counts, from one token a picture to all of them; a method that reads the question; several pictures
ASKED = (
    Asked((0,), "prumerge"),
    Asked((1,), "divprune", 0.1),
    Asked((2, 3), "prumerge+"),
    Asked((3,), "full"),
    Asked((4,), "spatial", 1),
    Asked((5, 0, 2), "fovea", 0.2),
    Asked((1,), "cdpruner", 40),
    Asked((0, 4), "resize", 0.4),
    Asked((), "evs", 0.3, clip=0),
    Asked((), "prumerge", clip=1),
    Asked((4,), "vidcom2", 0.25, clip=0, frames=8),
    Asked((), "full", clip=2, frames=32),
)


@functools.cache
def drawn(number: int) -> tuple[Image.Image, str]:
    """A picture, and a question about it."""
    random = Random(f"gateway/{number}")
    made = draw_picture(random, SIZES[number], split="test")
    return Image.fromarray(made.image), exam(made, random)[0].text


@functools.cache
def pocket() -> tuple[Any, Any]:
    return load_pocket("qwen")


@functools.cache
def filmed(number: int) -> tuple[bytes, str]:
    """A film, and a question about it."""
    random = Random(f"gateway/clip/{number}")
    made, written = draw_clip(random, CLIPS[number], split="test"), io.BytesIO()
    with av.open(written, "w", format="mp4") as file:
        stream = file.add_stream("libx264", rate=int(RATE))
        stream.height, stream.width = made.frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for each in made.frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(each, format="rgb24")))
        file.mux(stream.encode())
    return written.getvalue(), exam(made, random)[0].text


def question(asked: Asked) -> str:
    return drawn(asked.pictures[-1])[1] if asked.clip is None else filmed(asked.clip)[1]


@dataclass(frozen=True)
class Answer:
    """Tokens, log-probabilities of tokens at each, and the numbers of tokens in the prompt."""

    tokens: list[int]
    logprobs: list[dict[int, float]]
    prompt: int
    visual: int


@functools.cache
def by_transformers(asked: Asked) -> Answer:
    """By generate(), with the method attached."""
    model, processor = pocket()
    content: list[dict[str, Any]] = [{"type": "image", "image": drawn(number)[0]} for number in asked.pictures]
    options: dict[str, Any] = {}
    if asked.clip is not None:
        video = video_in(filmed(asked.clip)[0], "clip", asked.frames, Bounds())
        content.append({"type": "video", "video": [*video.frames]})
        options = {"videos_kwargs": as_sampled(video)}
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": question(asked)}]}]
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs=options
    )
    told: dict[str, Any] = {"output_logits": True, "return_dict_in_generate": True, "eos_token_id": None}
    with method_of(asked.method, asked.budget)(model) as session:
        out = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, **told)
        before, after = sum(session.report.before), sum(session.report.after)
    length = inputs["input_ids"].shape[1]
    steps = torch.stack(out.logits, 1)[0].double().log_softmax(-1)
    return Answer(out.sequences[0, length:].tolist(), [dict(enumerate(s)) for s in steps.tolist()], length - before + after, after)


@functools.cache
def words() -> dict[str, int]:
    """Tokens by how they are written, each of which is another one."""
    tokenizer = pocket()[1].tokenizer
    found = {tokenizer.decode([number]): number for number in range(len(tokenizer))}
    assert len(found) == len(tokenizer)
    return found


def clip_part(data: bytes) -> dict[str, Any]:
    url = f"data:video/mp4;base64,{base64.b64encode(data).decode()}"
    return {"type": "video_url", "video_url": {"url": url}}


def body(asked: Asked, **options: Any) -> dict[str, Any]:
    pictures = [shown(data_url(drawn(number)[0])) for number in asked.pictures]
    clips = [] if asked.clip is None else [clip_part(filmed(asked.clip)[0])]
    content = [*pictures, *clips, {"type": "text", "text": question(asked)}]
    method = {"method": asked.method, "budget": asked.budget, "frames": asked.frames}
    return {"messages": [{"role": "user", "content": content}], "foveate": method, "temperature": 0, "max_tokens": NEW, **options}


def post(stack: Stack, sent: dict[str, Any]) -> dict[str, Any]:
    told = {"ignore_eos": True, "logprobs": True, "top_logprobs": TOP, "skip_special_tokens": False}
    answer = httpx.post(f"{stack.url}/v1/chat/completions", json={**sent, **told}, timeout=120)
    assert answer.status_code == 200, answer.text
    return answer.json()


def read(told: dict[str, Any]) -> Answer:
    steps = told["choices"][0]["logprobs"]["content"]
    tops = [{words()[each["token"]]: each["logprob"] for each in step["top_logprobs"]} for step in steps]
    usage = told["usage"]
    return Answer([words()[step["token"]] for step in steps], tops, usage["prompt_tokens"], usage["foveate"]["visual_tokens"])


def check(found: Answer, true: Answer) -> float:
    """The largest difference of log-probabilities."""
    assert (found.prompt, found.visual) == (true.prompt, true.visual)
    assert found.tokens == true.tokens
    assert len(found.logprobs) == NEW
    worst = 0.0
    for step, own in zip(found.logprobs, true.logprobs, strict=True):
        assert len(step) >= TOP
        worst = max(worst, *(abs(value - own[token]) for token, value in step.items()))
    return worst


@pytest.fixture(scope="module", params=ENGINE)
def stack(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    options = ("--model", "pocket-qwen", "--method", "divprune", "--budget", "0.25")
    with running(Stack(tmp_path_factory.mktemp("qwen"), *options, engine=ENGINE[request.param])) as found:
        yield found


def batch(stack: Stack, asked: Sequence[Asked]) -> list[Answer]:
    with ThreadPoolExecutor(len(asked)) as pool:
        return [read(told) for told in pool.map(lambda each: post(stack, body(each)), asked)]


def test_a_batch_gets_the_tokens_and_log_probabilities_of_transformers(stack: Stack) -> None:
    """Counts from 1 to 576 in one batch, and all of it once more from the caches of gateway and vLLM."""
    true = [by_transformers(each) for each in ASKED]
    assert len({each.visual for each in true}) >= 6
    assert len({tuple(each.tokens) for each in true}) >= 4
    for _ in range(2):
        worst = max(check(*pair) for pair in zip(batch(stack, ASKED), true, strict=True))
        assert worst <= 1e-4
    assert stack.metrics()["foveate_prompt_mismatches_total"] == 0


def test_prefixes_are_shared_by_what_is_in_them(stack: Stack) -> None:
    """The same picture with the same budget is read from the cache of vLLM; with another budget, or another picture, never."""
    asked = [Asked((3,), "divprune", budget) for budget in (150, 150, 149, 151, 150)]
    asked += [Asked((5,), "divprune", 150), Asked((3,), "random", 150)]
    told = [post(stack, body(each)) for each in asked]
    for each, found in zip(asked, told, strict=True):
        if each.method != "random":
            assert check(read(found), by_transformers(each)) <= 1e-4
    if "prompt_tokens_details" not in told[1]["usage"] or told[1]["usage"]["prompt_tokens_details"] is None:
        return  # the other engine tells
    cached = [(each["usage"]["prompt_tokens_details"] or {}).get("cached_tokens") or 0 for each in told]
    most = (told[0]["usage"]["prompt_tokens"] - 1) // BLOCK * BLOCK
    assert cached == [0, most, 0, 0, most, 0, 0]


def test_the_encoder_is_not_in_vllm(stack: Stack) -> None:
    log = next(line for line in stack.log.read_text().splitlines() if "its log:" in line).rpartition(" ")[2]
    with open(log) as written:
        assert "modalities handled as embedding-only: ('image', 'video')" in written.read()


def test_openai_client_streams_a_conversation(stack: Stack) -> None:
    """A turn with a picture and one with a clip, by the method of the gateway."""
    client = openai.OpenAI(base_url=f"{stack.url}/v1", api_key="none", max_retries=0)
    model, processor = pocket()
    sent: list[Any] = []
    own: list[Any] = []
    video = video_in(filmed(0)[0], "clip", 16, Bounds())
    image, data = drawn(0)[0], filmed(0)[0]
    turns: list[tuple[Any, Any, str]] = [
        (shown(data_url(image)), {"type": "image", "image": image}, drawn(0)[1]),
        (clip_part(data), {"type": "video", "video": [*video.frames]}, filmed(0)[1]),
    ]
    for part, own_part, text in turns:
        sent.append({"role": "user", "content": [part, {"type": "text", "text": text}]})
        own.append({"role": "user", "content": [own_part, {"type": "text", "text": text}]})
        options = {"videos_kwargs": as_sampled(video)} if own_part["type"] == "video" else {}
        inputs = processor.apply_chat_template(
            own, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs=options
        )
        with method_of("divprune", 0.25)(model) as session:
            out = model.generate(**inputs, do_sample=False, max_new_tokens=24)
            kept = sum(session.report.after)
        true = processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        pieces = [
            *client.chat.completions.create(
                model="pocket-qwen",
                messages=sent,
                stream=True,
                stream_options={"include_usage": True},
                temperature=0,
                max_tokens=24,
            )
        ]
        said = [piece.choices[0].delta.content for piece in pieces if piece.choices and piece.choices[0].delta.content]
        assert "".join(said).strip() == true
        assert pieces[-1].usage is not None
        assert pieces[-1].usage.foveate["visual_tokens"] == kept  # type: ignore[attr-defined]
        for messages in (sent, own):
            messages.append({"role": "assistant", "content": true})


def test_bad_requests_disturb_no_other(stack: Stack) -> None:
    good = ASKED[1]
    bad = body(ASKED[3])
    bad["messages"][0]["content"] *= 9  # longer than the model reads, or more pictures than are taken
    nothing = body(good, foveate={"method": "tome", "budget": 0.25})

    def ask(number: int) -> tuple[int, dict[str, Any]]:
        sent = (body(good, ignore_eos=True, logprobs=True, top_logprobs=TOP, skip_special_tokens=False), bad, nothing)[number % 3]
        answer = httpx.post(f"{stack.url}/v1/chat/completions", json=sent, timeout=120)
        return answer.status_code, answer.json()

    with ThreadPoolExecutor(6) as pool:
        found = [*pool.map(ask, range(9))]
    assert [status for status, _ in found] == [200, 400, 400] * 3
    assert max(check(read(told), by_transformers(good)) for _, told in found[::3]) <= 1e-4
