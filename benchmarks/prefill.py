"""Prefill and decode of a reduced prompt against the same model prompted with that many visual tokens to begin with.

    python -m benchmarks.prefill
    python -m benchmarks.prefill --size 7b --batch 16

The model has random weights: a CLIP-L/14-336 tower and a decoder of about 0.5 billion parameters (the shape of Qwen2-0.5B; with
``--size 7b`` that of LLaVA-1.5-7B), in bfloat16, under SDPA. "Native" runs get m visual tokens as pre-encoded features and never
meet foveate; "reduced" runs get the picture and keep m of 576. What is left between the two is what foveate costs the decoder. Peak
memory is read in a process of its own for each variant.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, Qwen2Config

import foveate
from benchmarks.common import ratio, save, summary, synchronise

IMAGE, TEXT = 7, 40
SHAPES = {
    "full": dict(tower=(1024, 4096, 24, 16), decoder=(896, 4864, 24, 14, 2), vocabulary=151_936),
    "7b": dict(tower=(1024, 4096, 24, 16), decoder=(4096, 11008, 32, 32, 32), vocabulary=32_064),
    "small": dict(tower=(64, 128, 2, 2), decoder=(64, 128, 2, 4, 2), vocabulary=100),
}


def build(size: str) -> LlavaForConditionalGeneration:
    """A LLaVA with random bfloat16 weights."""
    shape = SHAPES[size]
    width, mlp, layers, heads = shape["tower"]
    vision = CLIPVisionConfig(
        hidden_size=width, intermediate_size=mlp, num_hidden_layers=layers, num_attention_heads=heads, image_size=336, patch_size=14
    )
    width, mlp, layers, heads, shared = shape["decoder"]
    text = Qwen2Config(
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=shared,
        vocab_size=shape["vocabulary"],
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlavaForConditionalGeneration(config).eval()
    torch.set_default_dtype(torch.float32)
    model.generation_config.update(eos_token_id=None, pad_token_id=0)
    return model


def prompt(tokens: int, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    """A prompt for each picture."""
    ids = torch.tensor([[1, *[IMAGE] * tokens, *range(10, 10 + TEXT)]] * len(pixels), device=pixels.device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class Stamps:
    """When each forward of a ``generate`` began and ended; the same for reduced and native runs."""

    def __init__(self, model: Any) -> None:
        self.times: list[float] = []
        self.handles = [model.register_forward_pre_hook(self._note), model.register_forward_hook(self._note)]

    def _note(self, *_: Any) -> None:
        synchronise()
        self.times.append(time.perf_counter())

    def __enter__(self) -> Stamps:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    @property
    def prefill(self) -> float:
        return self.times[1] - self.times[0]

    @property
    def decode(self) -> float:
        """Seconds per token, what ``generate`` does between the forwards included."""
        return (self.times[-1] - self.times[1]) / (len(self.times) // 2 - 1)


class Run:
    """One way of running the model; each call records its times."""

    def __init__(self, model: Any, pixels: torch.Tensor, steps: int, *, native: int | None, keep: int | None) -> None:
        self.model, self.pixels, self.steps, self.native, self.keep = model, pixels, steps, native, keep
        self.seconds: dict[str, list[float]] = {}

    @torch.no_grad()
    def __call__(self) -> None:
        options = dict(max_new_tokens=self.steps, do_sample=False)
        if self.native is not None:
            encoded = self.model.get_image_features(self.pixels, return_dict=True)
            encoded.pooler_output = [features[: self.native] for features in encoded.pooler_output]
            with Stamps(self.model) as stamps:
                inputs = prompt(self.native, self.pixels)
                self.model.generate(**inputs, mm_encoder_outputs={"image": encoded}, **options)
            found = {}
        else:
            begin = time.perf_counter()
            with foveate.PruMergePlus(budget=self.keep or 1.0)(self.model) as session, Stamps(self.model) as stamps:
                self.model.generate(**prompt(576, self.pixels), pixel_values=self.pixels, **options)
            parts = session.report.seconds
            found = {"first_token": stamps.times[1] - begin, "vision": parts["vision"], "selection": parts.get("selection", 0.0)}
        for name, value in {"prefill": stamps.prefill, "decode": stamps.decode, **found}.items():
            self.seconds.setdefault(name, []).append(value)


def peak_memory(size: str, batch: int, keep: int | None, steps: int) -> float:
    """GiB at the peak of one run in a process of its own."""
    code = f"from benchmarks.prefill import measure_memory; measure_memory({size!r}, {batch}, {keep!r}, {steps})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout.strip().splitlines()[-1]))


def measure_memory(size: str, batch: int, keep: int | None, steps: int) -> None:
    """Run once and print the peak of this process (of the GPU where there is one) in GiB."""
    model = build(size)
    pixels = torch.randn(batch, 3, 336, 336, dtype=torch.bfloat16, device=model.device)
    Run(model, pixels, steps, native=None, keep=keep)()
    peak = (
        torch.cuda.max_memory_allocated()
        if torch.cuda.is_available()
        else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    )
    print(json.dumps(peak / 2**30))


def main(
    size: Annotated[str, typer.Option(help="full, 7b or small (for a test of this script).")] = "full",
    batch: Annotated[int, typer.Option(help="Pictures at a time, each with a prompt.")] = 1,
    counts: Annotated[str, typer.Option(help="Visual tokens: PruMerge+ and PruMerge of the paper.")] = "144,32",
    steps: int = 9,
    rounds: int = 5,
    memory: Annotated[bool, typer.Option(help="Read peak memory, in further processes.")] = True,
    json_file: Annotated[Path | None, typer.Option("--json", help="Where the ledger goes.")] = None,
) -> None:
    """Print times, ratios and peak memory."""
    model = build(size)
    pixels = torch.randn(batch, 3, 336, 336, dtype=torch.bfloat16, device=model.device)
    kept = [int(count) for count in counts.split(",")]
    runs = {"576 (all)": Run(model, pixels, steps, native=None, keep=None)}
    for count in kept:
        runs[f"{count} reduced"] = Run(model, pixels, steps, native=None, keep=count)
        runs[f"{count} native"] = Run(model, pixels, steps, native=count, keep=None)
    for run in runs.values():  # warm-up
        run()
        run.seconds.clear()
    for _ in range(rounds):
        for run in runs.values():
            run()
    variants = {"576 (all)": None} | {f"{count} reduced": count for count in kept}
    peaks = {name: peak_memory(size, batch, keep, steps) for name, keep in variants.items()} if memory else {}
    rows = [row(name, runs, peaks) for name in runs]
    parameters = sum(p.numel() for p in model.get_decoder().parameters()) / 1e9
    table = Table(title=f"decoder of {parameters:.2f} B parameters, {batch} x 576 visual tokens and {TEXT} of text")
    columns = ("visual tokens", "prefill", "of native", "of all", "decode / token", "of native", "to first token", "peak memory")
    for column in columns:
        table.add_column(column, justify="right")
    for each in rows:
        table.add_row(*cells(each))
    Console().print(table)
    save({"benchmark": "prefill", "rows": rows}, json_file)


def row(name: str, runs: dict[str, Run], memory: dict[str, float]) -> dict[str, Any]:
    """All figures of one way of running."""
    mine, full = runs[name].seconds, runs["576 (all)"].seconds
    native = runs[name.replace("reduced", "native")].seconds if "reduced" in name else None
    return {
        "name": name,
        **{part: summary(times) for part, times in mine.items()},
        "prefill_of_native": ratio(mine["prefill"], native["prefill"]) if native else None,
        "decode_of_native": ratio(mine["decode"], native["decode"]) if native else None,
        "prefill_of_all": ratio(mine["prefill"], full["prefill"]),
        "peak_gib": memory.get(name),
    }


def cells(figures: dict[str, Any]) -> tuple[str, ...]:
    """One row of the table."""
    prefill, native = figures["prefill"], figures["prefill_of_native"]
    return (
        figures["name"],
        f"{prefill['median_ms']:.0f} ms [{prefill['q1_ms']:.0f}, {prefill['q3_ms']:.0f}]",
        f"{native:.3f}" if native else "",
        f"{figures['prefill_of_all']:.3f}",
        f"{figures['decode']['median_ms']:.1f} ms",
        f"{figures['decode_of_native']:.3f}" if native else "",
        f"{figures['first_token']['median_ms']:.0f} ms" if "first_token" in figures else "",
        f"{figures['peak_gib']:.2f} GiB" if figures["peak_gib"] else "",
    )


if __name__ == "__main__":
    typer.run(main)
