"""Table 2 of LLaVA-PruMerge, recomputed by the formulas of the tool that made it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from .configs import read_architecture
from .cost import cost
from .hardware import get_hardware
from .operators import Precision
from .roofline import Cost, price
from .workload import Run, Workload

FULL, REDUCED = 700, 70  # tokens of the prompts that give the printed numbers
TEXT, KEPT = 40, 40  # what the paper's text describes beside 576 visual tokens
VOCABULARY = 32000  # of Vicuna
COLUMNS = {
    "flops": "FLOPs (TB)",
    "milliseconds": "Prefill time (ms)",
    "traffic": "Total memory (GB)",
    "stores": "Storing act. (GB)",
}


@dataclass(frozen=True)
class PaperRow:
    """A line of the paper's table; ``printed`` digit by digit, in the order of ``COLUMNS``."""

    backbone: str
    bits: int
    reduced: bool
    printed: tuple[str, str, str, str]

    @property
    def tokens(self) -> int:
        return REDUCED if self.reduced else FULL

    @property
    def method(self) -> str:
        return "LLaVA-1.5 w/ PruMerge" if self.reduced else "LLaVA-1.5"

    @property
    def quantization(self) -> str:
        return "FP16" if self.bits == 16 else "INT4"


ROWS = (
    PaperRow("7B", 16, False, ("9.3", "88.6", "23.3", "4.60")),
    PaperRow("7B", 16, True, ("0.91", "15.3", "13.7", "0.28")),
    PaperRow("7B", 4, False, ("2.3", "151.6", "5.9", "1.20")),
    PaperRow("7B", 4, True, ("0.28", "14.9", "3.5", "0.07")),
    PaperRow("13B", 16, False, ("18.2", "170.5", "41.6", "7.30")),
    PaperRow("13B", 16, True, ("1.80", "29.5", "26.6", "0.44")),
    PaperRow("13B", 4, False, ("4.6", "294.9", "10.5", "1.80")),
    PaperRow("13B", 4, True, ("0.45", "29.0", "6.8", "0.11")),
)


def viewed(backbone: str, bits: int, tokens: int) -> Cost:
    """The prefill of Vicuna by LLM-Viewer: V100, batch 1, unfused attention, all of weights, activations, cache in ``bits``."""
    shape = read_architecture(f"llava-1.5-{backbone.lower()}")
    shape = replace(shape, decoder=replace(shape.decoder, vocabulary=VOCABULARY))
    run = Run((tokens,) * shape.decoder.stack.layers, 1, ())
    work = Workload(run, 0, 1, Precision(bits, bits, bits), fused=False, convention="llm-viewer")
    return price(shape, work, get_hardware("v100-llm-viewer"))


def recomputed(row: PaperRow) -> tuple[float, float, float, float]:
    """The cells of a row; the paper divides the operations of INT4 by 4, LLM-Viewer does not."""
    found = viewed(row.backbone, row.bits, row.tokens)
    flops = found.total("flops") / 1e12 * row.bits / 16
    return flops, 1e3 * found.prefill_seconds, found.total("bytes") / 1e9, found.total("stores") / 1e9


def table2() -> dict[str, Any]:
    """The table, JSON-able: per row what the paper prints, what we get, and the difference in percent; and what must be said."""
    rows = []
    for row in ROWS:
        cells = dict(zip(COLUMNS, zip(map(float, row.printed), recomputed(row), strict=True), strict=True))
        rows.append(
            {
                "method": row.method,
                "backbone": f"Vicuna-{row.backbone}",
                "quantization": row.quantization,
                "tokens": row.tokens,
                "paper": {name: printed for name, (printed, _) in cells.items()},
                "ours": {name: ours for name, (_, ours) in cells.items()},
                "difference_percent": {name: 100 * (ours / printed - 1) for name, (printed, ours) in cells.items()},
            }
        )
    return {"table": 2, "rows": rows, "explanation": explanation()}


def explanation() -> str:
    """What the numbers stand for, in one paragraph; every figure is computed."""
    full, reduced = (viewed("7B", 16, tokens) for tokens in (FULL, REDUCED))
    long, short = (viewed("7B", 16, visual + TEXT) for visual in (576, KEPT))
    options: dict[str, Any] = {"hardware": "v100", "text": TEXT, "new_tokens": 1}
    before, after = (cost("llava-1.5-7b", visual=visual, **options) for visual in (576, KEPT))
    saved, held = before.footprint - after.footprint, sum(before.weights.values())

    def ms(run: Cost) -> str:
        return f"{1e3 * run.prefill_seconds:.1f}"

    def gb(size: float) -> str:
        return f"{size / 1e9:.2f} GB"

    def times(first: Cost, second: Cost, name: str = "seconds") -> str:
        return f"{first.total(name) / second.total(name):.1f}x"

    encoder = 1e3 * before.total("seconds", "prefill", "vision tower")
    traffic = full.total("bytes") - reduced.total("bytes")
    return (
        f"The text of the paper describes 576 + {TEXT} tokens against {KEPT} + {TEXT}. The printed numbers are those of LLM-Viewer "
        f"(as of early March 2024; V100, batch 1, no flash attention; INT4: weights, activations and cache in 4 bits, at the INT8 "
        f"peak, FLOPs divided by 4) for {FULL} against {REDUCED} tokens: {ms(full)} and {ms(reduced)} ms, {times(full, reduced)}. "
        f"For the lengths in the text the same formulas give {ms(long)} and {ms(short)} ms: {times(long, short)}, not "
        f"{times(full, reduced)}, and {times(long, short, 'flops')} fewer operations, not {times(full, reduced, 'flops')}. "
        "One cell is a slip: the other INT4 cells are a quarter of the FP16 ones, but 0.28 TB is not a quarter of 0.91; 0.23 is. "
        '"Total memory" is traffic, all bytes that the prefill reads and writes, not what must be held: '
        f"the table saves {gb(traffic)} of it. What must be held, by our own model with the vision encoder, is "
        f"{gb(before.footprint)} with 576 visual tokens (weights {gb(held)}, cache {gb(before.kv_cache)}) and "
        f"{gb(after.footprint)} with {KEPT}: the footprint falls by {gb(saved)}, {saved / before.footprint:.0%}. "
        f"The table leaves the vision encoder out, which takes {encoder:.1f} ms on either side."
    )
