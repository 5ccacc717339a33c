"""Requests, and what the whole model would read of them."""

from __future__ import annotations

import functools
from typing import Any

import httpx
import torch
from PIL import Image

from foveate import encode
from foveate.pocket import load_pocket
from foveate.serving.encoding import PictureEncoder, method_of
from foveate.serving.gateway.app import create_app
from foveate.serving.gateway.gateway import GatewaySettings
from tests.serving_fakes import FakeEngine, checksum, data_url, served, shown

ASKED = "what color is the star ?"
MESSAGE = {"role": "user", "content": "hello"}
GREY = data_url(Image.new("L", (64, 64)))


def picture(seed: int, size: tuple[int, int] = (192, 192)) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, 256, (6, 6, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(coarse.numpy()).resize(size, Image.Resampling.BICUBIC)


def said(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def body(*pictures: int, text: str = ASKED, **options: Any) -> dict[str, Any]:
    parts = [*(shown(data_url(picture(seed))) for seed in pictures), {"type": "text", "text": text}]
    return {"model": "pocket", "messages": [{"role": "user", "content": parts}], **options}


class started:
    """A gateway in front of an engine, both served."""

    def __init__(self, engine: FakeEngine, encoder: PictureEncoder, *encoders: PictureEncoder, **settings: Any) -> None:
        self.engine, self.encoders, self.settings = engine, [encoder, *encoders], settings

    def __enter__(self) -> str:
        self.behind = served(self.engine.app)
        url = self.behind.__enter__()
        self.app = create_app(GatewaySettings("pocket", url, **self.settings), self.encoders)
        self.front = served(self.app)
        return self.front.__enter__()

    def __exit__(self, *_: object) -> None:
        self.front.__exit__(None, None, None)
        self.behind.__exit__(None, None, None)


def post(url: str, sent: Any, **options: Any) -> httpx.Response:
    return httpx.post(f"{url}/v1/chat/completions", json=sent, timeout=60, **options)


@functools.cache
def pocket(name: str = "pocket") -> Any:
    return load_pocket(name)


def expected(method: str, budget: float | None, *pictures: int, text: str = ASKED) -> tuple[list[int], list[str]]:
    """Counts and sums of what foveate.encode gives for the whole model on one prompt."""
    model, processor = pocket()
    content = [*({"type": "image", "image": picture(seed)} for seed in pictures), {"type": "text", "text": text}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    found = encode(model, method_of(method, budget), **inputs)
    return [len(each) for each in found.embeds], [checksum(each) for each in found.embeds]
