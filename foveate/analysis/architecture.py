"""The shapes of a vision-language model: what costs something, and how many parameters it has."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal


@dataclass(frozen=True)
class Norm:
    """A kind of norm: parameters of a channel, and operations on a value."""

    parameters: int
    operations: int


RMS_NORM, LAYER_NORM, CENTRED_NORM, BARE_NORM = Norm(1, 4), Norm(2, 7), Norm(1, 6), Norm(0, 4)
"""The last two are a LayerNorm without a bias and a norm by length without weights."""


@dataclass(frozen=True)
class Experts:
    """Several gated MLPs in the place of one, or beside it, of which each token goes through some, chosen by a router.

    Parameters
    ----------
    number, chosen, inner : MLPs of a layer, MLPs of a token, channels inside each.
    shared : channels inside an MLP that all tokens go through as well; 0 = there is none.
    weighed : whether that one is weighed by a linear layer of one output.
    beside : whether the MLP is there, too, with three more norms; then the router scales its channels and its experts.
    """

    number: int
    chosen: int
    inner: int
    shared: int = 0
    weighed: bool = False
    beside: bool = False

    def parameters(self, width: int) -> int:
        """Of the linear layers of one layer."""
        return width * (3 * (self.number * self.inner + self.shared) + self.number + self.weighed)


@dataclass(frozen=True)
class Mixer:
    """What is in the place of attention in layers that hold a state: a linear layer, a short convolution, a state, a linear layer.

    Parameters
    ----------
    made, convolved, read : channels that the first linear layer makes, that are convolved, and that the last linear layer reads.
    reach : tokens that the convolution reads.
    state : values that are updated with each token, beside the last inputs of the convolution.
    biases, more : of the linear layers and the convolution together, and parameters of other kinds.
    """

    made: int
    convolved: int
    read: int
    reach: int
    state: int = 0
    biases: int = 0
    more: int = 0

    @property
    def held(self) -> int:
        """Values that a layer holds of a sequence, however long it is."""
        return self.state + self.convolved * self.reach


@dataclass(frozen=True)
class Stack:
    """Transformer layers, all of one shape but for what is said here.

    Parameters
    ----------
    width, inner, layers : channels, channels inside the MLP, number of layers.
    heads, key_value_heads, head : query heads, key-value heads, channels of a head.
    gated : whether the MLP has three matrices instead of two.
    qkv_bias, out_bias, mlp_bias : which linear layers have a bias.
    norms, norm : of a layer, and their kind.
    query_norm : the kind of norm of queries and keys, None = none. across_heads : whether it takes all heads together.
    scaled : whether what attention and MLP give is scaled channel by channel.
    rotary : whether queries and keys are rotated; "windows" = in layers with a window only, and normed nowhere else either.
    windows : tokens that attention reaches back in each layer, or the size of its blocks where it is not causal; None = all.
    chunks : whether windows begin anew after each of them.
    gates : whether what attention gives is gated, by a second half of the projection of queries.
    experts, dense : in the place of the MLP, but for some layers. mixer, mixed : in the place of attention, in some layers.
    one : whether values are the keys. reads : whether keys and values are those of an earlier layer; such layers run the last token
        of prompts only.
    embeds : channels that each layer looks up by token, and takes in by two linear layers and a norm; 0 = none.
    own : the layers one by one, where they differ in more.
    """

    width: int
    inner: int
    layers: int
    heads: int
    key_value_heads: int
    head: int
    gated: bool = False
    qkv_bias: bool = True
    out_bias: bool = True
    mlp_bias: bool = True
    norms: int = 2
    norm: Norm = LAYER_NORM
    query_norm: Norm | None = None
    across_heads: bool = False
    scaled: bool = False
    rotary: bool | Literal["windows"] = False
    windows: tuple[int | None, ...] = ()
    chunks: bool = False
    gates: bool = False
    experts: Experts | None = None
    dense: tuple[int, ...] = ()
    mixer: Mixer | None = None
    mixed: tuple[int, ...] = ()
    one: bool = False
    reads: bool = False
    embeds: int = 0
    own: tuple[Stack, ...] = ()

    @cached_property
    def each(self) -> tuple[Stack, ...]:
        """The layers one by one: each a stack of one layer, which has experts or an MLP, a mixer or attention."""
        return self.own or tuple(
            replace(
                self,
                layers=1,
                windows=(window,),
                rotary=window is not None if self.rotary == "windows" else self.rotary,
                query_norm=None if self.rotary == "windows" and window is None else self.query_norm,
                experts=None if number in self.dense else self.experts,
                mixer=self.mixer if number in self.mixed else None,
                dense=(),
                mixed=(0,) if number in self.mixed else (),
            )
            for number, window in enumerate(self.windows or (None,) * self.layers)
        )

    @property
    def window(self) -> int | None:
        """Of the first layer."""
        return self.windows[0] if self.windows else None

    @property
    def queries(self) -> int:
        """Channels of all query heads."""
        return self.heads * self.head

    @property
    def keys(self) -> int:
        """Channels of all key heads."""
        return self.key_value_heads * self.head

    @property
    def held_channels(self) -> int:
        """Channels of keys and values that a layer makes of a token."""
        return 0 if self.reads else (1 if self.one else 2) * self.keys

    @property
    def query_norm_parameters(self) -> int:
        """Of the norms of queries and keys in one layer."""
        channels = self.queries + self.keys if self.across_heads else (1 if self.reads else 2) * self.head
        return channels * self.query_norm.parameters if self.query_norm else 0

    @property
    def matrix_parameters(self) -> int:
        """Of the linear layers inside all layers, biases left out."""
        return sum(layer._matrices for layer in self.each)

    @property
    def other_parameters(self) -> int:
        """Biases, norms and the like of all layers."""
        return sum(layer._others for layer in self.each)

    @property
    def _matrices(self) -> int:
        mixing = 2 * self.queries + self.held_channels + self.gates * self.queries
        if self.mixer:
            mixing = self.mixer.made + self.mixer.read
        mlp = 0 if self.experts and not self.experts.beside else (3 if self.gated else 2) * self.inner * self.width
        experts = self.experts.parameters(self.width) if self.experts else 0
        return (mixing + 2 * self.embeds) * self.width + mlp + experts

    @property
    def _others(self) -> int:
        biases = self.qkv_bias * ((1 + self.gates) * self.queries + 2 * self.keys) + self.out_bias * self.width
        biases += self.query_norm_parameters
        if self.mixer:
            biases = self.mixer.convolved * self.mixer.reach + self.mixer.biases + self.mixer.more
        biases += 0 if self.experts else self.mlp_bias * ((2 if self.gated else 1) * self.inner + self.width)
        norms = self.norms + bool(self.embeds)
        if self.experts and self.experts.beside:
            norms += 3
            biases += self.width + self.experts.number
        return biases + (norms * self.norm.parameters + 2 * self.scaled) * self.width


@dataclass(frozen=True)
class Decoder:
    """The language model; ``causal`` is False where a prompt is masked in another way, so that its whole square is computed.

    ``words`` are those that layers look up embeddings of (``Stack.embeds``).
    """

    stack: Stack
    vocabulary: int
    tied: bool
    head_bias: bool = False
    causal: bool = True
    words: int = 0

    @property
    def looked_up(self) -> int:
        """Channels that all layers together look up of a token."""
        return self.stack.layers * self.stack.embeds

    @property
    def embedding_parameters(self) -> int:
        """Embeddings, head and last norm; what layers look up, and what is made for them of the embeddings."""
        matrices = self.vocabulary * self.stack.width * (1 if self.tied else 2)
        matrices += self.looked_up * (self.words + self.stack.width) + self.stack.embeds * self.stack.norm.parameters
        return matrices + self.head_bias * self.vocabulary + self.stack.norm.parameters * self.stack.width


@dataclass(frozen=True)
class Tower:
    """The vision encoder.

    Parameters
    ----------
    patch : values of a patch. patch_bias : of its embedding.
    patches : of a picture; None where pictures may have any size.
    prefix : tokens that are no patches ([CLS]). positions : position embeddings.
    before, after : the norms around the layers. cls_alone : whether the one after takes [CLS] and leaves the patches.
    pools : whether an attention head pools the patches at the end, used or not.
    resampled : whether positions are resampled to the sizes of pictures, by a matrix product.
    averaged : of how many patches a token is the mean, by a matrix product over all of a picture; 0 = it is none.
    packed : whether all pictures are one sequence, whose whole square is computed where attention is not fused.
    unused : parameters that take no part. copies : encoders of that shape whose weights are held; one of them runs.
    """

    stack: Stack
    patch: int
    patch_bias: bool
    patches: int | None
    prefix: int = 0
    positions: int = 0
    before: Norm | None = None
    after: Norm | None = None
    cls_alone: bool = False
    pools: bool = False
    resampled: bool = False
    averaged: int = 0
    packed: bool = False
    unused: int = 0
    copies: int = 1

    @property
    def parameters(self) -> int:
        stack = self.stack
        layers = stack.matrix_parameters + stack.other_parameters
        around = stack.width * (self.patch + self.patch_bias + self.prefix + self.positions)
        around += stack.width * sum(norm.parameters for norm in (self.before, self.after) if norm) + self.unused
        attention = 4 * stack.width**2 + 4 * stack.width  # the pooling head: projections with biases, probe, norm, MLP
        mlp = 2 * stack.width * stack.inner + stack.inner + stack.width
        return self.copies * (layers + around + self.pools * (attention + 3 * stack.width + mlp))


@dataclass(frozen=True)
class Linear:
    """A linear layer of a projector, and what comes before it.

    Parameters
    ----------
    inputs, outputs, bias : of the layer.
    norm, channels : the norm before it, and of how many channels, ``inputs`` by default; several parts of them share one.
    activation : before it, after the norm; "gated" = of one half of twice as many inputs, by which the other is multiplied.
    """

    inputs: int
    outputs: int
    bias: bool = True
    norm: Norm | None = None
    channels: int | None = None
    activation: Literal["plain", "gated"] | None = None

    @property
    def norm_parameters(self) -> int:
        return (self.channels or self.inputs) * self.norm.parameters if self.norm else 0

    @property
    def parameters(self) -> int:
        return self.inputs * self.outputs + self.bias * self.outputs + self.norm_parameters


@dataclass(frozen=True)
class Projector:
    """One way from the encoder to the decoder.

    Parameters
    ----------
    layers : one after the other.
    merge : patches that become one token.
    more : parameters of other kinds, such as the newline token.
    """

    layers: tuple[Linear, ...]
    merge: int = 1
    more: int = 0

    @property
    def parameters(self) -> int:
        return sum(layer.parameters for layer in self.layers) + self.more


@dataclass(frozen=True)
class Architecture:
    """Everything that costs something; ``picture_tokens`` is what a picture becomes in the prompt, None where it depends."""

    name: str
    decoder: Decoder
    tower: Tower | None = None
    projectors: tuple[Projector, ...] = ()
    picture_tokens: int | None = None

    @property
    def parameters(self) -> dict[str, int]:
        """By part; ``decoder matrices`` are the linear layers inside its layers."""
        stack = self.decoder.stack
        return {
            "decoder matrices": stack.matrix_parameters,
            "decoder rest": stack.other_parameters + self.decoder.embedding_parameters,
            "vision tower": self.tower.parameters if self.tower else 0,
            "projector": sum(projector.parameters for projector in self.projectors),
        }
