"""``foveate.cost``: what a model costs, from its config, with any number of visual tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast, get_args

from ..errors import InputError
from ..methods.base import EncoderReducer, FrontReducer, Method, ProjectorReducer
from ..methods.registry import get
from .architecture import Architecture
from .configs import read_architecture
from .hardware import Hardware, get_hardware
from .operators import Precision
from .own import bound, own_cost, shape_of
from .roofline import Cost, expected, price
from .workload import Convention, Run, Workload, asked_for, reported, whole_number

BITS = {"float32": 32, "float16": 16, "bfloat16": 16}
LONGEST = 100_000  # tokens of an answer, each of which is a step of its own
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
    question: int | None = None,
    method: str | Method | None = None,
    exits: Mapping[int, float] | None = None,
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
    question : tokens of a prompt that the decoder reads alone before the prompt, for methods that ask for that (``quecc``); of
        these it is ``text`` by default.
    method : counts what the method itself does, too: its matrix products before the decoder, and its weights. Without ``visual``
        the run has the tokens that it leaves, where that does not depend on the picture.
    exits : shares of prompts by the decoder layer before which all of their visual tokens leave (``dyvte``); prompts that are in
        no share keep them. The cost is the mean.

    Raises
    ------
    InputError : a number is out of range, or the report does not belong to the model.
    UnsupportedModelError : a part of the model is of a kind whose cost is not known.
    """
    if exits is not None:
        return _expected(exits, {name: value for name, value in locals().items() if name != "exits"})
    shape = read_architecture(model)
    acting = None if method is None else bound(get(method) if isinstance(method, str) else method, shape)
    if convention not in get_args(Convention):
        raise InputError(f"unknown convention {convention!r}; choose {' or '.join(get_args(Convention))}")
    stack = shape.decoder.stack
    if convention == "llm-viewer" and (stack.experts or stack.mixer or stack.own):
        raise InputError("the tool behind convention='llm-viewer' knows no experts and no layers of several kinds. Leave it out.")
    if report is None:
        run = asked_for(shape, visual, batch, pictures, patches, question)
        if acting is not None and run.pictures:
            run = _left(shape, acting, run, TEXT if text is None else text, visual is None, question is None)
    else:
        if visual is not None or question is not None:
            raise InputError("a report brings its own visual tokens and question. Leave out visual= and question=.")
        if text is None:
            raise InputError(
                "a report does not hold the number of text tokens. Give text=, the length of the prompt without pictures."
            )
        run = reported(shape, report, batch, pictures, patches)
    work = Workload(
        run=run,
        text=whole_number("text", TEXT if text is None else text, 0),
        new_tokens=whole_number("new_tokens", new_tokens, 1, LONGEST),
        precision=_precision(dtype, weight_bits, activation_bits, kv_bits),
        fused=flash,
        convention=cast("Convention", convention),
        own=own_cost(acting, shape, _tokens(shape, run)) if acting is not None and run.pictures else None,
    )
    if min(work.tokens) <= 0:
        raise InputError("there is a layer without tokens: visual and text are both 0. Give at least one of them.")
    return price(shape, work, get_hardware(hardware))


def _tokens(shape: Architecture, run: Run) -> int:
    """Visual tokens of a picture before any reduction, the largest where there are several sizes."""
    return max(run.pictures) // (shape.projectors[0].merge if shape.projectors else 1)


def _left(shape: Architecture, method: Method, run: Run, text: int, counts: bool, question: bool) -> Run:
    """A run with the tokens that a method leaves and the question that it reads, where these were not given.

    Raises
    ------
    InputError : how many tokens it leaves depends on the picture.
    """
    front, total, pictures = method.before_decoder(), _tokens(shape, run), len(run.pictures) // run.batch
    if counts:
        each = method.layer_tokens(total, shape.decoder.stack.layers)
        if each is None:
            raise InputError(f"how many tokens {method.name} leaves depends on the picture. Give visual=, as you have measured it.")
        run = replace(run, visual=tuple(pictures * count for count in each))
    if not front.covers(total):
        run = _seen(shape, front, run)
    return replace(run, question=text) if question and front.reads_question_state and not front.keeps_all else run


def _seen(shape: Architecture, front: FrontReducer, run: Run) -> Run:
    """The run with what the vision encoder sees, where a method makes pictures smaller or acts inside it."""
    sizes = shape_of(shape)
    if sizes.grid is None:
        return run
    patches = sizes.grid[0] * sizes.grid[1]
    smaller = front.picture(sizes.grid) if isinstance(front, ProjectorReducer) else None
    if smaller is not None:
        return replace(run, pictures=(smaller[0] * smaller[1],) * len(run.pictures))
    if not isinstance(front, EncoderReducer):
        return run
    left, plan = [patches], front.plan(1 + (sizes.feature_layer or 0), patches)
    for layer in range(max(plan, default=-1) + 1):
        left.append(min(left[-1], plan.get(layer, patches)))
    return replace(run, encoder=tuple(left[1:]))


def _expected(exits: Mapping[int, float], options: dict[str, Any]) -> Cost:
    """The mean over prompts that lose their visual tokens before different layers.

    Raises
    ------
    InputError : the exits are no shares of prompts by decoder layers, or the run has other numbers of its own.
    """
    if not isinstance(options["visual"], int | None) or options["report"] is not None:
        raise InputError("exits say what the decoder layers run. Leave out the numbers of layers, or the report.")
    whole = cost(**options)
    layers, count = len(whole.work.run.visual), whole.work.run.visual[0]
    wrong = [layer for layer in exits if isinstance(layer, bool) or not isinstance(layer, int) or not 1 <= layer < layers]
    if wrong or any(not 0 <= share <= 1 for share in exits.values()) or sum(exits.values()) > 1 + 1e-9:
        raise InputError(
            f"exits={dict(exits)}; expected shares of prompts, together at most 1, by the layer, from 1 to {layers - 1}, before "
            "which visual tokens leave"
        )
    runs = [(share, {**options, "visual": [count] * layer + [0.0] * (layers - layer)}) for layer, share in exits.items()]
    return expected([(1 - sum(exits.values()), whole), *((share, cost(**run)) for share, run in runs)])


def _precision(dtype: str, weight: float | None, activation: float | None, cache: float | None) -> Precision:
    if dtype not in BITS:
        raise InputError(f"unknown dtype {dtype!r}; choose {', '.join(BITS)}")
    whole = BITS[dtype]
    for name, bits in (("weight_bits", weight), ("activation_bits", activation), ("kv_bits", cache)):
        if bits is not None and not (math.isfinite(bits) and 0 < bits <= whole):
            raise InputError(f"{name}={bits}; expected more than 0 and at most {whole}, the bits of {dtype}")
    weight, activation, cache = (whole if bits is None else bits for bits in (weight, activation, cache))
    return Precision(weight, activation, cache, whole)
