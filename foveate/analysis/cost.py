"""``foveate.cost``: what a model costs, from its config, with any number of visual tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast, get_args

from ..errors import InputError
from .configs import read_architecture
from .hardware import Hardware, get_hardware
from .operators import Precision
from .roofline import Cost, price
from .workload import Convention, Workload, asked_for, reported, whole_number

BITS = {"float32": 32, "float16": 16, "bfloat16": 16}
TEXT = 40  # as in the LLaVA-PruMerge paper


def cost(
    model: Any = "llava-1.5-7b",
    *,
    hardware: str | Hardware = "a100",
    visual: int | Sequence[float] | None = None,
    text: int | None = None,
    batch: int | None = None,
    new_tokens: int = 64,
    pictures: int | None = None,
    patches: int | None = None,
    dtype: str = "float16",
    weight_bits: float | None = None,
    activation_bits: float | None = None,
    kv_bits: float | None = None,
    flash: bool = True,
    convention: str = "foveate",
    report: Any = None,
) -> Cost:
    """Operations, bytes and the least time of a generation, by operator, from the roofline of a processor.

    Parameters
    ----------
    model : a model, its config, a Hub id, a folder, or a config file; "llava-1.5-7b" and "llava-1.5-13b" need no network. No
        weights are read.
    hardware : a name of ``foveate.analysis.hardware.HARDWARE``, or a ``Hardware``.
    visual : visual tokens of a prompt; one number for each decoder layer where they differ. Default: all that the pictures become.
    text : other tokens of a prompt, 40 by default.
    batch, new_tokens : prompts (1 by default), and tokens generated for each.
    pictures : pictures, tiles or frames of a prompt, each of which goes through the vision encoder. Default: 1, or 0 where
        ``visual`` is 0.
    patches : of each of them. Needed where the encoder takes any size; else that of its full size by default.
    dtype : "float16", "bfloat16" or "float32".
    weight_bits, activation_bits, kv_bits : of the matrices inside the decoder's layers, of its activations and of its cache, where
        they differ from ``dtype``.
    flash : fused attention instead of one that writes its scores.
    convention : "foveate", or "llm-viewer" for the formulas behind Table 2 of LLaVA-PruMerge (decoder only).
    report : ``session.report``, or its JSON, instead of ``visual``: prices that very run. It does not hold the text: give ``text``,
        too, and ``batch`` where prompts without pictures come last. A batch counts at the mean of its prompts, without padding.

    Raises
    ------
    InputError : a number is out of range, or the report does not belong to the model.
    UnsupportedModelError : a part of the model is of a kind whose cost is not known.
    """
    shape = read_architecture(model)
    if convention not in get_args(Convention):
        raise InputError(f"unknown convention {convention!r}; choose {' or '.join(get_args(Convention))}")
    if report is None:
        run = asked_for(shape, visual, batch, pictures, patches)
    else:
        if visual is not None:
            raise InputError("a report brings its own visual tokens. Leave out visual=.")
        if text is None:
            raise InputError(
                "a report does not hold the number of text tokens. Give text=, the length of the prompt without pictures."
            )
        run = reported(shape, report, batch, pictures, patches)
    work = Workload(
        run=run,
        text=whole_number("text", TEXT if text is None else text, 0),
        new_tokens=whole_number("new_tokens", new_tokens, 1),
        precision=_precision(dtype, weight_bits, activation_bits, kv_bits),
        fused=flash,
        convention=cast("Convention", convention),
    )
    if min(work.tokens) <= 0:
        raise InputError("there is a layer without tokens: visual and text are both 0. Give at least one of them.")
    return price(shape, work, get_hardware(hardware))


def _precision(dtype: str, weight: float | None, activation: float | None, cache: float | None) -> Precision:
    if dtype not in BITS:
        raise InputError(f"unknown dtype {dtype!r}; choose {', '.join(BITS)}")
    whole = BITS[dtype]
    for name, bits in (("weight_bits", weight), ("activation_bits", activation), ("kv_bits", cache)):
        if bits is not None and not (math.isfinite(bits) and 0 < bits <= whole):
            raise InputError(f"{name}={bits}; expected more than 0 and at most {whole}, the bits of {dtype}")
    weight, activation, cache = (whole if bits is None else bits for bits in (weight, activation, cache))
    return Precision(weight, activation, cache, whole)
