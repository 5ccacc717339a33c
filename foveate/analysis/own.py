"""What a method costs by itself: choosing and merging before the decoder, and the weights of trained methods."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..errors import InputError
from ..methods.base import Method, ProjectorReducer
from ..methods.trained import Host, ModelShape, Trained
from ..tokens import EncoderTap, Question, VisualTokens
from .architecture import Architecture, Stack
from .operators import Operator, Precision, Span, layer_operators

WORD = 4  # bytes of a number: methods compute in float32
ASKED = 32  # tokens of a question, where a method reads it


@dataclass(frozen=True)
class Own:
    """What a method does for one picture.

    Attributes
    ----------
    name : of the method.
    flops : of its matrix products and attention; 2 for each weight of what is asked once for each prompt, such as a gate.
    parameters : of its weights, which are float32.
    loads, stores : values that it reads and that it makes.
    beside, layers : its tokens that run through the vision encoder beside the patches, and through how many of its layers.
    projected : whether it reads all tokens after the projector.
    """

    name: str
    flops: float
    parameters: int
    loads: int
    stores: int
    beside: int = 0
    layers: int = 0
    projected: bool = False

    @property
    def weights(self) -> int:
        """Bytes of its weights."""
        return WORD * self.parameters

    def operators(self, pictures: int, stack: Stack, patches: float, precision: Precision, fused: bool) -> Iterator[Operator]:
        """Of a number of pictures."""
        loads, stores = (pictures * WORD * values for values in (self.loads, self.stores))
        yield Operator(self.name, pictures * self.flops, self.weights, loads, stores, bits=8 * WORD)
        if self.beside:
            span = Span(self.beside, patches + self.beside, self.beside * (patches + self.beside))
            for operator in layer_operators(stack, pictures, span, self.beside, precision, fused, to_cache=False):
                yield from [replace(operator, name=f"{self.name}: {operator.name}")] * self.layers


def shape_of(shape: Architecture) -> ModelShape:
    """The sizes that the weights of a method depend on; features are taken to be those of the last layer but one.

    Raises
    ------
    InputError : the model has no vision encoder.
    """
    tower, decoder = shape.tower, shape.decoder.stack
    if tower is None:
        raise InputError(f"{shape.name} has no vision encoder, so that no method can act before its decoder.")
    merged = bool(shape.projectors) and shape.projectors[0].merge > 1
    side = 0 if tower.patches is None else math.isqrt(tower.patches)
    return ModelShape(
        model_type=shape.name,
        features=decoder.width if merged else tower.stack.width,
        width=decoder.width,
        encoder_width=tower.stack.width,
        encoder_heads=tower.stack.heads,
        encoder_layers=tower.stack.layers,
        feature_layer=max(0, tower.stack.layers - 2),
        decoder_layers=decoder.layers,
        grid=(side, side) if side and side * side == tower.patches else None,
    )


class _Beside:
    """Lets tokens through as they are, and counts them."""

    def __init__(self, patches: Tensor) -> None:
        self.patches, self.tokens = patches, 0

    def __call__(self, tokens: Tensor) -> Tensor:
        self.tokens = tokens.shape[1]
        return tokens


def bound(method: Method, shape: Architecture) -> Method:
    """A method that is ready for a model of these sizes; where it has no weights, with random ones, which cost the same.

    Raises
    ------
    InputError : it cannot act on such a model.
    """
    if isinstance(method, Trained) and method.weights is None:
        method = method.fresh()
    for part in method.trained():
        part.bind(Host(shape_of(shape), torch.device("cpu"), dict))
    return method


@torch.no_grad()
def own_cost(method: Method, shape: Architecture, tokens: int) -> Own:
    """What a method does by itself, found by letting it act once on random numbers of the sizes of the model.

    Parameters
    ----------
    method : ready for the model (``bound``): its part before the decoder, and gates inside. What it does inside the vision encoder
        is not counted.
    shape : of the model.
    tokens : visual tokens of a picture before any reduction.
    """
    parts = method.trained()
    front, parameters = method.before_decoder(), sum(each.numel() for part in parts for each in part.module.parameters())
    if not isinstance(front, ProjectorReducer) or front.covers(tokens):
        return Own(method.name, 2.0 * parameters, parameters, 0, 0)
    sizes = shape_of(shape)
    given = _tokens(front, sizes, shape, tokens)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # the fused one is not counted on a CPU
        reduction = front.reduce(given)
        reduction.apply(given.features)
    gates = [part for part in parts if part is not front]
    once = 2.0 * sum(each.numel() for part in gates for each in part.module.parameters())
    seen = [given.features, *([] if given.projected is None else [given.projected])]
    seen += [values for tap in given.taps.values() for values in vars(tap).values() if isinstance(values, Tensor)]
    beside = given.beside.tokens if isinstance(given.beside, _Beside) else 0
    kept = reduction.index.shape[1] * given.features.shape[-1]
    flops, read = counter.get_total_flops() + once, sum(each.numel() for each in seen)
    return Own(method.name, flops, parameters, read, kept, beside, 1 + (sizes.feature_layer or 0), front.reads_projected)


def _tokens(front: ProjectorReducer, sizes: ModelShape, shape: Architecture, number: int) -> VisualTokens:
    """Random visual tokens of one picture, with all that a method asks for."""
    random = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=random)

    side = math.isqrt(number)
    grid = (side, side) if side * side == number else (1, number)
    lead = shape.tower.prefix if shape.tower else 0
    taps = {}
    for layer in front.encoder_layers(sizes.encoder_layers):
        query = normal(1, sizes.encoder_width) if lead else None
        one = [normal(1, lead + number, sizes.encoder_width) for _ in range(3)]
        taps[layer] = EncoderTap(query, one[0], sizes.encoder_heads, one[1], queries=None if lead else one[2])
    projected = normal(1, number, sizes.width) if front.reads_projected else None
    question = None
    if front.reads_question:
        seen = normal(1, number, sizes.width)
        question = Question(
            seen, normal(1, ASKED, sizes.width), torch.ones(1, ASKED, dtype=torch.bool), state=normal(1, sizes.width)
        )
    beside = _Beside(normal(1, number, sizes.encoder_width)) if front.joins_encoder else None
    return VisualTokens(normal(1, number, sizes.features), grid, taps, projected, question, beside)
