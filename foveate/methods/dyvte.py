"""DyVTE: Wu et al., 2024 (arXiv 2411.19628), learnt exit of all visual tokens."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..cuts import Cut, PromptTokens
from ..errors import InputError
from .base import DecoderReducer
from .exit_at import ExitAt
from .networks.gates import Gates, gate_input
from .tools.exits import agreement, answers, correct, is_safe, outputs_of, recalled, smallest_threshold
from .trained import ModelShape, Trained

if TYPE_CHECKING:
    from collections.abc import Iterator

FLOOR = 0.05  # by how much the loss of an answer may grow, however small it is


@dataclass(kw_only=True)
class DyVTE(Trained, DecoderReducer, name="dyvte", paper="https://arxiv.org/abs/2411.19628", adaptive=True):
    """All visual tokens leave at the first decoder layer after which a learnt gate says that the text has read them.

    A gate reads two states of a layer's output: the mean over the text after the picture without its last token, and the last token
    of the prompt. It is asked in prefill only. Layers that have run keep the visual tokens in their caches.

    A gate has 2 logits, as in the released code. That of the last layer is left out: nothing runs after it. An exit is safe by the
    paper's label if more than 99 % of the answer's tokens stay the likeliest ones, and if the loss of the answer grows by less than
    3 %. Of a model that is sure of its answers, a loss near 0 grows by more for no reason: the floor label also allows 0.05, and is
    ours. All exits of a prompt are tried at once: the decoder reads it in full, and after each layer goes on with the text alone.
    The released code tries one exit in a step.

    Parameters
    ----------
    threshold : probability of leaving from which tokens leave; the paper's argmax is 0.5. ``foveate train`` chooses it.
    label : how training tells a safe exit, "paper" or "floor".
    hidden : width of a gate.
    """

    reads = "nothing"
    learns = ("module",)
    single_turns = True
    belongs_to_weights = ("hidden",)

    threshold: float = 0.5
    label: Literal["floor", "paper"] = "floor"
    hidden: int = 2048

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_range(hidden=1, threshold=0)
        if self.budget is not None and not self.keeps_all:
            raise InputError(f"dyvte: budget={self.budget}; the gates decide. Give threshold=, from 0 to 1, instead.")

    @classmethod
    def to_tune(cls, shares: Sequence[float], layers: int) -> list[list[dict[str, Any]]]:
        """How sure the gates have to be."""
        return [[{"threshold": threshold} for threshold in (0.99, 0.9, 0.7, 0.5, 0.3)]]

    def build(self, shape: ModelShape) -> nn.Module:
        return Gates(shape.width, self.hidden, shape.decoder_layers)

    def cuts(self, layers: int) -> tuple[int, ...]:
        return tuple(range(1, layers))

    def cut(self, tokens: PromptTokens) -> Cut:
        inputs, gates = gate_input(tokens), self._gates
        if gates.seen is not None:
            gates.seen[tokens.layer] = inputs.detach()
            return Cut(tokens.visual)
        leave = gates(inputs, tokens.layer).softmax(-1)[:, 1] > self.threshold
        return Cut(tokens.visual & ~leave[:, None])

    @property
    def _gates(self) -> Gates:
        return cast(Gates, self.module)

    # -- training

    @torch.no_grad()
    def prepare(self, model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """What gates read, [B, L - 1, 2D], and what the answer becomes, with all tokens first and then after each exit.

        That are ``agree`` and ``loss`` [B, L], for labels, and ``right`` [B, L] bool.
        """
        layers, labels, inputs = model.get_decoder().layers, batch["labels"], {**batch, "use_cache": False}
        with self._looking() as seen, outputs_of(layers) as made:
            words, loss = answers(model(**inputs).logits, labels)
        found = [(agreement(words, words, labels), loss, correct(words, labels))]
        for layer in range(1, len(layers)):
            with recalled(layers[:layer], made), ExitAt(layer=layer)(model):
                exited, loss = answers(model(**inputs).logits, labels)
            found.append((agreement(words, exited, labels), loss, correct(exited, labels)))
        agree, losses, right = (torch.stack(each, 1) for each in zip(*found, strict=True))
        read = torch.stack([seen[layer] for layer in range(1, len(layers))], 1)
        return {"inputs": read, "agree": agree, "loss": losses, "right": right}

    @contextmanager
    def _looking(self) -> Iterator[dict[int, Tensor]]:
        seen: dict[int, Tensor] = {}
        self._gates.seen = seen
        try:
            yield seen
        finally:
            self._gates.seen = None

    def objective(self, model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        """Cross-entropy of all gates, and the share of exits that are safe."""
        safe = is_safe(batch["agree"], batch["loss"], 0.0 if self.label == "paper" else FLOOR)
        logits = torch.stack([self.module(row, layer) for layer, row in enumerate(batch["inputs"].unbind(1), 1)], 1)
        loss = F.cross_entropy(logits.flatten(0, 1), safe.long().flatten())
        agree = (logits.argmax(-1) == safe.long()).float().mean()
        return loss, {"safe": float(safe.float().mean()), "agree": float(agree)}

    @torch.no_grad()
    def calibrate(self, model: Any, batches: list[dict[str, Tensor]], tolerance: float) -> dict[str, Any]:
        """The smallest threshold at which no more than ``tolerance`` of all answers become wrong, less those that become right."""
        if not batches:
            return {}
        inputs, right = (torch.cat([batch[name] for batch in batches]) for name in ("inputs", "right"))
        leave = torch.stack([self.module(row, layer).softmax(-1)[:, 1] for layer, row in enumerate(inputs.unbind(1), 1)], 1)
        return {"threshold": smallest_threshold(leave, right, tolerance)}
