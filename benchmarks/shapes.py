"""Random inputs of the shapes that methods see, and what is timed of each method."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from transformers import CLIPVisionConfig
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

import foveate
from foveate.cuts import Cut, DecoderTap, PromptTokens
from foveate.engine.model.anatomy import Block
from foveate.engine.vision.beside import Beside
from foveate.methods.base import DecoderReducer, EncoderReducer, ProjectorReducer
from foveate.methods.pixels import PixelReducer
from foveate.methods.trained import Host, ModelShape, Trained
from foveate.tokens import BlockTokens, EncoderTap, Question, VisualTokens

TEXT = 64  # tokens of text behind the picture
LAYERS = 32  # of the decoder


class Shapes:
    """Random inputs of the shapes that methods see."""

    def __init__(self, batch: int, number: int, width: int, decoder_width: int) -> None:
        self.batch, self.number, self.width, self.decoder_width = batch, number, width, decoder_width
        self.generator = torch.Generator().manual_seed(0)
        rows = max(r for r in range(1, int(number**0.5) + 1) if number % r == 0)
        self.grid = (rows, number // rows)

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator).to(torch.bfloat16)

    def host(self) -> Host:
        """A model of these sizes, for methods with weights: random ones."""
        shape = ModelShape("llava", self.width, self.decoder_width, self.width, max(1, self.width // 64), 24, 22, LAYERS, self.grid)
        return Host(shape, torch.device("cpu"), dict)

    def tap(self, number: int, inside: bool = False) -> EncoderTap:
        shape = (self.batch, number + 1, self.width)
        keys, states = self.random(*shape), self.random(*shape)
        queries, values = (self.random(*shape), self.random(*shape)) if inside else (None, None)
        first = self.random(self.batch, self.width) if queries is None else queries[:, 0]
        return EncoderTap(first, keys, max(1, self.width // 64), states, queries=queries, values=values)

    def visual(self, method: ProjectorReducer) -> VisualTokens:
        projected = self.random(self.batch, self.number, self.decoder_width) if method.reads_projected else None
        question = None
        if method.reads_question:
            text, seen = self.random(self.batch, TEXT, self.decoder_width).float(), None if projected is None else projected.float()
            state = text[:, -1] if method.reads_question_state else None
            question = Question(seen, text, torch.ones(self.batch, TEXT, dtype=torch.bool), state=state)
        taps = {name: self.tap(self.number) for name in method.encoder_layers(24)}
        beside = self.encoder() if method.joins_encoder else None
        return VisualTokens(self.random(self.batch, self.number, self.width), self.grid, taps, projected, question, beside)

    def encoder(self) -> Beside:
        """The 23 layers of an encoder, which are one layer here, for tokens that run beside the patches."""
        config = CLIPVisionConfig(
            hidden_size=self.width, num_attention_heads=max(1, self.width // 64), intermediate_size=4 * self.width
        )
        layer = CLIPEncoderLayer(config).to(torch.bfloat16)
        look = layer.self_attn
        parts = (look, look.q_proj, look.k_proj, look.v_proj, layer.layer_norm2, layer.mlp, config.num_attention_heads)
        block, tap = Block(layer, *parts, joined=layer.layer_norm1, out=look.out_proj), self.tap(self.number, inside=True)
        patches = self.random(self.batch, self.number, self.width)
        return Beside(None, (block,) * 23, dict.fromkeys(range(23), tap), patches)

    def blocks(self, method: EncoderReducer) -> list[BlockTokens]:
        found, number = [], self.number
        for layer, goal in method.plan(23, self.number).items():
            valid = torch.ones(self.batch, number, dtype=torch.bool)
            found.append(BlockTokens(self.tap(number, inside=True), valid, valid.float(), layer, goal))
            number = min(number, goal)
        return found

    def cells(self) -> torch.Tensor:
        """Pixels of cells of 28 x 28, twice, as Qwen's encoders take them."""
        return self.random(self.batch, self.number, 2 * 3 * 28 * 28)

    def prompt(self, method: DecoderReducer) -> PromptTokens:
        """Of the first layer that the method acts before; the others have the same shapes."""
        length, heads = self.number + TEXT, self.decoder_width // 128
        column = torch.arange(length).expand(self.batch, -1)
        visual = column < self.number
        image, every = torch.where(visual, 0, -1), torch.ones_like(visual)
        tap = None
        if method.reads != "nothing":
            query, keys = (self.random(self.batch, heads, length, 128) for _ in range(2))
            tap = DecoderTap(query, keys, 128**-0.5, None, column, None)
        hidden = self.random(self.batch, length, self.decoder_width)
        last, initial = column[:, -1], torch.full((self.batch, 1), self.number)
        start = PromptTokens(hidden, image, every, ~visual, ~visual & False, last, column, initial, 0, LAYERS)
        return replace(start, layer=1, tap=tap, start=start)


def call_of(name: str, shapes: Shapes, budget: int, most: int = 0) -> Callable[[], Any] | None:
    """What is timed of a method, or the first ``most`` of its steps; None where it chooses nothing."""
    jobs: list[Callable[[], Any]] = []
    try:
        method = with_budget(name, budget)
        for part in method.trained():
            part.bind(shapes.host())
        front = method.before_decoder()
        if isinstance(front, PixelReducer):
            cells = shapes.cells()
            jobs.append(lambda f=front, c=cells: [f.sources(own) for own in c])  # type: ignore[misc]
        elif isinstance(front, EncoderReducer):
            jobs += [functools.partial(front.shrink, block) for block in shapes.blocks(front)]
        elif not isinstance(front, foveate.KeepAll) and front.picture(shapes.grid) is None:
            seen = shapes.visual(front)
            jobs.append(lambda f=front, s=seen: f.reduce(s).apply(s.features))  # type: ignore[misc]
        for inside in method.inside_decoder():
            if inside.pattern(LAYERS) is None:
                prompt = shapes.prompt(inside)
                jobs += [lambda i=inside, p=prompt, at=layer: cut(i, p, at) for layer in inside.cuts(LAYERS)]  # type: ignore[misc]
    except foveate.InputError:
        return None  # a budget that the method cannot do, or a plan it lacks
    return (lambda: [job() for job in jobs[: most or None]]) if jobs else None


def with_budget(name: str, budget: int) -> foveate.Method:
    """A method with a budget, or by its own rule where it takes none; one with weights has random ones for that."""
    try:
        method = foveate.get(name, budget=budget)
    except foveate.InputError:
        method = foveate.get(name)
    if not isinstance(method, Trained):
        return method
    return method.fresh().with_fields(**({"groups": budget} if hasattr(method, "groups") else {}))


def cut(method: DecoderReducer, prompt: PromptTokens, layer: int) -> Cut:
    """One cut of a prompt; the first cut meets a new one, of which no method knows anything."""
    first = layer == method.cuts(LAYERS)[0]
    start = replace(prompt.start, layer=0) if first and prompt.start is not None else prompt.start
    return method.cut(replace(prompt, layer=layer, start=start))


def names(some: str = "") -> list[str]:
    """Of the methods to time: those given, or all."""
    return [info.name for info in foveate.methods() if not some or info.name in some.split(",")]


def calls(shapes: Shapes, budget: int, some: str = "") -> Iterator[tuple[str, Callable[[], Any]]]:
    """What is timed, by the name of the method: all that choose. One at a time, for their inputs are large."""
    for name in names(some):
        call = call_of(name, shapes, budget)
        if call is not None:
            yield name, call
