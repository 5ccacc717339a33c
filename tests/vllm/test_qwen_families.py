"""The gateway before a real vLLM with small random models: Qwen2-VL with pictures and clips, Qwen3-VL with pictures."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from foveate.chat import as_sampled
from foveate.pocket.native.vocabulary import CHAT_TEMPLATE
from foveate.serving.encoding import method_of
from foveate.video import video_of
from tests.serving_fakes import data_url, shown

from .stack import Stack, running
from .test_plugin_qwen import with_processor

NEW, TOP, RATE = 4, 10, 4
SIZES = ((48, 32), (32, 64), (64, 64))
FAMILIES = ("qwen2_vl", "qwen3_vl")


@dataclass(frozen=True)
class Asked:
    """A prompt, and by what its pictures are reduced."""

    pictures: tuple[int, ...]
    method: str
    budget: float | None = None
    frames: int = 0  # of a clip after the pictures
    text: str = "41 57 23"


PICTURES = (
    Asked((0,), "divprune", 0.5),
    Asked((1, 2), "prumerge"),
    Asked((2,), "spatial", 1),
    Asked((2, 0, 1), "full", text="90"),
)
CLIPS = (Asked((), "evs", 0.5, frames=6), Asked((1,), "divprune", 0.25, frames=4))


def picture(number: int, size: tuple[int, int]) -> Image.Image:
    numbers = np.random.default_rng(number)
    return Image.fromarray(numbers.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def clip(frames: int) -> list[Image.Image]:
    return [picture(100 + number, (32, 48)) for number in range(frames)]


class Served:
    """A model in transformers and behind the gateway."""

    def __init__(self, family: str, folder: Path) -> None:
        self.family, self.folder = family, with_processor(family, folder / family)
        (self.folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
        self.model: Any = AutoModelForImageTextToText.from_pretrained(self.folder, dtype="float32").eval()
        self.processor: Any = AutoProcessor.from_pretrained(self.folder)
        self.asked = PICTURES + (CLIPS if family == "qwen2_vl" else ())

    def true(self, asked: Asked) -> tuple[list[int], list[list[float]], int]:
        """Tokens, log-probabilities of all tokens at each, and how many visual tokens stay."""
        content: list[dict[str, Any]] = [{"type": "image", "image": picture(n, SIZES[n])} for n in asked.pictures]
        options: dict[str, Any] = {}
        if asked.frames:
            content.append({"type": "video", "video": clip(asked.frames)})
            options = {"videos_kwargs": as_sampled(video_of(clip(asked.frames), RATE, "clip"))}
        messages = [{"role": "user", "content": [*content, {"type": "text", "text": asked.text}]}]
        inputs = self.processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs=options
        )
        with method_of(asked.method, asked.budget)(self.model) as session:
            out = self.model.generate(
                **inputs, max_new_tokens=NEW, do_sample=False, output_logits=True, return_dict_in_generate=True
            )
            kept = sum(session.report.after)
        steps = torch.stack(out.logits, 1)[0].double().log_softmax(-1)
        return out.sequences[0, -NEW:].tolist(), steps.tolist(), kept

    def found(self, stack: Stack, asked: Asked) -> tuple[list[str], list[dict[str, float]], int]:
        content: list[dict[str, Any]] = [shown(data_url(picture(n, SIZES[n]))) for n in asked.pictures]
        if asked.frames:
            content.append({"type": "video", "video": [data_url(each) for each in clip(asked.frames)], "fps": RATE})
        sent = {
            "messages": [{"role": "user", "content": [*content, {"type": "text", "text": asked.text}]}],
            "foveate": {"method": asked.method, "budget": asked.budget},
            **{
                "temperature": 0,
                "max_tokens": NEW,
                "logprobs": True,
                "top_logprobs": TOP,
                "skip_special_tokens": False,
                "ignore_eos": True,
            },
        }
        answer = httpx.post(f"{stack.url}/v1/chat/completions", json=sent, timeout=120)
        assert answer.status_code == 200, answer.text
        told = answer.json()
        steps = told["choices"][0]["logprobs"]["content"]
        tops = [{each["token"]: each["logprob"] for each in step["top_logprobs"]} for step in steps]
        return [step["token"] for step in steps], tops, told["usage"]["foveate"]["visual_tokens"]


@pytest.fixture(scope="module", params=FAMILIES)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Served, Stack]]:
    folder = tmp_path_factory.mktemp("families")
    made = Served(request.param, folder)
    with running(Stack(folder, "--model", str(made.folder), "--method", "divprune", "--budget", "0.25")) as stack:
        yield made, stack


def test_a_batch_gets_what_transformers_writes(served: tuple[Served, Stack]) -> None:
    """Mixed counts at once, and once more from the caches."""
    made, stack = served
    words = {made.processor.tokenizer.decode([number]): number for number in range(len(made.processor.tokenizer))}
    true = [made.true(asked) for asked in made.asked]
    assert len({kept for _, _, kept in true}) >= 4
    for _ in range(2):
        with ThreadPoolExecutor(len(true)) as pool:
            found = [*pool.map(lambda asked: made.found(stack, asked), made.asked)]
        for (tokens, steps, kept), (said, tops, told) in zip(true, found, strict=True):
            assert told == kept
            assert [words[each] for each in said] == tokens
            for step, top in zip(steps, tops, strict=True):
                assert len(top) >= TOP
                assert max(abs(step[words[word]] - value) for word, value in top.items()) <= 1e-4
    assert stack.metrics()["foveate_prompt_mismatches_total"] == 0


def test_clips_are_refused_where_times_stand_between_frames(served: tuple[Served, Stack]) -> None:
    made, stack = served
    video = {"type": "video", "video": [data_url(each) for each in clip(4)], "fps": RATE}
    sent = {"messages": [{"role": "user", "content": [video, {"type": "text", "text": "41"}]}], "max_tokens": NEW}
    answer = httpx.post(f"{stack.url}/v1/chat/completions", json=sent, timeout=120)
    assert answer.status_code == (200 if made.family == "qwen2_vl" else 400), answer.text
