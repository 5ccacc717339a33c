"""Which precision a machine computes in at full speed."""

from __future__ import annotations

import functools
from pathlib import Path

import torch

CPUINFO = Path("/proc/cpuinfo")
BF16_UNITS = {"avx512_bf16", "amx_bf16", "bf16"}  # flags of x86 and Arm processors


@functools.cache
def has_bfloat16(kind: str = "cpu") -> bool:
    """Whether devices of a kind multiply bfloat16 matrices in hardware; without units they take 4 to 180 times as long.

    Parameters
    ----------
    kind : "cpu" or "cuda"; others are taken to have them.
    """
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if kind != "cpu":
        return True
    try:
        lines = CPUINFO.read_text().splitlines()
    except OSError:  # not Linux; Apple's processors have them from M2 on, and do not say so here
        return False
    flags = next((line.partition(":")[2] for line in lines if line.lower().startswith(("flags", "features"))), "")
    return bool(BF16_UNITS & set(flags.split()))
