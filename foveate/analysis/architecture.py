"""The shapes of a vision-language model: what costs something, and how many parameters it has."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Stack:
    """Transformer layers of one shape.

    Parameters
    ----------
    width, inner, layers : channels, channels inside the MLP, number of layers.
    heads, key_value_heads, head : query heads, key-value heads, channels of a head.
    gated : whether the MLP has three matrices instead of two.
    qkv_bias, out_bias, mlp_bias : which linear layers have a bias.
    norms : of a layer. layer_norm : LayerNorm with a bias instead of RMSNorm.
    head_norms : whether queries and keys are normalised by head. rotary : whether they are rotated.
    windows : tokens that attention reaches back in each layer, or the size of its blocks where it is not causal; None = all.
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
    layer_norm: bool = True
    head_norms: bool = False
    rotary: bool = False
    windows: tuple[int | None, ...] = ()

    @property
    def queries(self) -> int:
        """Channels of all query heads."""
        return self.heads * self.head

    @property
    def keys(self) -> int:
        """Channels of all key heads."""
        return self.key_value_heads * self.head

    def norm_size(self, width: int) -> int:
        """Parameters of a norm of ``width`` channels."""
        return width * (2 if self.layer_norm else 1)

    @property
    def matrix_parameters(self) -> int:
        """Of the linear layers of one layer, biases left out."""
        return self.width * (2 * self.queries + 2 * self.keys + (3 if self.gated else 2) * self.inner)

    @property
    def other_parameters(self) -> int:
        """Biases and norms of one layer."""
        biases = self.qkv_bias * (self.queries + 2 * self.keys) + self.out_bias * self.width
        biases += self.mlp_bias * ((2 if self.gated else 1) * self.inner + self.width)
        return biases + self.norms * self.norm_size(self.width) + self.head_norms * 2 * self.norm_size(self.head)


@dataclass(frozen=True)
class Decoder:
    """The language model; ``causal`` is False where a prompt is masked in another way, so that its whole square is computed."""

    stack: Stack
    vocabulary: int
    tied: bool
    head_bias: bool = False
    causal: bool = True

    @property
    def embedding_parameters(self) -> int:
        """Embeddings, head and last norm."""
        matrices = self.vocabulary * self.stack.width * (1 if self.tied else 2)
        return matrices + self.head_bias * self.vocabulary + self.stack.norm_size(self.stack.width)


@dataclass(frozen=True)
class Tower:
    """The vision encoder.

    Parameters
    ----------
    patch : values of a patch. patch_bias : of its embedding.
    patches : of a picture; None where pictures may have any size.
    prefix : tokens that are no patches ([CLS]). positions : position embeddings. outer_norms : around the layers.
    pools : whether an attention head pools the patches at the end, used or not.
    copies : encoders of that shape whose weights are held; one of them runs.
    """

    stack: Stack
    patch: int
    patch_bias: bool
    patches: int | None
    prefix: int = 0
    positions: int = 0
    outer_norms: int = 0
    pools: bool = False
    copies: int = 1

    @property
    def parameters(self) -> int:
        stack = self.stack
        layers = stack.layers * (stack.matrix_parameters + stack.other_parameters)
        around = stack.width * (self.patch + self.patch_bias + self.prefix + self.positions)
        around += self.outer_norms * stack.norm_size(stack.width)
        attention = 4 * stack.width**2 + 4 * stack.width  # the pooling head: projections with biases, probe, norm, MLP
        mlp = 2 * stack.width * stack.inner + stack.inner + stack.width
        return self.copies * (layers + around + self.pools * (attention + 3 * stack.width + mlp))


@dataclass(frozen=True)
class Projector:
    """One way from the encoder to the decoder.

    Parameters
    ----------
    shapes : inputs and outputs of its linear layers. bias : of each of them.
    norm : parameters of the norm in front.
    merge : patches that become one token.
    more : parameters of other kinds, such as the newline token.
    """

    shapes: tuple[tuple[int, int], ...]
    bias: bool = True
    norm: int = 0
    merge: int = 1
    more: int = 0

    @property
    def parameters(self) -> int:
        return sum(i * o + self.bias * o for i, o in self.shapes) + self.norm + self.more


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
            "decoder matrices": stack.layers * stack.matrix_parameters,
            "decoder rest": stack.layers * stack.other_parameters + self.decoder.embedding_parameters,
            "vision tower": self.tower.parameters if self.tower else 0,
            "projector": sum(projector.parameters for projector in self.projectors),
        }
