"""Large photos: seconds and peak memory of every method, each in a process of its own, and of a layer of the encoder before it.

    python -m benchmarks.large prumerge+ --number 16384

measures one method; ``benchmarks/selectors.py`` asks for all and makes the table. One picture, one thread, seconds of the CPU,
inputs as in that table. Peak memory is what the process holds more than before the call, its inputs left out (Linux only). The
encoder is one layer of CLIP-L's size in bfloat16 with SDPA, times the number of layers; what is around the layers is left out.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import CLIPVisionConfig
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from benchmarks.common import spent
from benchmarks.shapes import Shapes, call_of, names


def encoder_layer(number: int, width: int) -> Callable[[], Any]:
    """One layer over ``number`` patches and [CLS]."""
    config = CLIPVisionConfig(hidden_size=width, intermediate_size=4 * width, num_attention_heads=max(1, width // 64))
    config._attn_implementation = "sdpa"
    layer, states = CLIPEncoderLayer(config).to(torch.bfloat16).eval(), torch.randn(1, number + 1, width, dtype=torch.bfloat16)
    return lambda: layer(states, attention_mask=None)


def held(what: str) -> int:
    """Bytes of memory of this process: "VmRSS" now, "VmHWM" at most since the last reset."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(what):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this system does not tell how much memory a process holds")


def measured(call: Callable[[], Any], patience: float = 2.0) -> dict[str, float]:
    """Seconds of the CPU, the median of three calls if they are short, and bytes of peak memory of the first."""
    Path("/proc/self/clear_refs").write_text("5")
    before = held("VmRSS")
    times, peak = [spent(call)], held("VmHWM") - before
    times += [spent(call) for _ in range(2 if times[0] <= patience else 0)]
    return {"seconds": statistics.median(times), "peak_bytes": peak}


def main(
    method: Annotated[str, typer.Argument(help="Name of a method, or encoder.")],
    number: Annotated[int, typer.Option(help="Visual tokens.")] = 16384,
    share: Annotated[float, typer.Option(help="Share of them that is kept.")] = 0.25,
    width: int = 1024,
    decoder_width: int = 4096,
    most: Annotated[int, typer.Option(help="Only so many of the layers that it acts at; 0 = all.")] = 0,
) -> None:
    """Print what one method takes, as JSON; null if it chooses nothing."""
    torch.set_num_threads(1)
    with torch.no_grad():
        if method == "encoder":
            call: Callable[[], Any] | None = encoder_layer(number, width)
        else:
            call = call_of(method, Shapes(1, number, width, decoder_width), round(share * number), most)
        print(json.dumps(None if call is None else measured(call)))


def table(
    numbers: list[int], share: float, width: int, decoder_width: int, layers: int, methods: str, longest: float
) -> list[dict[str, Any]]:
    """Print the table of large photos, and return its rows; what would take longer than ``longest`` seconds is left out."""
    options = ["--share", str(share), "--width", str(width), "--decoder-width", str(decoder_width)]
    rows: list[dict[str, Any]] = []
    for number in numbers:
        whole = 0.0
        for name in track(["encoder", *names(methods)], f"{number} tokens", console=Console(stderr=True), transient=True):
            earlier = next((row for row in reversed(rows) if row["method"] == name), None)
            if earlier is not None and name != "encoder" and earlier["seconds"] * (number / earlier["tokens"]) ** 2 > longest:
                continue
            command = [sys.executable, "-m", "benchmarks.large", name, "--number", str(number), *options]
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
            if found is None:
                continue
            if name == "encoder":
                found["seconds"] *= layers
                whole = found["seconds"]
            rows.append({"tokens": number, "batch": 1, "method": name, **found, "share_of_encoder": found["seconds"] / whole})
    shown = Table(title=f"large photos, one thread: seconds to choose {share:.0%} (share of the encoder's), peak memory in MiB")
    for title in ("method", *(f"{number} {what}" for number in numbers for what in ("time", "memory"))):
        shown.add_column(title, justify="left" if title == "method" else "right")
    for name in dict.fromkeys(row["method"] for row in rows):
        cells = []
        for number in numbers:
            row = next((row for row in rows if (row["tokens"], row["method"]) == (number, name)), None)
            cells += (
                ["-", "-"]
                if row is None
                else [f"{row['seconds']:.2f} ({row['share_of_encoder']:.1%})", f"{row['peak_bytes'] / 2**20:.0f}"]
            )
        shown.add_row(name, *cells)
    Console().print(shown)
    return rows


if __name__ == "__main__":
    typer.run(main)
