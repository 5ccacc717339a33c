"""What choosing tokens of a whole video takes, against the vision encoder before it.

    python -m benchmarks.videos

One video of 64 frames with 196 tokens each, features of width 3584 (Qwen2.5-VL-7B), one thread, seconds of the CPU. The encoder has
the shape of Qwen2.5-VL's (32 layers of width 1280, four patches to a token, attention within windows of 64 patches) in float32; one
layer is timed on a part of the frames and multiplied, since frames do not see each other.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLVisionBlock

import foveate
from benchmarks.common import save, spent
from foveate.methods.base import ProjectorReducer
from foveate.tokens import EncoderTap, VisualTokens

WHOLE = ("evs", "vidcom2", "v-cast", "flashvid", "fewer-frames")
WINDOW, PATCHES, LAYERS = 64, 4, 32


def layer_seconds(patches: int, width: int) -> float:
    """Of one layer over windows of so many patches."""
    config = Qwen2_5_VLVisionConfig(hidden_size=width, num_heads=max(1, width // 80), intermediate_size=width * 8 // 3)
    config._attn_implementation = "sdpa"
    block, states = Qwen2_5_VLVisionBlock(config).eval(), torch.randn(patches, width)
    ends = torch.arange(0, patches + 1, WINDOW, dtype=torch.int32)
    ends = ends if ends[-1] == patches else torch.cat([ends, ends.new_tensor([patches])])
    turns = torch.ones(patches, width // config.num_heads), torch.zeros(patches, width // config.num_heads)
    return spent(lambda: block(states, cu_seqlens=ends, position_embeddings=turns))


def main(
    frames: int = 64,
    tokens: Annotated[int, typer.Option(help="Of a frame.")] = 196,
    width: Annotated[int, typer.Option(help="Of the features.")] = 3584,
    encoder_width: int = 1280,
    timed_frames: Annotated[int, typer.Option(help="Frames that the layer of the encoder is timed on.")] = 4,
    share: Annotated[float, typer.Option(help="Of the tokens that stay.")] = 0.25,
    rounds: int = 3,
    json_file: Annotated[Path | None, typer.Option("--json", help="Where the ledger goes.")] = None,
) -> None:
    """Print seconds and shares of the encoder."""
    torch.set_num_threads(1)
    side = round(tokens**0.5)
    rows, table = [], Table(title=f"{frames} frames of {side * side} tokens, {share:.0%} stay, one thread")
    for column in ("", "seconds", "of the encoder"):
        table.add_column(column, justify="left" if not column else "right")
    with torch.no_grad():
        layer = statistics.median(layer_seconds(timed_frames * side * side * PATCHES, encoder_width) for _ in range(rounds))
        encoder = LAYERS * layer * frames / timed_frames
        features = torch.randn(1, frames * side * side, width)
        queries, keys = torch.randn(2, frames, side * side, encoder_width)
        tap = EncoderTap(None, keys, encoder_width // 80, queries=queries)  # no [CLS]: attention that is received
        video = VisualTokens(features, (side, side), {"aligned": tap}, features, None, None, frames)
        for name in WHOLE:
            method = foveate.get(name, budget=share)
            if not isinstance(method, ProjectorReducer):
                raise TypeError(f"{name} is no method for whole videos")
            seconds = statistics.median(spent(lambda m=method: m.reduce(video).apply(features)) for _ in range(rounds))
            rows.append({"method": name, "seconds": seconds, "of_encoder": seconds / encoder})
            table.add_row(name, f"{seconds:.2f}", f"{seconds / encoder:.2%}")
    table.add_row("encoder", f"{encoder:.0f}", "")
    Console().print(table)
    save({"benchmark": "videos", "encoder_seconds": encoder, "rows": rows}, json_file)


if __name__ == "__main__":
    typer.run(main)
