"""Time that every method takes to choose and merge, in one table, beside the vision encoder that runs before it.

    python -m benchmarks.selectors

Everything a method reads has the shape it has in LLaVA-1.5-7B, filled with random numbers: features and keys of 1024 channels in
bfloat16, projected features and hidden states of 4096. Methods inside the encoder and inside the decoder are asked once for each
layer they act at, and their times added. 2880 tokens are five tiles of 576, so five pictures stand beside them. Medians; the
encoder is timed in front of the methods, whose inputs are too large to be held at once and take turns.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import CLIPVisionConfig, CLIPVisionModel

import foveate
from benchmarks.common import save, summary, timed
from foveate.cuts import DecoderTap, PromptTokens
from foveate.methods.base import DecoderReducer, EncoderReducer, ProjectorReducer
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
        if method.reads_question and projected is not None:
            text = self.random(self.batch, TEXT, self.decoder_width).float()
            question = Question(projected.float(), text, torch.ones(self.batch, TEXT, dtype=torch.bool))
        taps = {name: self.tap(self.number) for name in method.encoder_layers(24)}
        return VisualTokens(self.random(self.batch, self.number, self.width), self.grid, taps, projected, question)

    def blocks(self, method: EncoderReducer) -> list[BlockTokens]:
        found, number = [], self.number
        for layer, goal in method.plan(23, self.number).items():
            valid = torch.ones(self.batch, number, dtype=torch.bool)
            found.append(BlockTokens(self.tap(number, inside=True), valid, valid.float(), layer, goal))
            number = min(number, goal)
        return found

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


def calls(shapes: Shapes, budget: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    """What is timed, by the name of the method: all that choose. One at a time, for their inputs are large."""
    for info in foveate.methods():
        try:
            method = foveate.get(info.name, budget=budget)
            method = method.fresh() if isinstance(method, Trained) else method
            for part in method.trained():
                part.bind(shapes.host())
            front = method.before_decoder()
            jobs: list[Callable[[], Any]] = []
            if isinstance(front, EncoderReducer):
                jobs += [functools.partial(front.shrink, block) for block in shapes.blocks(front)]
            elif not isinstance(front, foveate.KeepAll) and front.picture(shapes.grid) is None:
                seen = shapes.visual(front)
                jobs.append(lambda f=front, s=seen: f.reduce(s).apply(s.features))  # type: ignore[misc]
            for inside in method.inside_decoder():
                if inside.pattern(LAYERS) is None:
                    prompt = shapes.prompt(inside)
                    jobs += [functools.partial(inside.cut, replace(prompt, layer=layer)) for layer in inside.cuts(LAYERS)]
        except foveate.InputError:
            continue  # a budget that the method cannot do, or a plan it lacks
        if jobs:
            yield info.name, lambda jobs=tuple(jobs): [job() for job in jobs]  # type: ignore[misc]


def main(
    batches: Annotated[str, typer.Option(help="Batch sizes.")] = "1,8",
    numbers: Annotated[str, typer.Option(help="Visual tokens of a picture.")] = "576,2880",
    share: Annotated[float, typer.Option(help="Share of them that is kept.")] = 0.25,
    width: int = 1024,
    decoder_width: int = 4096,
    encoder_layers: Annotated[int, typer.Option(help="Of the encoder beside it; 24 is CLIP-L.")] = 24,
    rounds: int = 5,
    patience: Annotated[float, typer.Option(help="Methods that take longer are run once, seconds.")] = 3.0,
    longest: Annotated[
        float, typer.Option(help="What would take longer by its time at the last size is left out, seconds.")
    ] = 30.0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Where the ledger goes.")] = None,
) -> None:
    """Print median times, and shares of the encoder's."""
    heads, rows = max(1, width // 64), []
    size: dict[str, tuple[float, int, int]] = {}  # time of the first call, tokens and batch
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=encoder_layers,
        num_attention_heads=heads,
        image_size=336,
        patch_size=14,
    )
    encoder = CLIPVisionModel(config).to(torch.bfloat16).eval()
    for number in map(int, numbers.split(",")):
        for batch in map(int, batches.split(",")):
            pixels = torch.randn(batch * max(1, number // 576), 3, 336, 336, dtype=torch.bfloat16)
            with torch.no_grad():
                times = {"encoder": [timed(lambda pixels=pixels: encoder(pixels)) for _ in range(rounds + 1)][1:]}
                shapes = Shapes(batch, number, width, decoder_width)
                for name, call in track(calls(shapes, round(share * number)), f"{number} tokens x {batch}", transient=True):
                    if name in size and size[name][0] * (number / size[name][1]) ** 2 * batch / size[name][2] > longest:
                        continue
                    times[name] = [timed(call)]
                    size[name] = (times[name][0], number, batch)
                    if times[name][0] <= patience:
                        times[name] = [timed(call) for _ in range(rounds)]
            whole = statistics.median(times.pop("encoder"))
            for name, found in times.items():
                stage = foveate.get(name, budget=0.5).stage
                part = {"method": name, "stage": stage, "share_of_encoder": statistics.median(found) / whole}
                rows.append({"tokens": number, "batch": batch, **part, "time": summary(found)})
            rows.append({"tokens": number, "batch": batch, "method": "encoder", "time": summary([whole])})
    table = Table(title=f"time to choose {share:.0%} of the tokens, ms (share of the CLIP-L encoder's time)")
    columns = [(n, b) for n in map(int, numbers.split(",")) for b in map(int, batches.split(","))]
    for title in ("method", *(f"{n} x {b}" for n, b in columns)):
        table.add_column(title, justify="left" if title == "method" else "right")
    for name in dict.fromkeys(row["method"] for row in rows):
        cells = []
        for number, batch in columns:
            row = next((r for r in rows if (r["tokens"], r["batch"], r["method"]) == (number, batch, name)), None)
            part = f" ({row['share_of_encoder']:.1%})" if row and "share_of_encoder" in row else ""
            cells.append("-" if row is None else f"{row['time']['median_ms']:.1f}{part}")
        table.add_row(name, *cells)
    Console().print(table)
    save({"benchmark": "selectors", "share": share, "rows": rows}, json_file)


if __name__ == "__main__":
    typer.run(main)
