"""QueCC: "Inference Optimal VLMs Need Fewer Visual Tokens and More Parameters" (arXiv 2411.03312)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import Self

from ..errors import FoveateError, InputError
from ..tokens import Question, Reduction, VisualTokens, resolve_budget
from .base import ProjectorReducer
from .host import Host, ModelShape
from .networks.compressor import Compressor, Heard, fit_to_means, level_layers, new_pictures, regions
from .tools.selection import grid_middles
from .trained import Trained

STRIDE = 4  # 36 tokens of 24 x 24
PICTURES = 256  # that outputs are fitted on before training; 3 GB of features of LLaVA-1.5-7B


@dataclass(kw_only=True)
class QueCC(Trained, ProjectorReducer, name="quecc", paper="https://arxiv.org/abs/2411.03312", adaptive=False):
    """Each square of the grid becomes one learnt token, by attention of a query that knows the question.

    The projection of the question is added to all features. A convolution makes of them one query for each square of ``stride``
    cells a side, which attends to four levels of the vision encoder at the cells of its square. The outputs go through the model's
    projector. Only grids that ``stride`` divides can be compressed.

    As in the released code: what is read of the question is the hidden state of its last token after the final norm, from a pass of
    the language model over the question alone, without gradient. There the question ends before the word "ASSISTANT"; here it
    goes to the end of the prompt. Where the encoder is not CLIP-L, levels are at the same fractions of its depth; that is ours.

    Parameters
    ----------
    budget : the most tokens of a picture: the smallest stride that leaves no more, where weights are made, and a check after that.
    stride : 4 leaves 36 tokens of 24 x 24, 24 leaves one. None = by the budget, 4 without one.
    reader : what reads the question: "decoder", as in the paper, at the price of a pass over it; "embeddings", the mean of its
        input embeddings, which needs no decoder; "none", as in TokenPacker (arXiv 2407.02392).
    heads : of the attention.
    """

    learns = ("module", "projector", "lora")
    single_turns = True
    belongs_to_weights = ("stride", "reader", "heads")

    stride: int | None = None
    reader: Literal["decoder", "embeddings", "none"] = "decoder"
    heads: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_range(heads=1)
        if self.stride is not None:
            self.check_range(stride=1)

    @property
    def reads_question(self) -> bool:  # type: ignore[override]
        return self.reader != "none"

    @property
    def reads_question_state(self) -> bool:  # type: ignore[override]
        return self.reader == "decoder"

    def needs_budget(self) -> bool:
        return False

    def notes(self) -> list[str]:
        ours = {"embeddings": "reader='embeddings' is ours", "none": "without the question it is no QueCC"}
        return [*super().notes(), *([f"{self.name}: {ours[self.reader]}"] if self.reader in ours else [])]

    # -- strides

    def bind(self, host: Host) -> None:
        self.stride = self._stride(host.shape)  # what a budget means is known with the grid, and saved with the weights
        super().bind(host)

    def _stride(self, shape: ModelShape) -> int:
        if self.stride is not None:
            return self.stride
        cells = 0 if shape.grid is None else shape.grid[0] * shape.grid[1]
        if self.budget is None or self.keeps_all or (cells and self.covers(cells)):
            return STRIDE
        if shape.grid is None:
            raise InputError(f"{self.name}: pictures of this model have grids of many sizes. Give stride= and no budget.")
        count = resolve_budget(self.budget, cells) or cells
        for stride in strides_of(shape.grid):
            if cells // stride**2 <= count:
                return stride
        raise InputError(f"{self.name}: budget={self.budget} cannot be had of {_named(shape.grid)}. {_choices(shape.grid)}")

    def at_budget(self, tokens: float, total: int, layers: int, at: Literal["mean", "last"] = "mean") -> Self:
        stride = round(math.sqrt(total / tokens)) if self.stride is None and tokens > 0 else self.stride or 0
        if stride < 1 or stride**2 * tokens != total:
            can = "a square of cells becomes one token" if not self.stride else f"stride={stride} leaves {total / stride**2:g}"
            raise InputError(f"{self.name}: {tokens:g} of {total} visual tokens cannot be had: {can}.")
        return self.with_fields(budget=None, stride=stride)

    def layer_tokens(self, total: int, layers: int) -> list[float] | None:
        if self.stride is None or self.covers(total):
            return super().layer_tokens(total, layers)
        return [total / self.stride**2] * layers

    # -- at work

    def build(self, shape: ModelShape) -> nn.Module:
        if shape.features % self.heads:
            raise InputError(f"{self.name}: heads={self.heads} do not divide the {shape.features} channels of the features")
        feature = shape.encoder_layers - 1 if shape.feature_layer is None else shape.feature_layer
        width = shape.width if self.reads_question else 0
        return Compressor(shape.features, shape.encoder_width, width, level_layers(feature), self._stride(shape), self.heads)

    def encoder_layers(self, depth: int) -> tuple[int, ...]:
        module: Any = self.module
        layers: tuple[int, ...] = module.layers
        return layers

    def reduce(self, tokens: VisualTokens) -> Reduction:
        module: Any = self.module
        stride, (rows, columns) = module.stride, tokens.grid
        if rows % stride or columns % stride:
            raise InputError(f"{self.name}: stride={stride} does not divide {_named(tokens.grid)}. {_choices(tokens.grid)}")
        count, left = resolve_budget(self.budget, tokens.number), tokens.number // stride**2
        if count is not None and count < left:
            raise InputError(
                f"{self.name}: its weights have stride={stride}, which leaves {left} of {_named(tokens.grid)}, and "
                f"budget={self.budget} is less. {_choices(tokens.grid)} Each needs weights of its own."
            )
        taps = [tokens.taps[layer] for layer in module.layers]
        levels = torch.cat([_states(tap.states)[:, tap.lead :].float() for tap in taps], -1)
        made, weights = module(tokens.features.float(), levels, self._text(tokens.question), tokens.grid)
        index = grid_middles(rows, columns, rows // stride, columns // stride).to(made.device).expand(len(made), -1)
        cell = torch.arange(tokens.number, device=made.device)[None, :, None]
        members = regions(cell, tokens.grid, stride)[..., 0].expand(len(made), -1, -1)
        attention = torch.zeros(*made.shape[:2], tokens.number, device=made.device).scatter(2, members, weights.detach().float())
        return Reduction(index, made=made, attention=attention)

    # -- training

    def initialise(self, model: Any, batches: Iterable[dict[str, Tensor]]) -> None:
        """Let it begin as average pooling: outputs are fitted to the means of the features of their regions. This is ours."""
        module: Any = self.module
        pieces: list[Heard] = []
        known: set[tuple[float, ...]] = set()
        with module.listening() as heard, torch.no_grad():
            for batch in batches:
                model(**batch)
                pieces += [piece for each in heard for piece in new_pictures(each, known)]
                heard.clear()
                if len(known) >= PICTURES:
                    break
        fit_to_means(module, pieces)

    def _text(self, question: Question | None) -> Tensor | None:
        """[B, D] of each question; zeros where nothing is asked."""
        if self.reader == "none":
            return None
        if question is None or (self.reads_question_state and question.state is None):
            raise FoveateError(f"{self.name}: the question is missing. This is a fault of the engine.")
        if self.reads_question_state and question.state is not None:
            return question.state.float()
        text = question.text.float().masked_fill(~question.valid[..., None], 0).sum(1)
        return text / question.valid.sum(1, keepdim=True).clamp(min=1)


def _states(states: Tensor | None) -> Tensor:
    if states is None:
        raise FoveateError("an encoder layer shows no output. This is a fault of the engine.")
    return states


def strides_of(grid: tuple[int, int]) -> list[int]:
    """Those that divide both sides, without 1."""
    side = math.gcd(*grid)
    return [stride for stride in range(2, side + 1) if side % stride == 0]


def _named(grid: tuple[int, int]) -> str:
    return f"a picture of {grid[0]} x {grid[1]} tokens"


def _choices(grid: tuple[int, int]) -> str:
    each = [f"{stride} ({grid[0] * grid[1] // stride**2} tokens)" for stride in strides_of(grid)]
    return f"Strides that do: {', '.join(each) or 'none'}."
