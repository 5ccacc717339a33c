"""What a method sees (``VisualTokens``) and what it returns (``Reduction``)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from typing import Any, Literal, Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import InputError, UnsupportedModelError

Budget: TypeAlias = int | float | None
EncoderLayer: TypeAlias = int | Literal["last", "aligned"]
ELSEWHERE = -2  # in a source map: the token was merged into one of another frame


def check_budget(budget: Budget) -> None:
    """Raise ``InputError`` unless ``budget`` is None, an int >= 1 or a float in (0, 1]."""
    how = "Use an int >= 1 (visual tokens kept per image), a float in (0, 1] (fraction kept), or None for the method's own rule."
    if budget is None:
        return
    if isinstance(budget, bool) or not isinstance(budget, Real):
        raise InputError(f"budget={budget!r} is not a number. {how}")
    if isinstance(budget, Integral):
        if budget < 1:
            raise InputError(f"budget={budget} would keep no visual token. {how}")
    elif not (math.isfinite(budget) and 0 < budget <= 1):
        raise InputError(f"budget={budget} is not a fraction of the visual tokens. {how}")


def resolve_budget(budget: Budget, tokens: int) -> int | None:
    """Visual tokens to keep of ``tokens``: at least 1, at most all; None where the method decides.

    An int is a count, a float a fraction that is rounded to the nearest count.
    """
    check_budget(budget)
    if budget is None:
        return None
    count = int(budget) if isinstance(budget, Integral) else round(float(budget) * tokens)
    return max(1, min(count, tokens))


@dataclass(frozen=True)
class EncoderTap:
    """Queries and keys of one encoder layer, as its projections give them (not scaled, heads side by side).

    L is 1 where the encoder has a [CLS] token, which comes first, and 0 elsewhere; the N patches follow in raster order. Where a
    method has an escort in the encoder, it comes last, one more token in all of these.

    Attributes
    ----------
    query : [B, C] of the [CLS] token; None where the encoder has none.
    keys : [B, L + N, C].
    heads : number of attention heads that share the C channels.
    states : [B, L + N, C] what the layer put out.
    queries, values : [B, L + N, C], where they are needed: queries without [CLS], both inside the encoder, values beside it.
    bias : [B, L + N] what the layer adds to the logits of each key: padding, and sizes of merged tokens. None = nothing.
    escorted : whether an escort comes last.
    """

    query: Tensor | None
    keys: Tensor
    heads: int
    states: Tensor | None = None
    queries: Tensor | None = None
    values: Tensor | None = None
    bias: Tensor | None = None
    escorted: bool = False

    @property
    def lead(self) -> int:
        """L, tokens before the patches."""
        return 0 if self.query is None else 1

    @property
    def end(self) -> int:
        """L + N, where the patches end."""
        return self.keys.shape[1] - int(self.escorted)

    @property
    def patch_keys(self) -> Tensor:
        """[B, N, C] keys of the patches."""
        return self.keys[:, self.lead : self.end]


@dataclass(frozen=True)
class Question:
    """Visual tokens and the question that is asked about each image, in one space.

    Attributes
    ----------
    visual : [B, N, P]; None for methods that do not say ``reads_projected``, where the decoder's embeddings are that space.
    text : [B, T, P] tokens, or segments, of the text.
    valid : [B, T] bool, no padding; an image nothing is asked about has none.
    paired : whether both were trained to lie close together, as those of a CLIP model.
    state : [B, D] hidden state of the question's last token, after the final norm, where the decoder read the question alone; zeros
        where nothing is asked. For methods that say ``reads_question_state``.
    """

    visual: Tensor | None
    text: Tensor
    valid: Tensor
    paired: bool = False
    state: Tensor | None = None


class SideStream(Protocol):
    """The vision encoder, for tokens of a method that run through its layers beside the patches of B images.

    They see [CLS], the patches and one another. Nothing sees them, so that patches are what they are without them.

    Attributes
    ----------
    patches : [B, N, C] the patches as they were embedded, before their positions are added.
    """

    @property
    def patches(self) -> Tensor: ...

    def __call__(self, tokens: Tensor) -> Tensor:
        """[B, K, C] tokens that enter the encoder where patches do -> [B, K, C] as they leave the layer that makes the features."""
        ...


@dataclass(frozen=True)
class VisualTokens:
    """The visual tokens of B images of the same grid, about to enter the projector.

    Attributes
    ----------
    features : [B, N, C] in raster order, N == rows * columns; for methods that say ``whole_video``, of B videos, frame after frame,
        N == frames * rows * columns.
    grid : (rows, columns).
    taps : the encoder layers the method asked for with ``encoder_layers()``, by the name it used; of a video a row for each frame.
    projected : [B, N, D] the features after the projector, for methods that say ``reads_projected``.
    question : for methods that say ``reads_question``.
    beside : runs tokens of the method through the encoder, for methods that say ``joins_encoder``.
    frames : T, of a video, for methods that say ``whole_video``; else 1.
    """

    features: Tensor
    grid: tuple[int, int]
    taps: dict[EncoderLayer, EncoderTap] = field(default_factory=dict)
    projected: Tensor | None = None
    question: Question | None = None
    beside: SideStream | None = None
    frames: int = 1

    @property
    def number(self) -> int:
        """N, visual tokens per image, or per video."""
        return self.features.shape[1]


@dataclass(frozen=True)
class Escort:
    """A token that a method lets run through all layers of the vision encoder, after the patches of B pictures.

    It begins as a copy of [CLS], or of the mean of the patches where there is none, and attends and is attended to as they are.

    Attributes
    ----------
    states : [B, C] of it before a layer, as the layer before put it out.
    layer : of the encoder.
    project : [..., C] -> [..., D] by the projector, whose weights get no gradient from that.
    """

    states: Tensor
    layer: int
    project: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class BlockTokens:
    """The patches of B images inside one block of the vision encoder, between its attention and its MLP.

    Attributes
    ----------
    tap : queries, keys and values of the block's attention.
    valid : [B, n] bool, no padding: images may have kept different numbers so far.
    sizes : [B, n] float32, how many patches of the picture each one stands for.
    layer : of the encoder.
    goal : how many patches are to be left, at most.
    """

    tap: EncoderTap
    valid: Tensor
    sizes: Tensor
    layer: int
    goal: int


@dataclass(frozen=True)
class Regroup:
    """What becomes of the patches in a block: patch n enters output ``owner[b, n]`` with weight ``share[b, n]``.

    Attributes
    ----------
    index : [B, M] the patch at whose place each output stands.
    owner : [B, n] the output that each patch goes to, -1 = dropped.
    share : [B, n] weights of the sums; None = a pure choice, output m is the patch ``index[b, m]``.
    valid : [B, M] bool, outputs that are real; None = all.
    """

    index: Tensor
    owner: Tensor
    share: Tensor | None = None
    valid: Tensor | None = None


Merge = Regroup  # its name before version 1


@dataclass(frozen=True)
class Reduction:
    """Which visual tokens stay: the outputs are ``weights @ features``, or ``features[index]`` where ``weights`` is None.

    Weights are a matrix, or links: link e adds ``weights[b, e]`` times the token at ``sources[b, e]`` to output ``into[b, e]``.
    ``matrix`` gives the matrix of both. Outputs of few tokens each, or few outputs of all of them, are far cheaper as links.

    A method with learnt tokens gives its outputs themselves as ``made``; ``weights`` and ``added`` are None then.

    Attributes
    ----------
    index : [B, M] the source token at whose grid cell (and position) each output token sits, in output order.
    valid : [B, M] bool, image b keeps the tokens with valid[b]; None = all of them. Ragged counts thus need no host
        synchronisation.
    weights : [B, M, N] merge matrix, or [B, E] of links; None for pure selection.
    sources, into : [B, E] the links, in ascending order of ``into``; those into output M lead nowhere. None = a matrix.
    scores : [B, N] float32 importance for pictures and reports, or None.
    threshold : [B] the score from which a token was kept, where the method has such a value (adaptive rules).
    added : [B, E, C] tokens that are not made of patches, such as [CLS]; they are the first E outputs, and stand at cells that were
        dropped.
    owner : [B, N] where each source token went, -1 = dropped, ``ELSEWHERE`` = into a token of another frame, for what happened
        inside the encoder or over whole videos; else it follows from the rest.
    made : [B, M, C] the outputs themselves, or [B, M, D] in the space of the decoder, after the projector. ``index`` then gives
        each a cell of its own, for its position and for pictures (``tools.selection.anchors``).
    space : of what is ``made``: "features" go through the projector, "decoder" does not.
    attention : [B, M, N] float32, how much each output that was made took from each source token; rows sum to at most 1. For
        reports, and for models that add features to visual tokens inside the decoder. None = not told.
    drawn : [B] bool, which images have outputs that were made, in a reduction that was put together from several.
    """

    index: Tensor
    valid: Tensor | None = None
    weights: Tensor | None = None
    scores: Tensor | None = None
    threshold: Tensor | None = None
    added: Tensor | None = None
    owner: Tensor | None = None
    made: Tensor | None = None
    space: Literal["features", "decoder"] = "features"
    attention: Tensor | None = None
    drawn: Tensor | None = None
    sources: Tensor | None = None
    into: Tensor | None = None

    def apply(self, features: Tensor) -> Tensor:
        """[B, N, C] -> [B, M, C] output tokens (the invalid ones included: mask them with ``valid``)."""
        if self.made is not None:
            return self.made.to(features.dtype)
        added = 0 if self.added is None else self.added.shape[1]
        if self.weights is None:
            chosen = features.gather(1, self.index[:, added:, None].expand(-1, -1, features.shape[-1]))
        elif self.sources is None or self.into is None:
            chosen = product(self.weights[:, added:], features)
        else:
            chosen = sums_of_links(features, self.sources, self.into, self.weights, self.index.shape[1])[:, added:]
        return chosen if self.added is None else torch.cat([self.added.to(chosen), chosen], 1)

    def rows(self, some: list[int]) -> Reduction:
        """The reduction of some of the images."""
        parts: dict[str, Any] = {name: value[some] for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **parts)

    def carry(self, values: Tensor) -> Tensor:
        """[B, N, C] other values of the source tokens -> [B, M, C] of the outputs.

        Raises
        ------
        UnsupportedModelError : outputs were made, and nothing tells of what.
        """
        if self.made is None:
            return self.apply(values)
        if self.attention is None:
            raise UnsupportedModelError(
                "this model adds features of its vision encoder to visual tokens inside the decoder, and the method does not tell "
                "which visual tokens its outputs were made of (Reduction.attention)."
            )
        share = self.attention / self.attention.sum(-1, keepdim=True).clamp(min=1e-9)
        return product(share, values)

    def matrix(self, tokens: int) -> Tensor:
        """[B, M, N] float32 what each output takes of each of N source tokens, where outputs are made of them."""
        (batch, outputs), links = self.index.shape, (self.sources, self.into)
        if self.weights is not None and links[0] is None:
            return self.weights
        matrix = torch.zeros(batch, (outputs + 1) * tokens, device=self.index.device)
        if self.weights is None or links[0] is None or links[1] is None:
            place = torch.arange(outputs, device=self.index.device) * tokens
            return matrix.scatter(1, place + self.index, 1.0)[:, : outputs * tokens].unflatten(1, (outputs, tokens))
        matrix = matrix.scatter_add(1, links[1] * tokens + links[0], self.weights)
        return matrix[:, : outputs * tokens].unflatten(1, (outputs, tokens))

    def are_made(self) -> Tensor:
        """[B] bool, images whose outputs were made."""
        if self.drawn is not None:
            return self.drawn
        return torch.full((len(self.index),), self.made is not None, device=self.index.device)

    def mask(self) -> Tensor:
        """``valid``, or all True, [B, M] bool."""
        return torch.ones_like(self.index, dtype=torch.bool) if self.valid is None else self.valid

    def source_map(self, tokens: int) -> Tensor:
        """[B, N] the output token that each source token went to, -1 = dropped, ``ELSEWHERE`` = one of another frame.

        A partition: a token that several outputs drew from belongs to the one that took most of it, and a token that
        sits at an output cell to that cell. Of outputs that were made: to the one that attended to it most, if that was more than
        half of an even share.
        """
        if self.owner is not None:
            return self.owner
        batch, outputs = self.index.shape
        valid = self.mask()
        if self.made is not None:
            if self.attention is None:
                return self.index.new_full((batch, tokens), -1)
            most, owner = self.attention.float().masked_fill(~valid[..., None], 0).max(1)
            return owner.masked_fill(most <= 1 / (2 * tokens), -1)
        if self.added is not None:  # made of no patch
            valid = valid & (torch.arange(outputs, device=valid.device) >= self.added.shape[1])
        if self.weights is None:
            owner = self.index.new_full((batch, tokens), -1)
        elif self.sources is not None and self.into is not None:
            owner = _owner_of_links(self.sources, self.into, self.weights, valid, tokens)
        else:
            share, owner = self.weights.float().abs().masked_fill(~valid[..., None], 0).max(1)
            owner = owner.masked_fill(share == 0, -1)
        place = torch.arange(outputs, device=self.index.device).expand(batch, -1)
        spare = owner.new_full((batch, 1), -1)  # invalid outputs write to a column that is cut off again
        target = self.index.masked_fill(~valid, tokens)
        return torch.cat([owner, spare], 1).scatter(1, target, place)[:, :tokens]


def product(weights: Tensor, values: Tensor) -> Tensor:
    """[B, M, N] @ [B, N, C] in the dtype of the values. CPUs sum in float32, for many have no units for half precision."""
    wide = torch.promote_types(values.dtype, torch.float32) if values.device.type == "cpu" else values.dtype
    return (weights.to(wide) @ values.to(wide)).to(values.dtype)


def sums_of_links(values: Tensor, sources: Tensor, into: Tensor, weights: Tensor, outputs: int) -> Tensor:
    """[B, N, C] -> [B, M, C], M = ``outputs``: weighted sums along links [B, E], as in ``Reduction``."""
    batch, tokens, channels = values.shape
    row = torch.arange(batch, device=values.device)[:, None]
    ends = torch.arange(outputs + 1, device=values.device).expand(batch, -1).contiguous()
    begin = torch.searchsorted(into.contiguous(), ends) + row * into.shape[1]  # where the links of each output begin
    sums = F.embedding_bag(
        (sources + row * tokens).flatten(),
        values.flatten(0, 1),
        begin.flatten(),
        mode="sum",
        per_sample_weights=weights.to(values.dtype).flatten(),
    )
    return sums.view(batch, outputs + 1, channels)[:, :outputs]


def _owner_of_links(sources: Tensor, into: Tensor, weights: Tensor, valid: Tensor, tokens: int) -> Tensor:
    """[B, N] the output that took most of each token, the first one of several; -1 = none did."""
    outputs = valid.shape[1]
    real = torch.cat([valid, torch.zeros_like(valid[:, :1])], 1).gather(1, into)
    share = weights.abs().masked_fill(~real, 0)
    most = torch.zeros(len(valid), tokens, device=valid.device).scatter_reduce(1, sources, share, "amax")
    first = torch.where((share > 0) & (share == most.gather(1, sources)), into, outputs)
    owner = into.new_full((len(valid), tokens), outputs).scatter_reduce(1, sources, first, "amin")
    return owner.masked_fill(owner == outputs, -1)


def keep_all(features: Tensor) -> Reduction:
    """The reduction that keeps every token where it is."""
    batch, number = features.shape[:2]
    return Reduction(torch.arange(number, device=features.device).expand(batch, -1))
