"""Shared by the benchmarks: interleaved timing, medians with spread, and a ledger that says where numbers come from."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from foveate.measuring.ledger import processor_name, versions
from foveate.measuring.noise import quartiles


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(call: Callable[[], Any]) -> float:
    """Seconds of one call."""
    synchronise()
    begin = time.perf_counter()
    call()
    synchronise()
    return time.perf_counter() - begin


def spent(call: Callable[[], Any]) -> float:
    """Seconds of the CPU that one call takes, whatever else the machine does."""
    begin = time.process_time()
    call()
    return time.process_time() - begin


def interleaved(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Times of each call, taken in turns so that a noisy machine is noisy for all; one round of warm-up is not counted."""
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(timed(call))
    return times


def summary(times: list[float]) -> dict[str, float]:
    """Median, quartiles and minimum in milliseconds."""
    low, middle, high = quartiles([1000 * t for t in times])
    return {"median_ms": middle, "q1_ms": low, "q3_ms": high, "min_ms": 1000 * min(times)}


def ratio(times: list[float], base: list[float]) -> float:
    """Median of the ratios of paired rounds: what both saw of the machine's noise cancels."""
    return statistics.median(a / b for a, b in zip(times, base, strict=True))


def _processor() -> str:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = processor_name(device)
    return name if device.type == "cuda" else f"{name}, {torch.get_num_threads()} threads"


def ledger(results: dict[str, Any]) -> dict[str, Any]:
    """Results with the command, versions and hardware they come from."""
    return {
        "command": " ".join(["python", *sys.argv]),
        "hardware": _processor(),
        "versions": versions(),
        "date": time.strftime("%Y-%m-%d"),
        **results,
    }


def save(results: dict[str, Any], path: Path | None) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(ledger(results), indent=1) + "\n")
        print(f"ledger: {path}")
