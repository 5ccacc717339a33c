"""FlashVID: "Training-free Tree-based Spatiotemporal Token Merging", ICLR 2026 (arXiv 2602.08024)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError
from ..tokens import Budget, EncoderLayer, Reduction, VisualTokens, resolve_budget
from .base import ProjectorReducer
from .tools.budgeting import largest_remainders
from .tools.density import distances, peaks
from .tools.scoring import cls_attention
from .tools.selection import cosines, farthest_first, ranks, take_in_order
from .tools.trees import Trees, grown, scenes

NEIGHBOURS = 7  # at most, whose distances make a density


@dataclass(kw_only=True)
class FlashVID(ProjectorReducer, name="flashvid", paper="https://arxiv.org/abs/2602.08024", adaptive=False):
    """Diverse tokens with much attention stay as they are; the others become means of trees that run through the frames.

    In each frame, tokens are chosen one by one: always the one with the largest product of its cosine distance to the nearest
    chosen token, its [CLS] attention and its relevance, which is its dot product with the mean of the scene. A scene ends where the
    means of two frames are unlike. Every other token is linked to the most similar one of the frame before in the same scene, if
    both are similar enough. A tree of links becomes its mean, at the place of its first token. In each frame, trees that begin
    there are clustered around peaks of density, and each cluster becomes the mean of its trees.

    As in the released code, but for five things. Counts are exact: they are shared out by largest remainders, where the code rounds
    up in every frame, and links one token fewer where too few trees are left. In a scene of one frame the code also clusters the
    chosen tokens. Of equally dense trees the earlier counts as denser, where the code adds noise. A token of negative relevance is
    chosen last; the code's products turn around there. Means are taken before the projector. The code also lets 1.25 times the
    budget enter the decoder, and leaves 0.3 of that from layer 20 on: that is this method together with ``fastv``.

    Parameters
    ----------
    budget : visual tokens of the whole video; the code keeps a quarter.
    chosen : share of the budget that is chosen; the rest are clusters of trees.
    link : cosine from which a token is linked. Where too few trees were left, only the most similar ones are.
    scene : cosine of the means of two frames, below which a scene ends.
    scenes : the video has at least so many, as far as it has frames.
    """

    whole_video = True
    reads_cls = True
    reads_projected = True

    budget: Budget = 0.25
    chosen: float = 0.7
    link: float = 0.8
    scene: float = 0.9
    scenes: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_range(chosen=0, link=-1, scene=-1, scenes=1)
        if self.chosen > 1:
            raise InputError(f"{self.name}: chosen={self.chosen}; it is a share and at most 1")

    def encoder_layers(self, depth: int) -> tuple[EncoderLayer, ...]:
        return ("aligned",)

    def reduce(self, tokens: VisualTokens) -> Reduction:
        count = resolve_budget(self.budget, tokens.number) or tokens.number
        seen = tokens.features if tokens.projected is None else tokens.projected
        states = seen.float().unflatten(1, (tokens.frames, -1))  # [B, T, N, C]
        attention = cls_attention(tokens.taps["aligned"]).view(states.shape[:3])
        means, cells = states.mean(2), states.shape[2]
        scene = scenes(means, self.scene, self.scenes)
        even = means.new_full(means.shape[:2], 1 / tokens.frames)
        some = largest_remainders(even, math.ceil(self.chosen * count - 1e-9), cells)
        apart = diverse(states, attention * relevance(states, means, scene), some)
        trees = grown(states, ~apart, scene, largest_remainders(even, count, cells), self.link)
        counts = self.clusters_of(trees, scene, count - some.sum(1, keepdim=True))
        centre, nearest = clustered(trees, counts)
        return merged(apart, centre, nearest, trees, count, attention.flatten(1))

    def clusters_of(self, trees: Trees, scene: Tensor, rest: Tensor) -> Tensor:
        """[B, T] how many clusters each frame has: by scenes as they are long, in a scene by the trees that begin in a frame."""
        begun = trees.first.sum(-1).double()
        same = (scene[:, :, None] == scene[:, None]).double()
        share = same.sum(-1) / scene.shape[1] * begun / (same @ begun[..., None])[..., 0].clamp(min=1)
        share = share / share.sum(-1, keepdim=True).clamp(min=1e-12)
        return largest_remainders(share, rest, trees.first.sum(-1))


def relevance(states: Tensor, means: Tensor, scene: Tensor) -> Tensor:
    """[B, T, N] dot product of each token with the mean of the frames of its scene, at least 0."""
    same = (scene[:, :, None] == scene[:, None]).float()
    event = same @ means / same.sum(-1, keepdim=True)
    return torch.einsum("btnc,btc->btn", states, event).clamp(min=0)


def diverse(states: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """[B, T, N] bool, so many tokens of each frame, by weight times the distance to the nearest chosen one."""
    most, none = int(counts.max()), torch.zeros_like(weight, dtype=torch.bool)
    if most == 0:
        return none
    order, _ = farthest_first(cosines(states.flatten(0, 1)), most, weight.flatten(0, 1))
    taken = torch.arange(most, device=order.device) < counts.flatten()[:, None]
    return none.flatten(0, 1).scatter(1, order, taken).view(weight.shape)


def clustered(trees: Trees, counts: Tensor) -> tuple[Tensor, Tensor]:
    """[B, T, N] bool, the trees that are centres, ``counts`` of each frame, and [B, T, N] the cell of the nearest one."""
    first = trees.first.flatten(0, 1)
    pairs = first[:, :, None] & first[:, None]
    distance = distances(trees.means.flatten(0, 1))
    distance = torch.where(pairs, distance, distance.masked_fill(~pairs, 0).amax((1, 2), keepdim=True))
    near = distance.topk(min(NEIGHBOURS, first.shape[1]), dim=-1, largest=False).values
    number = counts.flatten().clamp(1, NEIGHBOURS)[:, None, None]
    within = torch.arange(near.shape[-1], device=near.device) < number
    density = ((near.square() * within).sum(-1) / number[..., 0]).neg().exp()
    scores = peaks(density, distance).masked_fill(~first, -1)
    centre = ranks(scores) < counts.flatten()[:, None]
    nearest = distance.masked_fill(~centre[:, None], float("inf")).argmin(-1)
    nearest = torch.where(centre, torch.arange(first.shape[1], device=nearest.device), nearest)
    return centre.view(trees.first.shape), nearest.view(trees.first.shape)


def merged(apart: Tensor, centre: Tensor, nearest: Tensor, trees: Trees, count: int, scores: Tensor) -> Reduction:
    """Every token goes to the cluster of its tree; the chosen ones stay alone."""
    (batch, frames, cells), number = apart.shape, scores.shape[1]
    place = torch.arange(number, device=scores.device).expand(batch, -1)
    apart, centre = apart.flatten(1), centre.flatten(1)
    kept = apart | centre
    cell = (nearest + cells * torch.arange(frames, device=scores.device)[:, None]).flatten(1)  # of the video
    members = torch.zeros_like(scores).scatter_add(1, cell, trees.first.flatten(1).to(scores.dtype))
    goal = torch.where(apart, place, cell.gather(1, trees.root))
    slot = (kept.cumsum(1) - 1).gather(1, goal)
    slot = torch.where(apart | centre.gather(1, goal), slot, count)  # trees of a frame without a cluster lead nowhere
    weights = torch.where(apart, 1.0, 1 / (trees.size.gather(1, trees.root) * members.gather(1, goal)).clamp(min=1))
    into, order = slot.sort(dim=1, stable=True)
    index, _ = take_in_order(place.masked_fill(~kept, 2 * number), count)
    return Reduction(index, weights=weights.gather(1, order), scores=scores, sources=order, into=into)
