"""What happened in a call: counts, kept tokens, where dropped ones went, times, warnings."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .tokens import Reduction


class Clock:
    """Wall time of named parts in seconds; on a GPU by events, which are only waited for when somebody asks."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._spans: list[tuple[str, Any, Any]] = []
        self._open: dict[str, Any] = {}

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def start(self, name: str) -> None:
        self._open[name] = self._now()

    def stop(self, name: str) -> None:
        """End what ``start`` began; without a beginning nothing is recorded."""
        if name in self._open:
            self._spans.append((name, self._open.pop(name), self._now()))

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        self.start(name)
        try:
            yield
        finally:
            self.stop(name)

    def seconds(self) -> dict[str, float]:
        totals: dict[str, float] = {}
        for name, begin, end in self._spans:
            if self._cuda:
                end.synchronize()
                span = begin.elapsed_time(end) / 1000
            else:
                span = end - begin
            totals[name] = totals.get(name, 0.0) + span
        return totals


@dataclass(frozen=True)
class ImageReport:
    """One image.

    Attributes
    ----------
    row : its prompt in the batch.
    before, after : visual tokens in the prompt.
    grid : rows and columns of visual tokens.
    kept : grid cell of each output token, in output order.
    source : [rows * columns] the output token (index into ``kept``) that each cell went to, -1 = dropped.
    scores : [rows * columns] importance, where the method has one.
    threshold : the score from which tokens were kept, where the method has such a value.
    """

    row: int
    before: int
    after: int
    grid: tuple[int, int]
    kept: list[int]
    source: list[int]
    scores: list[float] | None
    threshold: float | None


@dataclass
class Report:
    """What the last call did; ``str(report)`` is a summary, ``to_dict()`` is JSON-able.

    Tensors stay on the device until somebody asks for ``images``.
    """

    method: dict[str, Any]
    decoder_layers: int
    clock: Clock
    rows: list[int] = field(default_factory=list)
    before: list[int] = field(default_factory=list)
    after: list[int] = field(default_factory=list)
    grid: tuple[int, int] = (0, 0)
    reduction: Reduction | None = None
    warnings: list[str] = field(default_factory=list)

    @property
    def images(self) -> list[ImageReport]:
        """One entry per image, in the order of the prompts."""
        reduction = self.reduction
        if reduction is None:
            return []
        cells = self.grid[0] * self.grid[1]
        sources, valid = reduction.source_map(cells).tolist(), reduction.mask()
        return [
            ImageReport(
                row=row,
                before=self.before[i],
                after=self.after[i],
                grid=self.grid,
                kept=reduction.index[i][valid[i]].tolist(),
                source=_renumbered(sources[i], valid[i]),
                scores=None if reduction.scores is None else reduction.scores[i].tolist(),
                threshold=None if reduction.threshold is None else float(reduction.threshold[i]),
            )
            for i, row in enumerate(self.rows)
        ]

    @property
    def layers(self) -> list[int]:
        """Visual tokens of the whole batch that each decoder layer processed."""
        return [sum(self.after)] * self.decoder_layers

    @property
    def seconds(self) -> dict[str, float]:
        """Time of vision, selection, prefill and decode, as far as they ran."""
        return self.clock.seconds()

    def to_dict(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "images": [vars(image) for image in self.images],
            "layers": self.layers,
            "seconds": self.seconds,
            "warnings": self.warnings,
        }

    def to_json(self, **options: Any) -> str:
        return json.dumps(self.to_dict(), **options)

    def __str__(self) -> str:
        name = self.method["name"]
        if not self.before:
            return f"{name}: no image in the last call"
        each = ", ".join(f"{b} -> {a}" for b, a in zip(self.before, self.after, strict=True))
        total = f" ({100 * sum(self.after) / sum(self.before):.1f} % kept)"
        times = ", ".join(f"{part} {1000 * span:.1f} ms" for part, span in self.seconds.items())
        noted = "".join(f"\nwarning: {warning}" for warning in self.warnings)
        return f"{name}: visual tokens {each}{total} in {self.decoder_layers} decoder layers; {times}{noted}"


def _renumbered(source: list[int], valid: Tensor) -> list[int]:
    """Output numbers without the invalid outputs."""
    number = (valid.cumsum(0) - 1).tolist()
    return [number[output] if output >= 0 else -1 for output in source]
