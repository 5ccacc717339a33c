"""What a method could save at best: the roofline of this machine, for the very tokens that a run had."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ..analysis.cost import BITS, cost
from ..analysis.flops import prefill_flops
from ..analysis.hardware import Hardware
from ..analysis.roofline import Cost
from ..engine.model.anatomy import Anatomy
from ..errors import FoveateError
from ..methods.base import Method, ProjectorReducer
from ..report import Report

LEAST = 0.2  # seconds that a micro-benchmark is repeated for
SIDE = {"cpu": 1024, "cuda": 8192}  # of the square matrices that are multiplied
COPIED = {"cpu": 2**28, "cuda": 2**31}  # bytes that are copied: more than caches hold


@dataclass(frozen=True)
class Ideal:
    """The least time of a reduced run over that of the unreduced one.

    Attributes
    ----------
    by : "roofline", "FLOPs" (of the decoder's prefill, added up over its layers) or "nothing".
    ratios : by the names of ``runs.PARTS``, as far as they are known.
    reason : why it is not the roofline.
    """

    by: str
    ratios: dict[str, float] = field(default_factory=dict)
    reason: str = ""


def best_time(call: Callable[[], Any], device: torch.device, least: float = LEAST) -> float:
    """Seconds of the fastest of the calls that fit into ``least`` seconds, after one that is not counted."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    call()
    wait()
    best, start = math.inf, time.perf_counter()
    while best == math.inf or time.perf_counter() - start < least:
        begin = time.perf_counter()
        call()
        wait()
        best = min(best, time.perf_counter() - begin)
    return best


def this_machine(device: torch.device, dtype: torch.dtype, least: float = LEAST) -> Hardware:
    """What the device does: the rate of a square matrix product in float32 and in ``dtype``, and of a copy in memory."""
    side, size = SIDE[device.type], COPIED[device.type]

    def product(kind: torch.dtype) -> float:
        a, b = (torch.randn(side, side, device=device).to(kind) for _ in range(2))
        out = torch.empty_like(a)
        return 2 * side**3 / best_time(lambda: torch.mm(a, b, out=out), device, least)

    single = product(torch.float32)
    half = product(dtype) if dtype.itemsize == 2 else single
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    bandwidth = 2 * size / best_time(lambda: target.copy_(source), device, least)
    return Hardware("this machine, measured", bandwidth, half, single)


def ideal_ratios(
    parts: Anatomy, method: Method, report: Report, *, text: int, pictures: int | None, new_tokens: int, hardware: Hardware
) -> Ideal:
    """What the roofline promises for a run.

    Where it does not know the model, layer-weighted FLOPs of the decoder's prefill take its place, and ``reason`` says why.

    Parameters
    ----------
    parts : of the model that ran.
    method : that ran.
    report : of the run.
    text : tokens of a prompt that are not visual.
    pictures : of a prompt, tiles and frames counted apart; None = as the report counts them.
    new_tokens : that were generated.
    hardware : of the machine.
    """
    depth = parts.decoder_layers
    if any(reducer.pattern(depth) is not None for reducer in method.inside_decoder()):
        return Ideal("nothing", reason=f"{method.name} saves work on tokens that stay, which neither roofline nor FLOPs count")
    model, whole = parts.model, [sum(report.before)] * depth
    dtype = str(model.dtype).removeprefix("torch.")
    try:
        if dtype not in BITS:
            raise FoveateError(f"no roofline for {dtype}")
        document = report.to_dict()
        options: dict[str, Any] = {
            "hardware": hardware,
            "text": text,
            "pictures": pictures,
            "new_tokens": new_tokens,
            "dtype": dtype,
            "flash": model.config._attn_implementation != "eager",
        }
        full = cost(model, report={**document, "layers": whole, "encoder_layers": []}, **options)
        reduced = cost(model, report=document, patches=_fewer_patches(parts, method, report), **options)
    except FoveateError as error:
        rows = 1 + max(report.rows, default=0)
        flops = [prefill_flops(model.config, [text + count // rows for count in counts]) for counts in (report.layers, whole)]
        return Ideal("FLOPs", {"prefill": flops[0] / flops[1]}, str(error))
    least, most = _by_part(reduced), _by_part(full)
    return Ideal("roofline", {part: least[part] / most[part] for part in least if most[part] > 0})


def _by_part(each: Cost) -> dict[str, float]:
    """Seconds of the parts that are timed."""
    vision = each.total("seconds", "prefill", "vision tower") + each.total("seconds", "prefill", "projector")
    return {
        "vision": vision,
        "prefill": each.total("seconds", "prefill", "decoder"),
        "decode": each.token_seconds,
        "first token": each.prefill_seconds,
        "end to end": each.prefill_seconds + each.decode_seconds,
    }


def _fewer_patches(parts: Anatomy, method: Method, report: Report) -> int | None:
    """Patches of a picture that was shrunk before the encoder, None where none was."""
    front = method.before_decoder()
    if not isinstance(front, ProjectorReducer) or front.keeps_all or not report.images:
        return None
    smaller = front.picture(report.images[0].grid)
    shrinks = parts.arrangement == "grid" and parts.projector is not None and parts.takes_any_size
    return math.prod(smaller) if smaller is not None and shrinks else None
