"""The scorer of VisionSelector (arXiv 2510.16598), and the soft choice of the best tokens that it is trained with."""

from __future__ import annotations

import torch
from torch import Tensor, nn

SMALL = 1e-4  # standard deviation of the first weights: scores begin near zero
FAR = 40.0  # from the outermost score to where the sigmoid counts for nothing
STEPS = 64  # of bisection


class Selector(nn.Module):
    """Scores tokens [B, N, D] by one head of attention without softmax, of half their width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key = (nn.Linear(width, max(1, width // 2)) for _ in range(2))
        for layer in (self.query, self.key):
            nn.init.normal_(layer.weight, std=SMALL)
            nn.init.zeros_(layer.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, N, D] -> [B, N] the mean over all j of q_i . k_j / sqrt(d').

        That is q_i . k / sqrt(d') with the key k of the mean token. As q_i is linear in x_i, it is x_i . (W_q^T k) + b_q . k: maps
        of one token, and a product with each. Pictures are mapped one by one, so that their batch changes no bit.
        """
        means = tokens.mean(1).split(1)
        keys = [self.key(mean) / self.key.out_features**0.5 for mean in means]
        direction = torch.stack([key @ self.query.weight for key in keys])
        offset = torch.cat([key @ self.query.bias for key in keys])
        scores: Tensor = (tokens * direction).sum(-1) + offset[:, None]
        return scores


def soft_top(scores: Tensor, count: int) -> Tensor:
    """[B, N] logits whose sigmoids are a soft choice of the ``count`` highest scores of each row: scores + t, with sum ``count``.

    A bisection finds t, in float64. Its gradient is that of the equation it solves: dt / ds_j = -v_j / sum(v), where v is the slope
    of the sigmoid at each token.

    Parameters
    ----------
    scores : [B, N].
    count : above 0 and below N.
    """
    wide = scores.double()
    with torch.no_grad():
        low, high = -wide.amax(-1, keepdim=True) - FAR, -wide.amin(-1, keepdim=True) + FAR
        for _ in range(STEPS):
            middle = (low + high) / 2
            few = (wide + middle).sigmoid().sum(-1, keepdim=True) < count
            low, high = torch.where(few, middle, low), torch.where(few, high, middle)
        share = (wide + high).sigmoid()
        slope = share * (1 - share)
        pull = slope / slope.sum(-1, keepdim=True).clamp(min=torch.finfo(slope.dtype).tiny)
    moved = (pull * wide).sum(-1, keepdim=True)
    return (wide + high - (moved - moved.detach())).to(scores.dtype)


def hard_top(scores: Tensor, count: int) -> Tensor:
    """[B, N] 1 at the ``count`` highest scores of each row, 0 elsewhere; ties go to the earlier token."""
    best = scores.argsort(dim=-1, descending=True, stable=True)[:, :count]
    return torch.zeros_like(scores).scatter(1, best, 1.0).detach()
