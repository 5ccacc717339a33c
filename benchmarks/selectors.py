"""Time that every method takes to choose and merge, in one table, beside the vision encoder that runs before it.

    python -m benchmarks.selectors

A second table is about large photos, one at a time: time and peak memory (``benchmarks/large.py``).

Everything a method reads has the shape it has in LLaVA-1.5-7B, filled with random numbers: features and keys of 1024 channels in
bfloat16, projected features and hidden states of 4096. Methods inside the encoder and inside the decoder are asked once for each
layer they act at, and their times added. 2880 tokens are five tiles of 576, so five pictures stand beside them. Medians of CPU
time with one thread; the encoder is timed in front of the methods, whose inputs are too large to be held at once and take turns.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import CLIPVisionConfig, CLIPVisionModel

from benchmarks import large
from benchmarks.common import save, spent, summary
from benchmarks.shapes import Shapes, calls
from foveate.methods.registry import registered


def main(
    batches: Annotated[str, typer.Option(help="Batch sizes.")] = "1,8",
    numbers: Annotated[str, typer.Option(help="Visual tokens of a picture.")] = "576,2880",
    share: Annotated[float, typer.Option(help="Share of them that is kept.")] = 0.25,
    width: int = 1024,
    decoder_width: int = 4096,
    encoder_layers: Annotated[int, typer.Option(help="Of the encoder beside it; 24 is CLIP-L.")] = 24,
    rounds: int = 5,
    methods: Annotated[str, typer.Option(help="Names of those to time; all by default.")] = "",
    photos: Annotated[
        str, typer.Option("--large", help="Visual tokens of large photos; empty for no second table.")
    ] = "8192,16384",
    patience: Annotated[float, typer.Option(help="Methods that take longer are run once, seconds.")] = 3.0,
    longest: Annotated[
        float, typer.Option(help="What would take longer by its time at the last size is left out, seconds.")
    ] = 30.0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Where the ledger goes.")] = None,
) -> None:
    """Print median times, and shares of the encoder's."""
    torch.set_num_threads(1)
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
    for number in map(int, filter(None, numbers.split(","))):
        for batch in map(int, batches.split(",")):
            pixels = torch.randn(batch * max(1, number // 576), 3, 336, 336, dtype=torch.bfloat16)
            with torch.no_grad():
                times = {"encoder": [spent(lambda pixels=pixels: encoder(pixels)) for _ in range(rounds + 1)][1:]}
                shapes = Shapes(batch, number, width, decoder_width)
                asked, what = calls(shapes, round(share * number), methods), f"{number} tokens x {batch}"
                for name, call in track(asked, what, console=Console(stderr=True), transient=True):
                    if name in size and size[name][0] * (number / size[name][1]) ** 2 * batch / size[name][2] > longest:
                        continue
                    times[name] = [spent(call)]
                    size[name] = (times[name][0], number, batch)
                    if times[name][0] <= patience:
                        times[name] = [spent(call) for _ in range(rounds)]
            whole = statistics.median(times.pop("encoder"))
            for name, found in times.items():
                stage = registered()[name].stage
                part = {"method": name, "stage": stage, "share_of_encoder": statistics.median(found) / whole}
                rows.append({"tokens": number, "batch": batch, **part, "time": summary(found)})
            rows.append({"tokens": number, "batch": batch, "method": "encoder", "time": summary([whole])})
    table = Table(title=f"time to choose {share:.0%} of the tokens, ms (share of the CLIP-L encoder's time)")
    columns = [(n, b) for n in map(int, filter(None, numbers.split(","))) for b in map(int, batches.split(","))]
    for title in ("method", *(f"{n} x {b}" for n, b in columns)):
        table.add_column(title, justify="left" if title == "method" else "right")
    for name in dict.fromkeys(row["method"] for row in rows):
        cells = []
        for number, batch in columns:
            row = next((r for r in rows if (r["tokens"], r["batch"], r["method"]) == (number, batch, name)), None)
            part = f" ({row['share_of_encoder']:.1%})" if row and "share_of_encoder" in row else ""
            cells.append("-" if row is None else f"{row['time']['median_ms']:.1f}{part}")
        table.add_row(name, *cells)
    if columns:
        Console().print(table)
    if photos:
        rows += large.table(
            [int(number) for number in photos.split(",")], share, width, decoder_width, encoder_layers, methods, longest
        )
    save({"benchmark": "selectors", "share": share, "rows": rows}, json_file)


if __name__ == "__main__":
    typer.run(main)
