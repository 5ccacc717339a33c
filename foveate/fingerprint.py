"""Answers that were given once, with what they cost: an interrupted run goes on from there and never mixes settings."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor

SAMPLES = 4096  # weights of each tensor that the fingerprint reads in their order


def digest(*parts: str | bytes) -> str:
    """A short name of some texts and bytes."""
    found = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        found.update(len(data).to_bytes(8, "big") + data)
    return found.hexdigest()[:20]


def fingerprint(model: Any) -> str:
    """Which weights a loaded model has: of each tensor its shape, type, the sum of its bits, and ``SAMPLES`` spread over it.

    Read from memory, so that adapters and quantisation count, and files need not be read twice. Of tensors that are not in memory
    (offloaded ones) only shape and type count. Where the files lie does not.
    """
    config = json.loads(model.config.to_json_string(use_diff=False))
    config.pop("_name_or_path", None)
    parts = [json.dumps(config, sort_keys=True), str(getattr(model.config, "_commit_hash", None))]
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        bits = "" if tensor.is_meta else _bits(tensor.detach())
        parts.append(f"{name} {tuple(tensor.shape)} {tensor.dtype} {bits}")
    return digest(*parts)


def _bits(tensor: Tensor) -> str:
    flat = tensor.contiguous().flatten().view(torch.uint8)
    words = flat.view(torch.int16) if flat.numel() % 2 == 0 else flat
    spread = words[:: max(1, words.numel() // SAMPLES)].cpu().numpy().tobytes()
    return f"{int(words.sum(dtype=torch.int64))} {digest(spread)}"


SIGNED = 24  # tensors in a signature


def signature(model: Any) -> dict[str, list[float]]:
    """Four values of each of some tensors of a model: the same in any floating-point type, but for rounding.

    Parts of adapters and quantised tensors are left out, so that the base of an adapted model is recognised.
    """
    tensors = {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in model.named_parameters()
        if tensor.is_floating_point() and tensor.numel() >= 64 and not tensor.is_meta and not name.startswith("foveate.")
    }
    chosen = sorted((name for name in tensors if "lora_" not in name), key=digest)[:SIGNED]
    return {name: _sampled(tensors[name].detach()) for name in chosen}


def _sampled(tensor: Tensor) -> list[float]:
    flat = tensor.flatten()
    return [round(value, 6) for value in flat[:: flat.numel() // 4][:4].float().tolist()]


def same_signature(one: dict[str, list[float]], other: dict[str, list[float]]) -> bool:
    """Whether two signatures are of the same weights, as far as they name the same tensors."""
    common = one.keys() & other.keys()
    return bool(common) and all(
        abs(a - b) <= 0.02 * max(abs(a), abs(b)) + 1e-4 for name in common for a, b in zip(one[name], other[name], strict=False)
    )
