"""What one operator computes and moves, and the operators of our own model of a forward pass.

Each operator reads its inputs from memory once and writes its output once. Fused attention (flash) reads queries, keys and values,
writes the output, and computes only what the mask lets through; unfused attention computes the whole square and moves it four
times. Matrix products count 2 operations per multiply-add, the rest one per addition, multiplication, division, root, exponential.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from .architecture import Decoder, Experts, Mixer, Norm, Projector, Stack, Tower

SOFTMAX, ROTATION, ACTIVATION = 5, 3, 4  # operations per value
STATE = 7  # of a value of a state for a token: it fades, is asked for what it predicts, is corrected, and is read


@dataclass(frozen=True)
class Operator:
    """One operator, run once.

    Attributes
    ----------
    name : unique within its part of the model.
    flops : operations.
    weights : bytes of parameters read. loads, stores : bytes of activations read and written.
    cache_loads, cache_stores : bytes of keys and values read from and written to the cache.
    bits : of the wider operand of a matrix product; None = not a matrix product.
    """

    name: str
    flops: float
    weights: float = 0
    loads: float = 0
    stores: float = 0
    cache_loads: float = 0
    cache_stores: float = 0
    bits: float | None = None

    @property
    def bytes(self) -> float:
        """Everything that is moved."""
        return self.weights + self.loads + self.stores + self.cache_loads + self.cache_stores


@dataclass(frozen=True)
class Precision:
    """Bits of the decoder's matrices, of activations, of the key-value cache, and of all other parameters."""

    weight: float = 16
    activation: float = 16
    cache: float = 16
    other: float = 16

    @property
    def unquantised(self) -> Precision:
        """Of the parts that are left in the data type of the model: vision encoder, projector, head."""
        return Precision(self.other, self.other, self.other, self.other)


@dataclass(frozen=True)
class Span:
    """What the attention of one layer works on, per row: tokens that ask, tokens that are asked, pairs that are computed."""

    queries: float
    keys: float
    pairs: float


def prompt_span(tokens: float, window: int | None, causal: bool, fused: bool, chunks: bool = False) -> Span:
    """A prompt that enters a layer; ``chunks``: its windows begin anew after each of them."""
    if not (causal and fused):
        return Span(tokens, tokens, tokens * tokens)
    if chunks and window is not None:
        rest = tokens % window
        return Span(tokens, tokens, (tokens // window * window * (window + 1) + rest * (rest + 1)) / 2)
    reach = min(tokens, window or tokens)
    return Span(tokens, tokens, reach * (reach + 1) / 2 + (tokens - reach) * reach)


def block_pairs(patches: float, window: int | None) -> float:
    """Pairs of the patches of a picture, which see their block of ``window`` patches, or all."""
    if window is None or window >= patches:
        return patches * patches
    rest = patches % window
    return (patches - rest) * window + rest * rest


def step_span(past: float, window: int | None) -> Span:
    """One token that is added to ``past`` ones."""
    keys = min(past + 1, window or past + 1)
    return Span(1, keys, keys)


def cached(tokens: float, window: int | None) -> float:
    """Tokens of a sequence whose keys and values a layer holds: one less than its window, the next one brings its own."""
    return tokens if window is None else min(tokens, window - 1)


def linear(
    name: str, rows: float, inputs: float, outputs: float, precision: Precision, bias: bool = False, to_cache: bool = False
) -> Operator:
    """A linear layer on ``rows`` vectors; ``to_cache`` writes what it makes into the key-value cache."""
    made = rows * outputs
    return Operator(
        name,
        flops=2 * rows * inputs * outputs,
        weights=(inputs * outputs * precision.weight + bias * outputs * precision.other) / 8,
        loads=rows * inputs * precision.activation / 8,
        stores=0 if to_cache else made * precision.activation / 8,
        cache_stores=made * precision.cache / 8 if to_cache else 0,
        bits=max(precision.weight, precision.activation),
    )


def elementwise(name: str, values: float, each: float, precision: Precision, inputs: float = 1, parameters: float = 0) -> Operator:
    """``each`` operations for each of ``values`` results, from ``inputs`` times as many values and some parameters."""
    size = precision.activation / 8
    return Operator(name, each * values, parameters * precision.other / 8, inputs * values * size, values * size)


def norm_operator(name: str, norm: Norm, rows: float, width: int, precision: Precision, number: int = 1) -> Operator:
    """``number`` norms over ``width`` channels."""
    values, parameters = number * rows * width, number * norm.parameters * width
    return elementwise(name, values, norm.operations, precision, parameters=parameters)


def attention(stack: Stack, batch: float, span: Span, precision: Precision, fused: bool, to_cache: bool) -> Iterator[Operator]:
    """Scores, softmax and weighted values, as one operator where they are fused."""
    pairs, size = batch * span.pairs * stack.heads, precision.activation / 8
    queries = batch * span.queries * stack.queries * size
    read = batch * span.keys * stack.keys * (precision.cache if to_cache else precision.activation) / 8  # keys, or values
    product, bits = 2 * pairs * stack.head, max(precision.activation, precision.cache if to_cache else 0)

    def moved(times: int) -> dict[str, float]:
        return {"cache_loads": times * read} if to_cache else {"loads": times * read}

    if fused:
        both = moved(2)
        loads = queries + both.pop("loads", 0)
        yield Operator("attention", 2 * product + SOFTMAX * pairs, loads=loads, stores=queries, bits=bits, **both)
        return
    once, scores = moved(1), pairs * size
    loads = once.pop("loads", 0)
    yield Operator("scores", product, loads=queries + loads, stores=scores, bits=bits, **once)
    yield elementwise("softmax", pairs, SOFTMAX, precision)
    yield Operator("values", product, loads=scores + loads, stores=queries, bits=bits, **once)


def _mixer(stack: Stack, mixer: Mixer, batch: float, tokens: float, precision: Precision, to_cache: bool) -> Iterator[Operator]:
    """Layers that hold a state: it is read and written once, as one kernel would do."""
    rows, size = batch * tokens, precision.cache / 8
    yield linear("mixer in_proj", rows, stack.width, mixer.made, precision)
    weights = mixer.convolved * mixer.reach + mixer.biases + mixer.more
    yield elementwise("convolution", rows * mixer.convolved, 2 * mixer.reach, precision, parameters=weights)
    held = batch * mixer.held * size if to_cache else 0
    moved = {"cache_loads": held, "cache_stores": held, "loads": rows * mixer.convolved * precision.activation / 8}
    yield Operator("state", STATE * rows * mixer.state, stores=rows * mixer.read * precision.activation / 8, **moved)
    yield linear("mixer out_proj", rows, mixer.read, stack.width, precision)


def _attending(stack: Stack, batch: float, span: Span, precision: Precision, fused: bool, to_cache: bool) -> Iterator[Operator]:
    """Attention with its linear layers."""
    rows, width = batch * span.queries, stack.width
    yield linear("q_proj", rows, width, (1 + stack.gates) * stack.queries, precision, stack.qkv_bias)
    made = 0 if stack.reads else stack.keys
    if made:
        yield linear("k_proj", rows, width, made, precision, stack.qkv_bias, to_cache)
    if made and stack.one:
        size = (precision.cache if to_cache else precision.activation) / 8
        yield Operator("values of keys", 0, **{"cache_stores" if to_cache else "stores": rows * made * size})
    elif made:
        yield linear("v_proj", rows, width, made, precision, stack.qkv_bias, to_cache)
    both = rows * (stack.queries + made)
    if stack.query_norm:
        yield elementwise("query norms", both, stack.query_norm.operations, precision, parameters=stack.query_norm_parameters)
    if stack.rotary:
        yield elementwise("rotation", both, ROTATION, precision)
    yield from attention(stack, batch, span, precision, fused, to_cache)
    if stack.gates:
        yield elementwise("attention gate", rows * stack.queries, ACTIVATION + 1, precision, inputs=2)
    yield linear("o_proj", rows, stack.queries, width, precision, stack.out_bias)


def _mlp(
    rows: float, width: int, inner: int, precision: Precision, *, gated: bool, bias: bool = False, read: float = 1, name: str = ""
) -> Iterator[Operator]:
    """An MLP; of several of them on ``rows`` together, the weights of ``read`` ones are read."""

    def several(operator: Operator) -> Operator:
        return replace(operator, weights=read * operator.weights)

    if gated:
        yield several(linear(f"{name}gate_proj", rows, width, inner, precision, bias))
    yield several(linear(f"{name}up_proj", rows, width, inner, precision, bias))
    yield elementwise(f"{name or 'mlp '}activation", rows * inner, ACTIVATION + gated, precision, inputs=1 + gated)
    yield several(linear(f"{name}down_proj", rows, inner, width, precision, bias))


def _experts(experts: Experts, rows: float, width: int, precision: Precision) -> Iterator[Operator]:
    """Those that tokens choose, and the shared one. Weights are read of as many as tokens that choose at random would need."""
    if experts.beside:
        yield elementwise("expert norms", 3 * rows * width, 4, precision, parameters=3 * width)
        yield elementwise("expert add", rows * width, 1, precision, inputs=2)
    yield linear("router_proj", rows, width, experts.number, precision)
    yield elementwise("routing", rows * experts.number, SOFTMAX, precision)
    needed = experts.number * (1 - (1 - experts.chosen / experts.number) ** rows)
    yield from _mlp(rows * experts.chosen, width, experts.inner, precision, gated=True, read=needed, name="expert ")
    yield elementwise("expert sum", rows * experts.chosen * width, 2, precision)
    if experts.shared:
        yield from _mlp(rows, width, experts.shared, precision, gated=True, name="shared ")
        yield elementwise("shared add", rows * width, 1, precision, inputs=2)
    if experts.weighed:
        yield linear("shared weight_proj", rows, width, 1, precision)


def layer_operators(
    stack: Stack, batch: float, span: Span, leaving: float, precision: Precision, fused: bool, to_cache: bool
) -> Iterator[Operator]:
    """One transformer layer. ``leaving`` tokens of each row are left after its attention, for its MLP."""
    width, rows, left = stack.width, batch * span.queries, batch * leaving
    yield norm_operator("attention norm", stack.norm, rows, width, precision, -(-stack.norms // 2))
    if stack.mixer:
        yield from _mixer(stack, stack.mixer, batch, span.queries, precision, to_cache)
    else:
        yield from _attending(stack, batch, span, precision, fused, to_cache)
    if stack.scaled:
        yield elementwise("attention scale", rows * width, 1, precision, parameters=width)
    yield elementwise("attention add", rows * width, 1, precision, inputs=2)
    if stack.norms > 1:
        yield norm_operator("mlp norm", stack.norm, left, width, precision, stack.norms // 2)
    if stack.experts:
        yield from _experts(stack.experts, left, width, precision)
    if not stack.experts or stack.experts.beside:
        yield from _mlp(left, width, stack.inner, precision, gated=stack.gated, bias=stack.mlp_bias)
    if stack.scaled:
        yield elementwise("mlp scale", left * width, 1, precision, parameters=width)
    yield elementwise("mlp add", left * width, 1, precision, inputs=2)
    if stack.embeds:
        yield linear("layer gate_proj", left, width, stack.embeds, precision)
        yield elementwise("layer gate", left * stack.embeds, ACTIVATION + 1, precision, inputs=2)
        yield linear("layer out_proj", left, stack.embeds, width, precision)
        yield norm_operator("layer norm", stack.norm, left, width, precision)
        yield elementwise("layer add", left * width, 1, precision, inputs=2)


def embedding(decoder: Decoder, rows: float, precision: Precision) -> Operator:
    """The rows of the table that a prompt or a step looks up; placeholders of pictures are looked up like text."""
    values = rows * decoder.stack.width
    return Operator("embed_tokens", 0, weights=values * precision.other / 8, stores=values * precision.activation / 8)


def layer_embeddings(decoder: Decoder, rows: float, precision: Precision) -> Iterator[Operator]:
    """What layers look up by token, and what is made for them of the embeddings, normed and added. Most decoders have none."""
    channels = decoder.looked_up
    if not channels:
        return
    size = rows * channels
    yield Operator("layer embeddings", 0, weights=size * precision.other / 8, stores=size * precision.activation / 8)
    yield linear("layers_proj", rows, decoder.stack.width, channels, precision)
    yield elementwise("layer inputs", size, decoder.stack.norm.operations + 3, precision, inputs=2)


def head_operators(decoder: Decoder, batch: float, rows: float, precision: Precision) -> Iterator[Operator]:
    """The last norm on all ``rows``, and the logits of the last token of each of ``batch`` prompts."""
    width = decoder.stack.width
    yield norm_operator("last norm", decoder.stack.norm, rows, width, precision)
    yield linear("lm_head", batch, width, decoder.vocabulary, precision.unquantised, decoder.head_bias)


def patch_operators(tower: Tower, pictures: float, patches: float, precision: Precision) -> Iterator[Operator]:
    """Patch and position embeddings of ``patches`` per picture, and the norm before the layers."""
    width, tokens = tower.stack.width, patches + tower.prefix
    yield linear("patch embedding", pictures * patches, tower.patch, width, precision, tower.patch_bias)
    if tower.resampled:
        yield linear("position resampling", pictures * patches, tower.positions, width, precision)
    if tower.positions:
        values, read = pictures * tokens * width, 0 if tower.resampled else tower.positions * width
        yield elementwise("position embedding", values, 1, precision, parameters=read)
    if tower.before:
        yield norm_operator("pre norm", tower.before, pictures * tokens, width, precision)


def pooling_operators(tower: Tower, pictures: float, tokens: float, precision: Precision, fused: bool) -> Iterator[Operator]:
    """The norm after the layers, and what encoders do for a pooled output, whether somebody reads it or not."""
    stack, width = tower.stack, tower.stack.width
    if tower.averaged:  # which patch belongs to which token, times the patches
        rows, size = pictures * tokens / tower.averaged, precision.activation / 8
        read = (rows * tokens + pictures * tokens * width) * size
        yield Operator("patch means", 2 * rows * tokens * width, loads=read, stores=rows * width * size, bits=precision.activation)
    if tower.after:
        yield norm_operator("post norm", tower.after, pictures * (1 if tower.cls_alone else tokens), width, precision)
    if not tower.pools:
        return
    yield linear("pool q_proj", pictures, width, width, precision, True)
    yield linear("pool kv_proj", pictures * tokens, width, 2 * width, precision, True)
    for operator in attention(stack, pictures, Span(1, tokens, tokens), precision, fused, to_cache=False):
        yield Operator(**{**vars(operator), "name": f"pool {operator.name}"})
    yield linear("pool o_proj", pictures, width, width, precision, True)
    yield norm_operator("pool norm", stack.norm, pictures, width, precision)
    yield linear("pool up_proj", pictures, width, stack.inner, precision, True)
    yield elementwise("pool activation", pictures * stack.inner, ACTIVATION, precision)
    yield linear("pool down_proj", pictures, stack.inner, width, precision, True)
    yield elementwise("pool add", pictures * width, 1, precision, inputs=2)


def projector_operators(projector: Projector, rows: float, precision: Precision) -> Iterator[Operator]:
    """From encoder features to ``rows`` visual tokens."""
    for number, layer in enumerate(projector.layers, 1):
        values = rows * layer.inputs
        if layer.norm:
            yield elementwise("projector norm", values, layer.norm.operations, precision, parameters=layer.norm_parameters)
        if layer.activation:
            gated = layer.activation == "gated"
            yield elementwise("projector activation", values, ACTIVATION + gated, precision, inputs=1 + gated)
        yield linear(f"linear_{number}", rows, layer.inputs, layer.outputs, precision, layer.bias)
