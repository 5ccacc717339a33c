"""What a model costs on a processor: operations, bytes and the time that they take at least, by operator."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from .architecture import Architecture
from .hardware import Hardware
from .operators import (
    Operator,
    Span,
    block_pairs,
    cached,
    embedding,
    head_operators,
    layer_embeddings,
    layer_operators,
    patch_operators,
    pooling_operators,
    projector_operators,
    prompt_span,
    step_span,
)
from .viewer import viewer_head, viewer_layer
from .workload import Workload

Phase = Literal["prefill", "decode"]
Part = Literal["vision tower", "method", "projector", "question", "decoder"]
PHASES: tuple[Phase, ...] = get_args(Phase)
PARTS: tuple[Part, ...] = get_args(Part)


@dataclass(frozen=True)
class CostLine:
    """One operator, summed over layers and steps.

    Attributes
    ----------
    phase, part, name : "prefill" or "decode"; part of the model; operator.
    bits : of the wider operand of a matrix product, None for others; what the peak is looked up by.
    flops, weights, loads, stores, cache_loads, cache_stores : operations and bytes, as in ``Operator``.
    compute, memory : seconds that arithmetic alone, and memory alone, would take.
    seconds : the longer of both for each run of the operator, summed.
    """

    phase: Phase
    part: Part
    name: str
    bits: float | None
    flops: float
    weights: float
    loads: float
    stores: float
    cache_loads: float
    cache_stores: float
    compute: float
    memory: float
    seconds: float

    @property
    def bytes(self) -> float:
        """Everything that is moved."""
        return self.weights + self.loads + self.stores + self.cache_loads + self.cache_stores

    @property
    def intensity(self) -> float:
        """Operations per byte."""
        return self.flops / self.bytes if self.bytes else 0.0

    @property
    def bound(self) -> str:
        """What it waits for: "compute" or "memory"."""
        return "compute" if self.compute > self.memory else "memory"


@dataclass(frozen=True)
class Cost:
    """What one generation costs; ``str(cost)`` is a summary, ``to_dict()`` is JSON-able.

    Attributes
    ----------
    model, hardware, work : what was priced.
    lines : the operators.
    weights : bytes of parameters that are held, by part.
    kv_cache : bytes of keys and values at the end, and of the states of layers that hold one.
    activations : bytes of the largest operator's inputs and outputs, and of the hidden states beside it.
    """

    model: str
    hardware: Hardware
    work: Workload
    lines: tuple[CostLine, ...]
    weights: dict[str, float]
    kv_cache: float
    activations: float

    def select(self, phase: Phase | None = None, part: Part | None = None) -> list[CostLine]:
        """Lines of a phase, a part, or both."""
        return [each for each in self.lines if phase in (None, each.phase) and part in (None, each.part)]

    def total(self, name: str, phase: Phase | None = None, part: Part | None = None) -> float:
        """The sum of a number of the lines, such as "flops", "bytes" or "seconds"."""
        return sum(getattr(line, name) for line in self.select(phase, part))

    @property
    def prefill_seconds(self) -> float:
        """Until the first new token: vision encoder, projector and prompt."""
        return self.total("seconds", "prefill")

    @property
    def decode_seconds(self) -> float:
        """For all new tokens but the first."""
        return self.total("seconds", "decode")

    @property
    def token_seconds(self) -> float:
        """For one new token, on average over the steps; 0 where there are none."""
        steps = self.work.new_tokens - 1
        return self.decode_seconds / steps if steps else 0.0

    @property
    def footprint(self) -> float:
        """Bytes that must be held at once: weights, cache and activations."""
        return sum(self.weights.values()) + self.kv_cache + self.activations

    def to_dict(self) -> dict[str, Any]:
        sums = ("flops", "bytes", "seconds")
        return {
            "model": self.model,
            "hardware": vars(self.hardware),
            "workload": self.work.to_dict(),
            "prefill_seconds": self.prefill_seconds,
            "decode_seconds": self.decode_seconds,
            "token_seconds": self.token_seconds,
            "parts": {
                phase: {part: {name: self.total(name, phase, part) for name in sums} for part in PARTS if self.select(phase, part)}
                for phase in PHASES
            },
            "memory": {
                "weights": self.weights,
                "kv_cache": self.kv_cache,
                "activations": self.activations,
                "footprint": self.footprint,
            },
            "operators": [{**vars(line), "bytes": line.bytes, "bound": line.bound} for line in self.lines],
        }

    def __str__(self) -> str:
        work, visual = self.work, self.work.run.visual
        mean = sum(visual) / len(visual)
        each = f"{visual[0]:g}" if len(set(visual)) == 1 else f"{visual[0]:g} to {visual[-1]:g}, {mean:.1f} on average,"
        parts = [f"{part} {1e3 * self.total('seconds', 'prefill', part):.2f} ms" for part in PARTS if self.select("prefill", part)]
        decode = f"; decode {1e3 * self.token_seconds:.2f} ms per token" if work.new_tokens > 1 else ""
        return (
            f"{self.model} on {self.hardware.name}: {each} visual + {work.text} text tokens, batch {work.run.batch}: "
            f"{self.total('flops', 'prefill') / 1e12:.3f} TFLOPs; prefill {1e3 * self.prefill_seconds:.2f} ms ({', '.join(parts)})"
            f"{decode}; memory {self.footprint / 1e9:.2f} GB, KV cache {self.kv_cache / 1e9:.3f} GB"
        )


Step = tuple[Phase, Part, Operator, int]


def _vision(shape: Architecture, work: Workload) -> Iterator[Step]:
    """The vision encoder on all pictures, and the projector. Pictures of several sizes count at their mean, pairs as well."""
    tower, run = shape.tower, work.run
    if tower is None or not run.pictures:
        return
    precision, stack, number = work.precision.unquantised, tower.stack, len(run.pictures)
    first = tower.prefix + sum(run.pictures) / number
    leaving: list[float] = [tower.prefix + patches for patches in run.encoder]
    leaving += [leaving[-1] if leaving else first] * (stack.layers - len(leaving))
    entering = [first, *leaving[:-1]]
    for operator in patch_operators(tower, number, first - tower.prefix, precision):
        yield "prefill", "vision tower", operator, 1
    for (before, after, layer), times in Counter(zip(entering, leaving, stack.each, strict=True)).items():
        sizes = [patches + tower.prefix for patches in run.pictures] if before == first else [before] * number
        pairs = sum(sizes) ** 2 if tower.packed and not work.fused else sum(block_pairs(size, layer.window) for size in sizes)
        span = Span(before, before, pairs / number)
        for operator in layer_operators(layer, number, span, after, precision, work.fused, to_cache=False):
            yield "prefill", "vision tower", operator, times
    for operator in pooling_operators(tower, number, leaving[-1], precision, work.fused):
        yield "prefill", "vision tower", operator, 1
    for projector in shape.projectors:
        every = projector.merge > 1 or (work.own is not None and work.own.projected)  # runs before any reduction
        rows = sum(run.pictures) / projector.merge if every else run.batch * run.visual[0]
        for operator in projector_operators(projector, rows, precision):
            yield "prefill", "projector", operator, 1


def _method(shape: Architecture, work: Workload) -> Iterator[Step]:
    """What the method itself does for each picture."""
    own, pictures = work.own, work.run.pictures
    if own is None or shape.tower is None or not pictures:
        return
    patches = shape.tower.prefix + sum(pictures) / len(pictures)
    for operator in own.operators(len(pictures), shape.tower.stack, patches, work.precision.unquantised, work.fused):
        yield "prefill", "method", operator, 1


def _question(shape: Architecture, work: Workload) -> Iterator[Step]:
    """The question of each prompt alone through the decoder, for methods that ask for its last state; nothing is cached."""
    decoder, precision, batch, tokens = shape.decoder, work.precision, work.run.batch, work.run.question
    if not tokens:
        return
    yield "prefill", "question", embedding(decoder, batch * tokens, precision), 1
    for operator in layer_embeddings(decoder, batch * tokens, precision):
        yield "prefill", "question", operator, 1
    for layer, times in Counter(decoder.stack.each).items():
        span = prompt_span(tokens, layer.window, decoder.causal, work.fused, layer.chunks)
        for operator in layer_operators(layer, batch, span, tokens, precision, work.fused, to_cache=False):
            yield "prefill", "question", operator, times


def _decoder(shape: Architecture, work: Workload) -> Iterator[Step]:
    """The prompt through the decoder, and then one token after the other."""
    decoder, precision, batch = shape.decoder, work.precision, work.run.batch
    layers = Counter(zip(work.tokens, decoder.stack.each, strict=True))
    yield "prefill", "decoder", embedding(decoder, batch * work.tokens[0], precision), 1
    for operator in layer_embeddings(decoder, batch * work.tokens[0], precision):
        yield "prefill", "decoder", operator, 1
    for (tokens, layer), times in layers.items():
        span = prompt_span(tokens, layer.window, decoder.causal, work.fused, layer.chunks)
        if layer.reads:
            span = Span(1, tokens, tokens)
        for operator in layer_operators(layer, batch, span, span.queries, precision, work.fused, to_cache=True):
            yield "prefill", "decoder", operator, times
    last = 1 if decoder.stack.each[-1].reads else work.tokens[-1]
    for operator in head_operators(decoder, batch, batch * last, precision):
        yield "prefill", "decoder", operator, 1
    steps = work.new_tokens - 1
    if not steps:
        return
    yield "decode", "decoder", embedding(decoder, batch, precision), steps
    for operator in layer_embeddings(decoder, batch, precision):
        yield "decode", "decoder", operator, steps
    for (tokens, layer), times in layers.items():
        spans = Counter(step_span(tokens + step, layer.window) for step in range(steps))
        for span, repeated in spans.items():
            for operator in layer_operators(layer, batch, span, 1, precision, work.fused, to_cache=True):
                yield "decode", "decoder", operator, times * repeated
    for operator in head_operators(decoder, batch, batch, precision):
        yield "decode", "decoder", operator, steps


def _viewer(shape: Architecture, work: Workload) -> Iterator[Step]:
    """The decoder by the conventions of LLM-Viewer."""
    decoder, precision = shape.decoder, work.precision
    for phase, steps in zip(PHASES, (1, work.new_tokens - 1), strict=True):
        decoding = phase == "decode"
        for tokens, times in Counter(work.tokens).items():
            for step in range(steps):
                for operator in viewer_layer(decoder, work.run.batch, tokens + step, precision, work.fused, decoding):
                    yield phase, "decoder", operator, times
        if steps:
            yield phase, "decoder", viewer_head(decoder, work.run.batch, precision), steps


def _priced(steps: Iterable[Step], hardware: Hardware) -> tuple[CostLine, ...]:
    """Operators with their times, those of one name added up."""
    moved = ("flops", "weights", "loads", "stores", "cache_loads", "cache_stores")
    sums: dict[tuple[Phase, Part, str, float | None], list[float]] = {}
    for phase, part, operator, times in steps:
        compute = operator.flops / hardware.peak(operator.bits)
        memory = operator.bytes / hardware.bandwidth
        numbers = [*(getattr(operator, name) for name in moved), compute, memory, max(compute, memory)]
        found = sums.setdefault((phase, part, operator.name, operator.bits), [0.0] * len(numbers))
        for place, number in enumerate(numbers):
            found[place] += times * number
    return tuple(CostLine(*key, *numbers) for key, numbers in sums.items())


def _memory(shape: Architecture, work: Workload, steps: Sequence[Step]) -> tuple[dict[str, float], float, float]:
    """Weights by part, cache, and activations, in bytes."""
    stack, precision, parameters = shape.decoder.stack, work.precision, shape.parameters
    prompt = [operator for phase, _, operator, _ in steps if phase == "prefill"]
    if work.convention == "llm-viewer":  # layers without norms, and all that one layer writes
        token = 2 * stack.width * stack.key_value_heads / stack.heads
        kept = work.run.batch * sum(work.tokens) * token * precision.cache / 8
        first = list(viewer_layer(shape.decoder, work.run.batch, max(work.tokens), precision, work.fused, decoding=False))
        weights = stack.layers * sum(operator.weights for operator in first)
        return {"decoder": weights}, kept, sum(operator.stores for operator in first)
    held = [
        layer.mixer.held
        if layer.mixer
        else 0
        if layer.reads
        else 2 * layer.keys * cached(tokens + work.new_tokens - 1, layer.window)
        for tokens, layer in zip(work.tokens, stack.each, strict=True)
    ]
    kept = work.run.batch * sum(held) * precision.cache / 8
    hidden = work.run.batch * max(work.tokens) * stack.width * precision.activation / 8
    matrices = parameters.pop("decoder matrices") * precision.weight / 8
    rest = {part.removesuffix(" rest"): number * precision.other / 8 for part, number in parameters.items() if number}
    return {**rest, "decoder": rest["decoder"] + matrices}, kept, hidden + max(each.loads + each.stores for each in prompt)


def price(shape: Architecture, work: Workload, hardware: Hardware) -> Cost:
    """The cost of a workload."""
    viewer = work.convention == "llm-viewer"
    ours = (_vision, _method, _question, _decoder)
    steps = list(_viewer(shape, work)) if viewer else [step for part in ours for step in part(shape, work)]
    weights, cache, activations = _memory(shape, work, steps)
    if work.own is not None and work.own.parameters:
        weights["method"] = work.own.weights
    return Cost(shape.name, hardware, work, _priced(steps, hardware), weights, cache, activations)


def expected(costs: Sequence[tuple[float, Cost]]) -> Cost:
    """The mean cost of runs of one model that differ in their visual tokens, each with its share."""
    first, found = costs[0][1], dict[tuple[Phase, Part, str, float | None], list[float]]()
    names = [name for name in vars(first.lines[0]) if name not in ("phase", "part", "name", "bits")]
    for share, each in costs:
        for line in each.lines:
            sums = found.setdefault((line.phase, line.part, line.name, line.bits), [0.0] * len(names))
            for place, name in enumerate(names):
                sums[place] += share * getattr(line, name)
    layers = zip(*([share * count for count in each.work.run.visual] for share, each in costs), strict=True)
    work = replace(first.work, run=replace(first.work.run, visual=tuple(map(sum, layers))))
    lines = tuple(CostLine(*key, *numbers) for key, numbers in found.items())
    cache = sum(share * each.kv_cache for share, each in costs)
    return Cost(first.model, first.hardware, work, lines, first.weights, cache, max(each.activations for _, each in costs))
