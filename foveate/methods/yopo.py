"""YOPO: "Treat Visual Tokens as Text? But Your MLLM Only Needs Fewer Efforts to See", Zhang et al., 2024 (arXiv 2410.06169).

The computation of visual tokens is pruned, not their number: each sees its neighbours only, some heads and half of the neurons do
without them, and from a layer on they are gone. The released code simulates all of this by masks with eager attention; here the
layer cut and the neurons are really saved, and heads are pruned by zero values, which any attention implementation understands.
From the layer cut on, attention weights are a softmax over the text alone; the code sets those of visual tokens to zero after the
softmax over all, so that the weights of the text sum to less than one there.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..cuts import Cut, Pattern, PromptTokens
from ..errors import InputError
from ..fingerprint import digest
from ..jsonl import parsed
from ..places import user_path
from .base import DecoderReducer
from .tools.schedule import steps


@dataclass(kw_only=True)
class YOPO(DecoderReducer, name="yopo", paper="https://arxiv.org/abs/2410.06169"):
    """Neighbour-aware attention, head pruning, a layer cut and a narrower MLP for visual tokens.

    Parameters
    ----------
    budget : layers that run visual tokens, as a fraction of all (what is kept on average over layers); it replaces ``layer_cut``.
    layer_cut : the decoder layer from which on there are no visual tokens; None = half of the layers, as in the released 7B (16 of
        32) and 13B (20 of 40) settings.
    window : side of the square of neighbours a visual token sees, in tokens; None = no limit. 5 in the code. It applies while the
        prompt is read, and saves nothing by itself under SDPA.
    neurons : share of the MLP's neurons, the first ones, that visual tokens run; a half in the code.
    heads : JSON file with a head mask from ``foveate search --method yopo``; None = all heads. With grouped queries a head is a key
        head with all its queries.
    """

    reads = "nothing"
    searched, found_by_search = "heads", "heads"

    layer_cut: int | None = None
    window: int | None = 5
    neurons: float = 0.5
    heads: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.neurons <= 1:
            raise InputError(f"{self.name}: neurons={self.neurons}; it must be in (0, 1]")
        if self.window is not None and (self.window < 1 or self.window % 2 == 0):
            raise InputError(f"{self.name}: window={self.window}; it has to be odd, such as 5")
        if isinstance(self.budget, int):
            raise InputError(
                f"{self.name}: budget={self.budget}; it removes no single tokens. Give a share of the layers, such as 0.5."
            )
        self._mask = None if self.heads is None else read_heads(self.heads)

    def settings(self) -> dict[str, Any]:
        """The mask by its contents: another one in the same file is another setting."""
        return {**super().settings(), "heads": None if self._mask is None else digest(json.dumps(self._mask))}

    def cuts(self, layers: int) -> tuple[int, ...]:
        if self.budget is not None:
            cut = max(1, round(self.budget * layers))
        else:
            cut = -(-layers // 2) if self.layer_cut is None else self.layer_cut
        return (cut,) if cut < layers else ()

    def left(self, total: int, layers: int) -> list[float] | None:
        return steps(total, layers, dict.fromkeys(self.cuts(layers), 0))

    def pattern(self, layers: int) -> Pattern:
        return Pattern(self.window, self._mask, self.neurons)

    def cut(self, tokens: PromptTokens) -> Cut:
        return Cut(torch.zeros_like(tokens.valid))


def read_heads(path: str | Path) -> tuple[tuple[bool, ...], ...]:
    """The head mask in a file that ``foveate search --method yopo`` wrote.

    Raises
    ------
    InputError : there is no such file, or it holds no head mask.
    """
    place = user_path(path)
    try:
        heads = parsed(place.read_text())["heads"]
        if not all(isinstance(layer, list) and all(isinstance(head, bool) for head in layer) for layer in heads):
            raise TypeError("heads is no list of lists of true and false")
        return tuple(tuple(layer) for layer in heads)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} holds no head mask of 'foveate search': {type(error).__name__}: {error}") from error
