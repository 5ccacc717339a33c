"""Small methods with weights, which go through the whole conformance matrix: learnt tokens, and gates that read text.

They have names and are no part of the table of methods.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from foveate.cuts import Cut, PromptTokens
from foveate.methods.base import DecoderReducer, ProjectorReducer
from foveate.methods.tools.selection import anchors
from foveate.methods.trained import ModelShape, Trained
from foveate.tokens import Budget, Reduction, VisualTokens, resolve_budget

SEED = 3


class Queries(nn.Module):
    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(64, channels) / channels**0.5)
        self.key, self.value = nn.Linear(channels, channels), nn.Linear(channels, width)

    def forward(self, features: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.queries[:count] @ nn.functional.layer_norm(self.key(features), features.shape[-1:]).mT
        attention = (4 * logits / features.shape[-1] ** 0.5).softmax(-1)
        return attention @ self.value(features), attention


@dataclass(kw_only=True)
class Learnt(Trained, ProjectorReducer, name="learnt", adaptive=False, listed=False):
    """Eight learnt tokens attend to the visual ones, and take their place."""

    belongs_to_weights = ("space",)

    budget: Budget = 8
    space: Literal["features", "decoder"] = "features"

    def build(self, shape: ModelShape) -> nn.Module:
        return Queries(shape.features, shape.width if self.space == "decoder" else shape.features)

    def initialise(self, model: Any, batches: Iterable[dict[str, Tensor]]) -> None:
        """Processes find other first values, as fits by themselves may; those of the first one count."""
        if torch.distributed.is_initialized():
            with torch.no_grad():
                for weight in self.module.parameters():
                    weight.add_(torch.distributed.get_rank())

    def reduce(self, tokens: VisualTokens) -> Reduction:
        count = resolve_budget(self.budget, tokens.number) or 1
        made, attention = self.module(tokens.features.float(), count)
        index, order = anchors(attention).sort(dim=1)
        made = made.gather(1, order[..., None].expand_as(made))
        attention = attention.gather(1, order[..., None].expand_as(attention))
        return Reduction(index, made=made, space=self.space, attention=attention.detach())


@dataclass(kw_only=True)
class Gate(Trained, DecoderReducer, name="gate", listed=False):
    """Before each layer, all visual tokens of a row leave if a linear gate on its text says so."""

    reads = "nothing"

    first: int = 1

    def build(self, shape: ModelShape) -> nn.Module:
        return nn.ModuleList(nn.Linear(2 * shape.width, 2, bias=False) for _ in range(shape.decoder_layers - 1))

    def cuts(self, layers: int) -> tuple[int, ...]:
        return tuple(range(self.first, layers))

    def cut(self, tokens: PromptTokens) -> Cut:
        text = tokens.prompt_text[..., None].float()
        hidden = nn.functional.layer_norm(tokens.hidden.float(), tokens.hidden.shape[-1:])
        mean = (hidden * text).sum(1) / text.sum(1).clamp(min=1)
        last = hidden.gather(1, tokens.last[:, None, None].expand(-1, 1, hidden.shape[-1]))[:, 0]
        stay, leave = self.module[tokens.layer - 1](torch.cat([mean, last], 1)).unbind(1)
        return Cut(tokens.visual & (stay >= leave)[:, None])


@dataclass(kw_only=True)
class Mixer(Trained, DecoderReducer, name="mixer", listed=False):
    """Before layer 2, each picture's visual tokens become two mixtures of them, with learnt weights."""

    trains = True

    def build(self, shape: ModelShape) -> nn.Module:
        return nn.Linear(shape.width, 2)

    def cuts(self, layers: int) -> tuple[int, ...]:
        return (2,)

    def cut(self, tokens: PromptTokens) -> Cut:
        order = torch.where(tokens.visual, torch.arange(tokens.visual.shape[1], device=tokens.visual.device), 10**6)
        target = order.sort(dim=1).indices[:, :2]
        keep = torch.zeros_like(tokens.visual).scatter(1, target, True) & tokens.visual
        logits = self.module(tokens.hidden.float()).masked_fill(~tokens.visual[..., None], -1e9)
        mix = logits.softmax(1).mT * tokens.visual.any(1)[:, None, None]
        return Cut(keep, target=target, mix=mix)


VARIANTS = {"learnt": {}, "learnt (decoder)": {"space": "decoder"}, "gate": {}, "fovea (guided)": {"guided": True}}


def slopes(weight: torch.Tensor, loss: Callable[[], torch.Tensor], step: float) -> tuple[float, float]:
    """Where the gradient of a weight is largest: the slope of a loss by two differences, and that gradient."""
    flat, at, sides = weight.data.view(-1), int(weight.grad.abs().argmax()), []
    for sign in (1, -1):
        flat[at] += sign * step
        sides.append(float(loss().detach()))
        flat[at] -= sign * step
    return (sides[0] - sides[1]) / (2 * step), float(weight.grad.view(-1)[at])
