"""VisToG: "Efficient Multi-modal Large Language Models via Visual Token Grouping" (arXiv 2411.17773), as far as it is known."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import Self

from ..errors import InputError
from ..tokens import Reduction, VisualTokens, keep_all, resolve_budget
from .base import ProjectorReducer
from .networks.grouping import Grouping, Heard, centres, chosen, divergence, empty_share
from .tools.selection import anchors
from .trained import ModelShape, Trained

PICTURES = 200  # whose patches give semantic tokens their first values


@dataclass(kw_only=True)
class VisToG(
    Trained,
    ProjectorReducer,
    name="vistog",
    paper="https://arxiv.org/abs/2411.17773",
    reconstruction=(
        "a reconstruction: the paper's code was not published; how tokens are grouped follows GroupViT, and losses, first values "
        "and sizes are ours"
    ),
):
    """Learnt semantic tokens run through the vision encoder beside the patches; then each patch joins one of them.

    Inside the encoder semantic tokens see the patches, and no patch sees them. After it, each patch goes to the semantic token that
    it fits best, and each semantic token gets the sum of its patches over their number plus one. In training the choice is that of
    a Gumbel softmax with temperature 1, whose gradient passes straight through. Outputs are in the order of the semantic tokens;
    a picture of no more tokens than these stays as it is.

    Parameters
    ----------
    budget : how many of the semantic tokens are used, the first ones. None = all, for which they were trained.
    groups : K, semantic tokens; 64 are the fewest that the paper shows.
    assign : "hard", each patch in one group, or "soft", in all of them by weights: what the paper is compared with.
    balance : weight in training of the divergence of mean shares of groups from equal ones, against empty groups; 0 = none.
    """

    joins_encoder = True
    learns = ("module", "projector", "lora")
    belongs_to_weights = ("groups", "assign")

    groups: int = 64
    assign: Literal["hard", "soft"] = "hard"
    balance: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_range(groups=1, balance=0)

    def build(self, shape: ModelShape) -> nn.Module:
        return Grouping(self.groups, shape.encoder_width)

    def layer_tokens(self, total: int, layers: int) -> list[float] | None:
        return [min(self.groups, total)] * layers if self.budget is None else super().layer_tokens(total, layers)

    def at_budget(self, tokens: float, total: int, layers: int, at: Literal["mean", "last"] = "mean") -> Self:
        if self.groups < tokens < total:
            raise InputError(
                f"{self.name}: {tokens:g} of {total} visual tokens cannot be had; the nearest it can do is {self.groups}, as many "
                "as it has semantic tokens."
            )
        return super().at_budget(tokens, total, layers, at)

    def notes(self) -> list[str]:
        few = isinstance(self.budget, int) and self.budget < self.groups
        more = [f"{self.name}: {self.budget} of its {self.groups} semantic tokens, which were trained together"] if few else []
        return [*super().notes(), *more]

    def reduce(self, tokens: VisualTokens) -> Reduction:
        budget = resolve_budget(self.budget, tokens.number)
        count = min(self.groups, tokens.number) if budget is None else budget
        if count == tokens.number:
            return keep_all(tokens.features)
        if count > self.groups:
            raise InputError(
                f"{self.name}: budget={self.budget} asks for {count} of {tokens.number} tokens, and it has {self.groups} semantic "
                "tokens. Leave the budget out, or train it with more groups."
            )
        module: Any = self.module
        beside: Any = tokens.beside
        cells = tokens.features.float()
        semantic = beside(module.tokens[:count].expand(len(cells), -1, -1)).float()
        logits = module.logits(semantic, cells)
        if module.heard is not None:
            module.heard.append(Heard(beside.patches, logits.softmax(1)))
        assigned = logits.softmax(1) if self.assign == "soft" else chosen(logits, noisy=module.training)
        made, given = module(semantic, cells, assigned), assigned.detach()
        share = given / (given.sum(-1, keepdim=True) + 1)
        index = anchors(share)
        if self.positions == "original":  # which is that of the picture
            index, order = index.sort(dim=1)
            made, share = (part.gather(1, order[..., None].expand_as(part)) for part in (made, share))
        return Reduction(index, made=made, attention=share)

    def initialise(self, model: Any, batches: Iterable[dict[str, Tensor]]) -> None:
        """Let semantic tokens begin at the centres of embedded patches of training pictures, at most 200."""
        module: Any = self.module
        patches: list[Tensor] = []
        with module.listening() as heard, torch.no_grad():
            for batch in batches:
                model(**batch)
                patches += [picture for each in heard for picture in each.patches.float()]
                heard.clear()
                if len(patches) >= PICTURES:
                    break
        points = torch.cat(patches[:PICTURES]) if patches else torch.empty(0)
        if len(points) >= self.groups:
            with torch.no_grad():
                module.tokens.copy_(centres(points, self.groups))

    def objective(self, model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        module: Any = self.module
        with module.listening() as heard:
            loss = model(**batch).loss
        if not heard:  # no picture, or none with more tokens than groups
            return loss, {}
        uneven = torch.stack([divergence(each.shares) for each in heard]).mean()
        empty = torch.stack([empty_share(each.shares) for each in heard]).mean()
        return loss + self.balance * uneven, {"uneven": uneven.item(), "empty": empty.item()}
