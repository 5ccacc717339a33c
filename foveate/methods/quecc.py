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
from ..tokens import EncoderTap, Question, Reduction, VisualTokens
from .base import ProjectorReducer
from .host import Host, ModelShape
from .networks.compressor import Compressor, fit_to_means, level_layers, over_cells, pictures_heard
from .tools.selection import grid_middles
from .tools.strides import check_stride, smallest_stride
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
        return smallest_stride(self.name, self.budget, shape.grid)

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
        check_stride(self.name, stride, self.budget, tokens.grid)
        levels = torch.cat([_states(tokens.taps[layer]) for layer in module.layers], -1)
        made, weights = module(tokens.features.float(), levels, self._text(tokens.question), tokens.grid)
        index = grid_middles(rows, columns, rows // stride, columns // stride).to(made.device).expand(len(made), -1)
        return Reduction(index, made=made, attention=over_cells(weights.detach().float(), tokens.grid, stride))

    # -- training

    def initialise(self, model: Any, batches: Iterable[dict[str, Tensor]]) -> None:
        """Let it begin as average pooling: outputs are fitted to the means of the features of their regions. This is ours."""
        module: Any = self.module
        fit_to_means(module, pictures_heard(module, model, batches, PICTURES))

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


def _states(tap: EncoderTap) -> Tensor:
    """[B, N, C] float32 what a layer put out for the patches."""
    if tap.states is None:
        raise FoveateError("an encoder layer shows no output. This is a fault of the engine.")
    return tap.states[:, tap.lead :].float()
