"""Time of the vision encoder with patches removed inside it, against the whole encoder, beside the ratio of operations.

    python -m benchmarks.encoder

CLIP-L/14-336 with random weights in bfloat16, SDPA; the whole path a user runs: pixels to projected visual tokens. [CLS] attention
of random weights is flat, so ATS keeps more by its own rule here than on a trained encoder: it is measured at fixed counts only.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import foveate
from benchmarks.common import interleaved, ratio, save, summary
from foveate.analysis.flops import encoder_flops
from foveate.engine.model.anatomy import anatomy
from foveate.engine.vision.front import Around, encode_and_reduce
from foveate.report import Clock

METHODS = ("tome", "crossget", "evit", "ats", "resize")


def build(layers: int, width: int, side: int) -> LlavaForConditionalGeneration:
    """A vision encoder of CLIP's shape, with a decoder that is never run."""
    heads = max(1, width // 64)
    vision = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        image_size=14 * side,
        patch_size=14,
    )
    text = LlamaConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1, vocab_size=64)
    torch.manual_seed(0)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=5, image_seq_length=side * side)
    return LlavaForConditionalGeneration(config).to(torch.bfloat16).eval()


def main(
    batches: Annotated[str, typer.Option(help="Batch sizes.")] = "1,4",
    budgets: Annotated[str, typer.Option(help="Visual tokens left, in the end.")] = "288,144",
    side: Annotated[int, typer.Option(help="Patches along one side.")] = 24,
    width: int = 1024,
    layers: Annotated[int, typer.Option(help="24 is CLIP-L.")] = 24,
    rounds: int = 7,
    json_file: Annotated[Path | None, typer.Option("--json", help="Where the ledger goes.")] = None,
) -> None:
    """Print median times and ratios."""
    model, rows = build(layers, width, side), []
    parts, patches = anatomy(model), side * side
    table = Table(title=f"vision encoder, {layers} layers of {width} channels, {patches} patches, bfloat16")
    for column in ("batch", "method", "tokens left", "time", "of the whole", "of the operations", "realised"):
        table.add_column(column, justify="right" if column != "method" else "left")
    for batch in map(int, batches.split(",")):
        pixels = torch.randn(batch, 3, 14 * side, 14 * side, dtype=torch.bfloat16)

        def run(method: foveate.FrontReducer, pixels: torch.Tensor = pixels) -> list[list[int]]:
            with torch.no_grad():
                visuals = encode_and_reduce(parts, method, {"pixel_values": pixels}, Around(Clock(model.device)))
            return [counts.tolist() for counts in visuals.encoder_counts]

        methods = {("all", patches): foveate.KeepAll()}
        methods |= {(name, int(b)): foveate.get(name, budget=int(b)) for name in METHODS for b in budgets.split(",")}
        counts = {key: run(method) for key, method in methods.items()}
        times = interleaved({str(key): (lambda method=method: run(method)) for key, method in methods.items()}, rounds)
        whole = encoder_flops(model.config.vision_config, [patches + 1] * (layers + 1))
        for (name, budget), _ in methods.items():
            if name == "resize":
                rows_left, columns_left = foveate.get(name, budget=budget).shape((side, side))
                tokens = [rows_left * columns_left + 1] * (layers + 1)
            else:
                inside = [max(layer) + 1 for layer in counts[name, budget]] or [patches + 1] * (layers - 1)
                tokens = [patches + 1, *inside, inside[-1]]
            share = ratio(times[str((name, budget))], times[str(("all", patches))])
            ideal = encoder_flops(model.config.vision_config, tokens) / whole
            row = {"batch": batch, "method": name, "budget": budget, "tokens_per_layer": tokens, "share": share, "flops": ideal}
            rows.append({**row, "time": summary(times[str((name, budget))])})
            shown = "{median_ms:.0f} ms [{q1_ms:.0f}, {q3_ms:.0f}]".format(**rows[-1]["time"])
            table.add_row(str(batch), name, str(budget), shown, f"{share:.2f}", f"{ideal:.2f}", f"{ideal / share:.2f}")
    Console().print(table)
    save({"benchmark": "encoder", "rows": rows}, json_file)


if __name__ == "__main__":
    typer.run(main)
