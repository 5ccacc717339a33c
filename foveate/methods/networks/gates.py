"""Gates that say whether visual tokens leave a decoder, as in DyVTE."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...cuts import PromptTokens


class Gates(nn.Module):
    """One gate after each decoder layer but the last, after which nothing runs: W2 GELU(W1 x) without biases.

    Attributes
    ----------
    seen : by layer, the inputs [B, 2D] of the gates in a pass that only looks and lets nothing leave; None = gates act.
    """

    def __init__(self, width: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.gates = nn.ModuleList(
            nn.Sequential(nn.Linear(2 * width, hidden, bias=False), nn.GELU(), nn.Linear(hidden, 2, bias=False))
            for _ in range(layers - 1)
        )
        for weight in self.parameters():
            nn.init.xavier_uniform_(weight)
        self.seen: dict[int, Tensor] | None = None

    def forward(self, inputs: Tensor, layer: int) -> Tensor:
        """[B, 2D] -> [B, 2] logits of staying and leaving, before decoder layer ``layer``."""
        found: Tensor = self.gates[layer - 1](inputs.float())
        return found


def gate_input(tokens: PromptTokens) -> Tensor:
    """[B, 2D] float32: the mean of the text after the first picture without its last token, and the last token of the prompt.

    Where there is no other text, the last token stands for the mean.
    """
    hidden, place = tokens.hidden.float(), torch.arange(tokens.hidden.shape[1], device=tokens.hidden.device)
    last = hidden.gather(1, tokens.last[:, None, None].expand(-1, 1, hidden.shape[-1]))[:, 0]
    text = (tokens.prompt_text & (place != tokens.last[:, None]))[..., None]
    number = text.sum(1)
    mean = torch.where(number > 0, (hidden * text).sum(1) / number.clamp(min=1), last)
    return torch.cat([mean, last], 1)
