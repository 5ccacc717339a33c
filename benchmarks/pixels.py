"""Time of a native-resolution encoder where cells that repeat are left out before it, beside the share that stays.

    python -m benchmarks.pixels

The shape of Qwen2.5-VL's encoder (width 1280, every eighth layer over the whole picture, windows of 112 pixels elsewhere) with
random weights and fewer layers, in float32, one picture of 616 x 616 pixels of which a known share of the cells is unique.
"Choosing" is what comparing the pixels takes, "encoder" all until visual tokens are there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

import foveate
from benchmarks.common import interleaved, ratio, save, summary
from foveate.engine.model.anatomy import anatomy
from foveate.engine.vision.front import Around, encode_and_reduce
from foveate.methods.base import KeepAll
from foveate.report import Clock


def build(layers: int, width: int) -> Qwen2_5_VLForConditionalGeneration:
    """A vision encoder of Qwen2.5-VL's shape, with a decoder that is never run."""
    vision = {
        "depth": layers,
        "hidden_size": width,
        "intermediate_size": width * 8 // 3,
        "num_heads": max(1, width // 80),
        "out_hidden_size": 64,
        "fullatt_block_indexes": list(range(7, layers, 8)) or [layers - 1],
    }
    text = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]},
    }
    torch.manual_seed(0)
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(vision_config=vision, text_config=text)).eval()


def picture(side: int, share: float) -> dict[str, torch.Tensor]:
    """Pixels of side x side cells, of which a share is unique; the others repeat the first."""
    cells = torch.randn(side * side, 4, 2 * 3 * 14 * 14)
    cells[torch.randperm(side * side - 1)[: round((1 - share) * side * side)] + 1] = cells[0].clone()
    return {"pixel_values": cells.flatten(0, 1), "image_grid_thw": torch.tensor([[1, 2 * side, 2 * side]])}


def main(
    shares: Annotated[str, typer.Option(help="Of the cells that are unique.")] = "1.0,0.7,0.5,0.22",
    side: Annotated[int, typer.Option(help="Cells along one side.")] = 22,
    width: int = 1280,
    layers: Annotated[int, typer.Option(help="Qwen2.5-VL has 32.")] = 8,
    rounds: int = 5,
    json_file: Annotated[Path | None, typer.Option("--json", help="Where the ledger goes.")] = None,
) -> None:
    """Print median times and ratios."""
    parts, rows = anatomy(build(layers, width)), []
    table = Table(title=f"{layers} layers of {width} channels, {4 * side * side} patches, float32")
    for column in ("unique cells", "encoder", "of the whole picture", "of that choosing"):
        table.add_column(column, justify="right")
    for share in map(float, shares.split(",")):
        inputs, spent = picture(side, share), list[float]()

        def run(method: foveate.FrontReducer, inputs: dict[str, torch.Tensor] = inputs) -> Clock:
            clock = Clock(torch.device("cpu"))
            encode_and_reduce(parts, method, inputs, Around(clock))
            return clock

        def fewer(spent: list[float] = spent, run=run) -> None:
            spent.append(run(foveate.PixelPrune()).seconds().get("selection", 0.0))

        with torch.no_grad():
            times = interleaved({"whole": lambda run=run: run(KeepAll()), "fewer": fewer}, rounds)
        of_whole = ratio(times["fewer"], times["whole"])
        choosing = ratio(spent[1:], times["fewer"])
        rows.append({"share": share, "of_whole": of_whole, "choosing": choosing, "time": summary(times["fewer"])})
        table.add_row(f"{share:.0%}", f"{rows[-1]['time']['median_ms']:.0f} ms", f"{of_whole:.3f}", f"{choosing:.3f}")
    Console().print(table)
    save({"benchmark": "pixels", "rows": rows}, json_file)


if __name__ == "__main__":
    typer.run(main)
