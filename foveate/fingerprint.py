"""Answers that were given once, with what they cost: an interrupted run goes on from there and never mixes settings."""

from __future__ import annotations

import hashlib
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
    (offloaded ones) only shape and type count.
    """
    parts = [model.config.to_json_string(use_diff=False), str(getattr(model.config, "_commit_hash", None))]
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        bits = "" if tensor.is_meta else _bits(tensor.detach())
        parts.append(f"{name} {tuple(tensor.shape)} {tensor.dtype} {bits}")
    return digest(*parts)


def _bits(tensor: Tensor) -> str:
    flat = tensor.contiguous().flatten().view(torch.uint8)
    words = flat.view(torch.int16) if flat.numel() % 2 == 0 else flat
    spread = words[:: max(1, words.numel() // SAMPLES)].cpu().numpy().tobytes()
    return f"{int(words.sum(dtype=torch.int64))} {digest(spread)}"
