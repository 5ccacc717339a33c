"""Time of selection and merging against the procedure of the released PruMerge code, and against the encoder before it.

    python -m benchmarks.selection

Both run on the same features, queries and keys (N = 576, C = 1024, bfloat16 features as the encoder gives them). The released
procedure is written here from its description: it walks over the images and over the kept tokens of each, and for each kept token
builds the list of all other tokens, takes the 32 nearest by cosine of their keys, and adds them weighted by [CLS] attention.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

import foveate
from benchmarks.common import interleaved, ratio, save, summary
from foveate.tokens import EncoderTap, VisualTokens


def released_loop(features: Tensor, query: Tensor, keys: Tensor, plus: bool, k: int = 32) -> list[Tensor]:
    """The released procedure, image by image and token by token: a list of [m + 1, C]."""
    number, channels = features.shape[1:]
    attention = torch.softmax((query[:, None] @ keys.transpose(1, 2)) * channels**-0.5, dim=-1)[:, 0, 1:]
    found = []
    for b in range(len(features)):
        scores, tokens = attention[b], features[b]
        values = scores.float().cpu().numpy()
        q1, q3 = np.percentile(values, 25), np.percentile(values, 75)
        share = float((values > q3 + 1.5 * (q3 - q1)).sum()) / number
        kept = scores.topk(max(1, int(number * share))).indices
        if plus:
            grid = torch.arange(0, number - 1, max(1, int(int(1 / max(share, 1 / number)) / 3)))
            kept = torch.cat([kept, torch.tensor([i for i in grid.tolist() if i not in kept])])
        normed = F.normalize(keys[b, 1:].float(), dim=-1).to(keys.dtype)
        rest = torch.tensor([i for i in range(number) if i not in kept])
        merged = []
        for i in kept.tolist():
            other_keys = torch.cat([normed[:i], normed[i + 1 :]])
            other_tokens = torch.cat([tokens[:i], tokens[i + 1 :]])
            other_scores = torch.cat([scores[:i], scores[i + 1 :]])
            near = (other_keys @ normed[i]).topk(min(k, number - 1)).indices
            merged.append(tokens[i] + (other_scores[near, None] * other_tokens[near]).sum(0))
        merged.append((scores[rest, None] * tokens[rest]).sum(0))
        found.append(torch.stack(merged))
    return found


def make_tokens(batch: int, number: int, channels: int, dtype: torch.dtype, outliers: int) -> VisualTokens:
    """Random tokens whose [CLS] attention has about ``outliers`` outliers per image."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(batch, channels, generator=generator)
    keys = torch.randn(batch, 1 + number, channels, generator=generator) * 0.2
    for b in range(batch):
        liked = torch.randperm(number, generator=generator)[:outliers] + 1
        keys[b, liked] += 0.1 * query[b]
    features = torch.randn(batch, number, channels, generator=generator)
    tap = EncoderTap(query.to(dtype), keys.to(dtype), max(1, channels // 64))
    return VisualTokens(features.to(dtype), (round(number**0.5),) * 2, {"last": tap, "aligned": tap})


def main(
    batches: Annotated[str, typer.Option(help="Batch sizes.")] = "1,8",
    side: Annotated[int, typer.Option(help="Tokens along one side of the grid.")] = 24,
    channels: int = 1024,
    outliers: Annotated[int, typer.Option(help="Outliers per image; the paper reports 32 on average.")] = 32,
    rounds: int = 7,
    encoder_layers: Annotated[int, typer.Option(help="24 is CLIP-L; 0 leaves the encoder out.")] = 24,
    json_file: Annotated[Path | None, typer.Option("--json", help="Where the ledger goes.")] = None,
) -> None:
    """Print median times and ratios."""
    dtype, results = torch.bfloat16, []
    table = Table(title=f"select + merge, {side * side} tokens of {channels} channels, {dtype}")
    for column in ("batch", "method", "tokens kept", "foveate", "released loop", "faster by", "share of the encoder"):
        table.add_column(column, justify="right" if column != "method" else "left")
    encoder = None
    if encoder_layers:
        heads = max(1, channels // 64)
        config = CLIPVisionConfig(
            hidden_size=channels,
            intermediate_size=4 * channels,
            num_hidden_layers=encoder_layers,
            num_attention_heads=heads,
            image_size=14 * side,
            patch_size=14,
        )
        encoder = CLIPVisionModel(config).to(dtype).eval()
    for batch in map(int, batches.split(",")):
        tokens = make_tokens(batch, side * side, channels, dtype, outliers)
        pixels = torch.randn(batch, 3, 14 * side, 14 * side, dtype=dtype)
        tap = tokens.taps["last"]
        for name, plus in (("prumerge", False), ("prumerge+", True)):
            method = foveate.get(f"{name}:released", iqr_scope="image")
            mine = method.reduce(tokens)
            theirs = released_loop(tokens.features, tap.query, tap.keys, plus)
            kept = mine.mask().sum(1)
            same = [len(t) for t in theirs]
            calls = {
                "foveate": lambda method=method, tokens=tokens: method.reduce(tokens).apply(tokens.features),
                "plain": lambda name=name, tokens=tokens: foveate.get(name).reduce(tokens).apply(tokens.features),
                "loop": lambda tokens=tokens, tap=tap, plus=plus: released_loop(tokens.features, tap.query, tap.keys, plus),
            }
            if encoder is not None:
                calls["encoder"] = lambda encoder=encoder, pixels=pixels: encoder(pixels)
            with torch.no_grad():
                times = interleaved(calls, rounds)
            row = {
                "batch": batch,
                "method": name,
                "tokens": [float(kept.float().mean()), sum(same) / len(same)],
                "times": {key: summary(value) for key, value in times.items()},
                "faster_than_loop": 1 / ratio(times["foveate"], times["loop"]),
                "share_of_encoder": ratio(times["foveate"], times["encoder"]) if encoder is not None else None,
                "plain_share_of_encoder": ratio(times["plain"], times["encoder"]) if encoder is not None else None,
            }
            results.append(row)
            shown = {key: f"{v['median_ms']:.1f} ms [{v['q1_ms']:.1f}, {v['q3_ms']:.1f}]" for key, v in row["times"].items()}
            share = "" if encoder is None else f"{row['share_of_encoder']:.2%}"
            faster, kept_mean = f"{row['faster_than_loop']:.0f} x", f"{row['tokens'][0]:.0f}"
            table.add_row(str(batch), name, kept_mean, shown["foveate"], shown["loop"], faster, share)
    Console().print(table)
    save({"benchmark": "selection", "rows": results}, json_file)


if __name__ == "__main__":
    typer.run(main)
