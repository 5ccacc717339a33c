"""Small networks that score visual tokens, with the question or without."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEADS = 4
WORDS = 32  # of a question, at most: its last ones are read


@dataclass(frozen=True)
class Seen:
    """What a scorer reads of B pictures.

    Attributes
    ----------
    tokens : [B, N, C + L + 2] features, attention of [CLS] in L layers, row and column (``described``).
    words : [B, T, D] embeddings of the question; None = it is not read.
    valid : [B, T] bool, which of them are real.
    """

    tokens: Tensor
    words: Tensor | None = None
    valid: Tensor | None = None


def described(features: Tensor, attention: Tensor, grid: tuple[int, int]) -> Tensor:
    """[B, N, C] features, [B, L, N] attention -> [B, N, C + L + 2].

    Features are normalised token by token; the logarithm of attention picture by picture; rows and columns run from -1 to 1.
    """
    rows, columns = (
        torch.linspace(-1, 1, side, device=features.device) if side > 1 else torch.zeros(1, device=features.device) for side in grid
    )
    place = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1).flatten(0, 1)
    look = attention.clamp(min=1e-8).log().transpose(1, 2)
    look = (look - look.mean(1, keepdim=True)) / (look.std(1, keepdim=True, correction=0) + 1e-6)
    return torch.cat([F.layer_norm(features.float(), features.shape[-1:]), look, place.expand(len(features), -1, -1)], -1)


def last_words(text: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """The last ``WORDS`` of the question, [B, T, D] and [B, T] bool -> [B, WORDS, D] and [B, WORDS], padding after them."""
    text, valid = F.pad(text, (0, 0, 0, 1)), F.pad(valid, (0, 1))  # at least one column, also where nothing is asked
    place = valid.long().cumsum(1) - 1 + (WORDS - valid.sum(1, keepdim=True)).clamp(max=0)
    place = place.masked_fill(~valid | (place < 0), WORDS)  # one column more, which is cut off again
    index = place[..., None].expand(-1, -1, text.shape[-1])
    words = text.new_zeros(len(text), WORDS + 1, text.shape[-1]).scatter(1, index, text)
    real = torch.zeros_like(valid[:, :1]).expand(-1, WORDS + 1).scatter(1, place, True)
    return words[:, :WORDS], real[:, :WORDS]


class Scorer(nn.Module):
    """An MLP, token by token.

    Attributes
    ----------
    record : what was read since a list was put here; None = nothing is kept.
    """

    def __init__(self, inputs: int, width: int = 64) -> None:
        super().__init__()
        self.record: list[Seen] | None = None
        self.first, self.norm = nn.Linear(inputs, width), nn.LayerNorm(width)
        self.hidden, self.last = nn.Linear(width, width), nn.Linear(width, 1)

    def states(self, tokens: Tensor) -> Tensor:
        """[B, N, inputs] -> [B, N, width]."""
        return self.norm(self.first(tokens))

    def forward(self, seen: Seen) -> Tensor:
        """[B, N] logits."""
        return self.last(F.gelu(self.hidden(self.states(seen.tokens))))[..., 0]


class GuidedScorer(Scorer):
    """The same, with what each token finds in the question."""

    def __init__(self, inputs: int, words: int, width: int = 64) -> None:
        super().__init__(inputs, width)
        self.word, self.place = nn.Linear(words, width), nn.Embedding(WORDS, width)
        self.text = nn.TransformerEncoderLayer(width, HEADS, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.joined, self.asked = nn.Linear(3 * width, width), nn.Linear(width, 1)

    def forward(self, seen: Seen) -> Tensor:
        """[B, N] logits. A picture that nothing is asked about gets those of the scorer without a question."""
        free = super().forward(seen)
        if seen.words is None or seen.valid is None:
            return free
        valid = seen.valid | ~seen.valid.any(1, keepdim=True)  # a row must see something, or its softmax is not a number
        words = seen.words.float().masked_fill(~seen.valid[..., None], 0)
        text = self.word(F.rms_norm(words, words.shape[-1:])) + self.place.weight[: words.shape[1]]
        text = self.text(text, src_key_padding_mask=~valid)
        states = self.states(seen.tokens)
        query, key, value = (
            layer(part).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for layer, part in ((self.query, states), (self.key, text), (self.value, text))
        )
        told = F.scaled_dot_product_attention(query, key, value, attn_mask=valid[:, None, None]).transpose(1, 2).flatten(2)
        guided = self.asked(F.gelu(self.joined(torch.cat([states, told, states * told], -1))))[..., 0]
        return free + guided * seen.valid.any(1, keepdim=True)
