"""Methods beside the unreduced model: interleaved rounds, and what they say."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random
from typing import Any

import torch

from ..analysis.hardware import Hardware
from ..errors import InputError
from ..methods.base import Method
from .ideal import Ideal, ideal_ratios
from .noise import Ratio, paired, quartiles
from .runs import PARTS, Inspected, Sample, TimedRunner

UNREDUCED = "unreduced"
WARM_UP = 2  # runs of each that are not timed; the first of them is inspected
Tell = Callable[[str, int, int], None]  # what runs, runs done, runs in all


@dataclass(frozen=True)
class Variant:
    """One way of running a model, and what was measured of it.

    Attributes
    ----------
    name, method : a method; None is the model as it is.
    prompt : tokens of a prompt before any reduction, text and placeholders.
    visual : visual tokens of the batch that each decoder layer runs.
    inspected : cache and report.
    samples : one for each round.
    ideal : what it could be at best, beside the unreduced model.
    """

    name: str
    method: Method | None
    prompt: int
    visual: list[int]
    inspected: Inspected
    samples: list[Sample]
    ideal: Ideal | None

    def seconds(self, part: str) -> list[float]:
        """Of a part, round by round; empty where it does not run."""
        return [sample.seconds[part] for sample in self.samples if part in sample.seconds]

    @property
    def parts(self) -> list[str]:
        """That were timed in every round."""
        return [part for part in PARTS if len(self.seconds(part)) == len(self.samples)]

    @property
    def cache(self) -> int:
        """Bytes of keys and values after the last token."""
        return sum(self.inspected.cache)

    @property
    def peak(self) -> int | None:
        """Bytes allocated on the GPU at the peak of any round; None on a CPU."""
        peaks = [sample.peak for sample in self.samples if sample.peak is not None]
        return max(peaks, default=None)

    def against(self, base: Variant) -> dict[str, Ratio]:
        """Its time over that of the unreduced model, by part."""
        both = {part: paired(self.seconds(part), base.seconds(part)) for part in self.parts if part in base.parts}
        return {part: ratio for part, ratio in both.items() if ratio is not None}


@dataclass(frozen=True)
class Measured:
    """Everything about one batch size. The first variant is the unreduced model.

    Attributes
    ----------
    batch : prompts.
    variants : ways of running.
    orders : in which they ran, for each round.
    """

    batch: int
    variants: list[Variant]
    orders: list[list[str]]

    @property
    def base(self) -> Variant:
        return self.variants[0]

    @property
    def methods(self) -> list[Variant]:
        return self.variants[1:]

    def to_dict(self) -> dict[str, Any]:
        return {"batch": self.batch, "orders": self.orders, "variants": [self._document(variant) for variant in self.variants]}

    def _document(self, variant: Variant) -> dict[str, Any]:
        found: dict[str, Any] = {
            "name": variant.name,
            "method": None if variant.method is None else variant.method.settings(),
            "prompt_tokens": variant.prompt,
            "visual_tokens": variant.visual,
            "seconds": {part: _spread(variant.seconds(part)) for part in variant.parts},
            "rounds": {part: variant.seconds(part) for part in variant.parts},
            "kv_cache_bytes": {"total": variant.cache, "layers": variant.inspected.cache},
            "peak_memory_bytes": variant.peak,
        }
        if variant.ideal is None:
            return found
        ratios, ideal = variant.against(self.base), variant.ideal
        return found | {
            "kv_cache_ratio": variant.cache / self.base.cache,
            "ideal": {"by": ideal.by, "reason": ideal.reason, "ratios": ideal.ratios},
            "against_unreduced": {
                part: {
                    "ratio": ratio.median,
                    "interval": ratio.interval,
                    "verdict": ratio.verdict,
                    "ideal": ideal.ratios.get(part),
                    "realised": ratio.realised(ideal.ratios.get(part)),
                }
                for part, ratio in ratios.items()
            },
        }


def _spread(times: list[float]) -> dict[str, float]:
    low, middle, high = quartiles(times)
    return {"median": middle, "q1": low, "q3": high, "min": min(times)}


def measure(
    model: Any,
    inputs: Mapping[str, Any],
    methods: Mapping[str, Method],
    *,
    hardware: Hardware,
    rounds: int = 7,
    new_tokens: int = 32,
    seed: int = 0,
    tell: Tell | None = None,
) -> Measured:
    """Time methods and the unreduced model in the same rounds, each round in another order.

    Parameters
    ----------
    model : of a supported family, without a method attached, all of it on one device.
    inputs : of ``generate``: what the processor returned for one prompt or several.
    methods : by the names they get in the result.
    hardware : what the roofline is of, such as ``ideal.this_machine(...)``.
    rounds : of timed runs, after two of warm-up. From 6 on there are intervals.
    new_tokens : generated for each prompt, 2 or more.
    seed : of the orders.
    tell : is told what runs.

    Raises
    ------
    InputError : there is no picture, a method is attached, a number is too small, or a method cannot do this prompt.
    UnsupportedModelError : the model is not supported, or lacks what a method needs.
    """
    if rounds < 1:
        raise InputError(f"rounds={rounds}; expected 1 or more, and 6 for an interval")
    if not methods or UNREDUCED in methods:
        raise InputError(f"methods must hold at least one method, none of them called {UNREDUCED!r}")
    run, random = TimedRunner(model, inputs, new_tokens), Random(seed)
    ways: dict[str, Method | None] = {UNREDUCED: None, **methods}
    done, total = 0, len(ways) * (WARM_UP + rounds)

    def said(what: str, name: str) -> Method | None:
        nonlocal done
        if tell is not None:
            tell(f"{name}: {what}", done, total)
        done += 1
        return ways[name]

    inspected = {name: run.inspect(said("warm-up", name)) for name in ways}
    for name in ways:
        for _ in range(WARM_UP - 1):
            run(said("warm-up", name))
    samples: dict[str, list[Sample]] = {name: [] for name in ways}
    orders = []
    for number in range(rounds):
        order = [*ways]
        random.shuffle(order)
        orders.append(order)
        with _without_collector():
            for name in order:
                samples[name].append(run(said(f"round {number + 1} of {rounds}", name)))
    ids = run.inputs["input_ids"]
    mask = run.inputs.get("attention_mask", torch.ones_like(ids))
    prompt, before = round(int(mask.sum()) / len(ids)), int(run.parts.visual(ids).sum())
    each, rest = divmod(inspected[UNREDUCED].pictures, len(ids))
    workload: dict[str, Any] = {
        "text": prompt - round(before / len(ids)),
        "pictures": each if each and not rest else None,
        "new_tokens": new_tokens,
        "hardware": hardware,
    }
    variants = []
    for name, method in ways.items():
        report = inspected[name].report
        ideal = None if method is None or report is None else ideal_ratios(run.parts, method, report, **workload)
        visual = [before] * run.parts.decoder_layers if report is None else report.layers
        variants.append(Variant(name, method, prompt, visual, inspected[name], samples[name], ideal))
    return Measured(len(ids), variants, orders)


@contextmanager
def _without_collector() -> Iterator[None]:
    """Python's garbage collector would stop some runs and not others."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
