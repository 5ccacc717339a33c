"""Methods that drop visual tokens between decoder layers, against what they could save at best.

    python -m benchmarks.decoder

The ideal is layer-weighted: each decoder layer takes the time it takes natively with the tokens it runs, and what is outside of the
layers (embeddings, the last norm, logits) what it takes natively with the tokens that enter the decoder. "Usual FastV" is FastV as
its paper's code does it, with the attention weights of one eager layer; everything else about it is the same. The model has random
weights: a decoder of half a billion parameters in bfloat16 under SDPA, behind a tiny vision tower, whose time is left out.
"""

from __future__ import annotations

import copy
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

import foveate
from benchmarks.common import ratio, save, summary, synchronise
from benchmarks.prefill import SHAPES, TEXT, Stamps, build, prompt
from foveate.methods.fastv import FastV
from foveate.methods.tools.selection import best_of_images, counts_of_images

SHAPES["decoder"] = dict(tower=(64, 128, 4, 2), decoder=SHAPES["full"]["decoder"], vocabulary=SHAPES["full"]["vocabulary"])
SHAPES["decoder-small"] = dict(tower=(64, 128, 4, 2), decoder=(64, 128, 4, 4, 2), vocabulary=100)


@dataclass(kw_only=True)
class UsualFastV(FastV):
    """FastV with the whole attention matrix of one eager layer."""

    reads = "nothing"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.weights: Tensor | None = None

    def attach(self, model: Any) -> list[Any]:
        """Make layer K - 1 eager and keep its weights; returns what undoes it."""
        attention = model.get_decoder().layers[self.layer - 1].self_attn
        shared, attention.config = attention.config, copy.copy(attention.config)
        attention.config._attn_implementation_internal = "eager"

        def causal(_: Any, args: Any, kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            length = hidden.shape[1]
            if kwargs.get("attention_mask") is None and length > 1:
                lowest = torch.finfo(hidden.dtype).min
                kwargs["attention_mask"] = torch.full((length, length), lowest, dtype=hidden.dtype, device=hidden.device).triu(1)[
                    None, None
                ]
            return args, kwargs

        def note(_: Any, __: Any, out: Any) -> None:
            self.weights = out[1]

        handles = [attention.register_forward_pre_hook(causal, with_kwargs=True), attention.register_forward_hook(note)]

        def undo() -> None:
            attention.config = shared
            for handle in handles:
                handle.remove()

        return [undo]

    def cut(self, tokens: foveate.PromptTokens) -> foveate.Cut:
        assert self.weights is not None
        scores = self.weights.float().mean(1).gather(1, tokens.last[:, None, None].expand(-1, 1, tokens.valid.shape[1]))[:, 0]
        return foveate.Cut(best_of_images(scores, tokens.of_image, counts_of_images(self.budget, tokens.initial)), scores)


METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "all tokens": ("fastv", {"budget": 1.0}),
    "fastv": ("fastv", {}),
    "pyramiddrop": ("pyramiddrop", {}),
    "sparsevlm (192)": ("sparsevlm:released", {}),
    "aim": ("aim", {}),
    "iti (39 %, then 34 %)": ("iti", {"budget": 0.39, "second": 0.34}),  # what its rules keep on the pocket model
    "text-relevance 25 %": ("text-relevance", {"budget": 0.25}),
    "p-sigmoid": ("p-sigmoid", {}),
    "g-search 25 %": ("g-search", {"budget": 0.25}),
    "yopo": ("yopo", {}),
}


@dataclass
class Timed:
    """Times of one way of running, round by round."""

    prefill: list[float] = field(default_factory=list)
    inside: list[float] = field(default_factory=list)  # of prefill, from the first to the last decoder layer
    total: list[float] = field(default_factory=list)
    selection: list[float] = field(default_factory=list)
    layers: list[int] = field(default_factory=list)


class Bench:
    """One model, all ways of running it in turns."""

    def __init__(self, size: str, steps: int) -> None:
        self.model = build(size)
        self.pixels = torch.randn(1, 3, 336, 336, dtype=torch.bfloat16, device=self.model.device)
        self.options = dict(max_new_tokens=steps, do_sample=False)
        self.runs: dict[str, Timed] = {}

    @torch.no_grad()
    def method(self, shown: str, method: foveate.Method) -> None:
        undo = method.attach(self.model) if isinstance(method, UsualFastV) else []
        try:
            with method(self.model) as session, Stamps(self.model) as stamps:
                self.model.generate(**prompt(576, self.pixels), pixel_values=self.pixels, **self.options)
        finally:
            for each in undo:
                each()
        run = self.runs.setdefault(shown, Timed())
        run.prefill.append(stamps.prefill)
        run.total.append(stamps.times[-1] - stamps.times[0])
        run.selection.append(session.report.seconds.get("selection", 0.0))
        run.layers = session.report.layers

    @torch.no_grad()
    def native(self, count: int) -> None:
        encoded = self.model.get_image_features(self.pixels, return_dict=True)
        encoded.pooler_output = [features[:count] for features in encoded.pooler_output]
        inputs, layers = prompt(count, self.pixels), self.model.get_decoder().layers
        times: list[float] = []

        def note(*_: Any) -> None:
            synchronise()
            times.append(time.perf_counter())

        handles = [layers[0].register_forward_pre_hook(note), layers[-1].register_forward_hook(note)]
        with Stamps(self.model) as stamps:
            pictures = {"mm_encoder_outputs": {"image": encoded}} if count else {}
            self.model.generate(**inputs, **pictures, **self.options)
        for handle in handles:
            handle.remove()
        run = self.runs.setdefault(f"native {count}", Timed())
        run.prefill.append(stamps.prefill)
        run.inside.append(times[1] - times[0])
        run.total.append(stamps.times[-1] - stamps.times[0])


def main(
    size: Annotated[str, typer.Option(help="decoder, or decoder-small for a test of this script.")] = "decoder",
    steps: Annotated[int, typer.Option(help="New tokens, for the total time.")] = 9,
    rounds: int = 5,
    visual: Annotated[int, typer.Option(help="Visual tokens that enter the decoder; fewer than 576 are a uniform choice.")] = 576,
    json_file: Annotated[Path | None, typer.Option("--json", help="Where the ledger goes.")] = None,
) -> None:
    """Print prefill and total times, what they are of the ideal, and the share of choosing tokens."""
    bench = Bench(size, steps)
    methods: dict[str, foveate.Method] = {}
    for shown, (name, fields) in METHODS.items():
        try:
            method = foveate.get(name, **fields)
            if visual < 576 and type(method.before_decoder()) is not foveate.ProjectorReducer:
                continue
            method = method if visual == 576 else foveate.Compose(foveate.Spatial(budget=visual), method)
            bench.method(shown, method)
            methods[shown] = method
        except foveate.InputError as error:  # schedules that a shallow test model cannot have
            print(f"{shown}: {error}")
    if visual == 576:
        methods["usual fastv"] = UsualFastV()
        bench.method("usual fastv", methods["usual fastv"])
    counts = sorted({count for run in bench.runs.values() for count in run.layers})
    for count in counts:
        bench.native(count)
    for run in bench.runs.values():  # that was the warm-up
        for times in (run.prefill, run.inside, run.total, run.selection):
            times.clear()
    for _ in range(rounds):
        for shown, method in methods.items():
            bench.method(shown, method)
        for count in counts:
            bench.native(count)
    rows = [row(shown, bench.runs) for shown in methods]
    depth, parameters = len(bench.runs["fastv"].layers), sum(p.numel() for p in bench.model.get_decoder().parameters()) / 1e9
    table = Table(title=f"decoder of {parameters:.2f} B parameters, {depth} layers; {visual} visual tokens and {TEXT} of text")
    for column in ("method", "tokens, mean of layers", "prefill", "of all tokens", "ideal", "ideal / prefill", "choosing", "total"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for each in rows:
        table.add_row(*cells(each))
    Console(width=140).print(table)
    save({"benchmark": "decoder", "visual_tokens": visual, "rows": rows}, json_file)


def row(shown: str, runs: dict[str, Timed]) -> dict[str, Any]:
    """All figures of one method; ratios are medians over rounds."""
    mine, every = runs[shown], runs["all tokens"]
    first = runs[f"native {mine.layers[0]}"]
    inside = [statistics.fmean(times) for times in zip(*(runs[f"native {count}"].inside for count in mine.layers), strict=True)]
    ideal = [whole - own + layers for whole, own, layers in zip(first.prefill, first.inside, inside, strict=True)]
    return {
        "name": shown,
        "layers": mine.layers,
        "prefill": summary(mine.prefill),
        "total": summary(mine.total),
        "selection": summary(mine.selection),
        "ideal": summary(ideal),
        "realised": ratio(ideal, mine.prefill),
        "prefill_of_all": ratio(mine.prefill, every.prefill),
        "total_of_all": ratio(mine.total, every.total),
        "ideal_of_all": ratio(ideal, every.prefill),
    }


def cells(figures: dict[str, Any]) -> tuple[str, ...]:
    """One row of the table."""
    prefill = figures["prefill"]
    return (
        figures["name"],
        f"{statistics.fmean(figures['layers']):.0f}",
        f"{prefill['median_ms']:.0f} ms [{prefill['q1_ms']:.0f}, {prefill['q3_ms']:.0f}]",
        f"{figures['prefill_of_all']:.3f}",
        f"{figures['ideal']['median_ms']:.0f} ms",
        f"{figures['realised']:.3f}",
        f"{figures['selection']['median_ms']:.1f} ms",
        f"{figures['total']['median_ms']:.0f} ms ({figures['total_of_all']:.3f})",
    )


if __name__ == "__main__":
    typer.run(main)
