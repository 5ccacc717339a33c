"""Reducing patches inside the vision encoder: hooks on stock encoder blocks, between attention and MLP.

A block is ``x + attention(...)``, then ``x + mlp(norm(x))``. A method gets the patches where the norm is about to see them; the
norm and the MLP then run on fewer, and a hook on the block puts their sum in the place of its output. No forward is replaced, so
quantised and LoRA layers work, and whatever records the outputs of blocks records the short ones.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import FoveateError, UnsupportedModelError
from ...methods.base import EncoderReducer
from ...tokens import BlockTokens, EncoderTap, Escort, Reduction, Regroup, sums_of_links
from ..decoder.attention import BIASED, attend_as_before, attend_with_sdpa, implementation_of
from ..model.anatomy import Anatomy, Block


class Shrinking:
    """The patches of one call on their way through the encoder.

    Attributes
    ----------
    cell : [B, n] the grid cell at whose place each patch stands.
    valid : [B, n] bool, no padding.
    owner : [B, N] the patch that each grid cell went to, -1 = dropped.
    counts : per encoder layer [B] patches that leave it.
    notes : for the report.
    """

    def __init__(self, parts: Anatomy, method: EncoderReducer, grid: tuple[int, int]) -> None:
        layers = parts.feature_layers()
        if len(layers) > 1:
            raise UnsupportedModelError(
                f"{method.name} changes the number of patches on the way, and the features of this model are those of several "
                f"encoder layers ({', '.join(map(str, layers))}) side by side. Use a method that acts before the projector."
            )
        depth, self.patches = parts.feature_layer() + 1, grid[0] * grid[1]
        self.parts, self.method, self.lead = parts, method, int(parts.tower_kind.has_cls)
        self.tail = int(method.escorts)
        self.plan = method.plan(depth, self.patches)
        if any(not 0 <= layer < depth for layer in self.plan):
            raise UnsupportedModelError(
                f"{method.name}: blocks {sorted(self.plan)} were asked for, and blocks 0 to {depth - 1} make the features."
            )
        self.blocks = [parts.encoder_block(layer) for layer in range(depth)]
        self.proportional = method.counts_sizes()
        self.cell, self.owner, self.valid = (torch.empty(0),) * 3
        self.counts: list[Tensor] = []
        self.notes: list[str] = []
        self._sizes, self._ragged = torch.empty(0), False
        self._bias: Tensor | None = None  # [B, lead + n + tail] what attention adds to the logits of each key
        self._seen: dict[str, Tensor] = {}
        self._short: Tensor | None = None
        self._with_sdpa: list[Any] = []  # attention modules that attend with another implementation meanwhile
        self._shrunk: set[int] = set()
        self._sound: Tensor | bool = True
        self._owning_thread = threading.get_ident()  # another thread may use the same model

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Within this, one call of the encoder is reduced."""
        handles: list[Any] = []
        checkpointed: list[Any] = [b.module for b in self.blocks if getattr(b.module, "gradient_checkpointing", False)]
        try:
            for number, block in enumerate(self.blocks):
                handles += self._hook(number, block)
            for number, layer in enumerate(self.parts.layers if self.tail else ()):  # those after the features, too
                handles.append(layer.register_forward_pre_hook(self._mine(self._escort, number)))
            for module in checkpointed:  # a block that is run anew for its gradient would have to shrink anew
                module.gradient_checkpointing = False
            yield
            self._check_ran()
        finally:
            for module in checkpointed:
                module.gradient_checkpointing = True
            for module in self._with_sdpa:
                attend_as_before(module)
            self._with_sdpa = []
            for handle in handles:
                handle.remove()

    def _check_ran(self) -> None:
        """Raise ``UnsupportedModelError`` if the encoder ran without all of the hooks."""
        if len(self.counts) != len(self.blocks) or self._shrunk != set(self.plan):
            raise UnsupportedModelError(
                "the vision encoder did not shrink: is it compiled by itself? Compile the whole model instead."
            )

    def _hook(self, number: int, block: Block) -> list[Any]:
        handles: list[Any] = [
            block.attention.register_forward_pre_hook(self._mine(self._attend), with_kwargs=True),
            block.module.register_forward_hook(self._mine(self._leave), prepend=True),
        ]
        if number == 0:
            handles.append(block.module.register_forward_pre_hook(self._mine(self._begin)))
        if number not in self.plan:
            return handles
        for name in ("query", "key", "value"):
            handles.append(getattr(block, name).register_forward_hook(self._mine(self._record, name)))
        handles.append(block.norm.register_forward_pre_hook(self._mine(self._shrink, number, block.heads)))
        handles.append(block.mlp.register_forward_hook(self._mine(self._after_mlp)))
        return handles

    def _mine(self, call: Any, *first: Any) -> Any:
        """The hook ``call``, for the thread that reduces."""

        @functools.wraps(call)
        def hook(module: Any, *args: Any) -> Any:
            return call(*first, module, *args) if threading.get_ident() == self._owning_thread else None

        return hook

    def _begin(self, module: Any, args: tuple[Any, ...]) -> None:
        batch, device = len(args[0]), args[0].device
        self.cell = torch.arange(self.patches, device=device).expand(batch, -1)
        self.owner, self.valid = self.cell, torch.ones_like(self.cell, dtype=torch.bool)
        self._sizes, self._bias, self._ragged, self.counts = torch.ones_like(self.cell, dtype=torch.float32), None, False, []

    def _escort(self, number: int, module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The token that runs along is what the method makes of it; before the first layer it comes into being."""
        hidden = args[0]
        if number == 0:
            states = hidden[:, 0] if self.lead else hidden.mean(1)
        else:
            hidden, states = hidden[:, :-1], hidden[:, -1]
        changed = self.method.escort(Escort(states, number, functools.partial(projected_alone, self.parts.projector)))
        return torch.cat([hidden, changed[:, None].to(hidden)], 1), *args[1:]

    def _attend(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Attention counts a merged patch as often as it has cells, and padding not at all."""
        if self._bias is None:
            return None
        used = implementation_of(module)
        if used not in BIASED:
            attend_with_sdpa(module)
            self._with_sdpa.append(module)
            self.notes = [f"{used} takes no bias for keys; encoder blocks that need one attend with sdpa"]
        hidden = args[0] if args else kwargs["hidden_states"]
        return args, {**kwargs, "attention_mask": self._bias[:, None, None].to(hidden)}

    def _record(self, name: str, module: Any, args: Any, out: Tensor) -> None:
        self._seen[name] = out.detach()

    def _shrink(self, number: int, heads: int, module: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        hidden, goal = args[0], self.plan[number]
        query = self._seen["query"]
        tap = EncoderTap(
            query[:, 0] if self.lead else None,
            self._seen["key"],
            heads,
            queries=query,
            values=self._seen["value"],
            bias=self._bias,
            escorted=bool(self.tail),
        )
        end = hidden.shape[1] - self.tail
        with torch.autocast(hidden.device.type, enabled=False):  # scores are float32 in mixed precision too
            merge = self.method.shrink(BlockTokens(tap, self.valid, self._sizes, number, goal))
            patches = self._merged(hidden[:, self.lead : end], merge)
            self._short = torch.cat([hidden[:, : self.lead], patches, hidden[:, end:]], 1)
        self._shrunk.add(number)
        return (self._short, *args[1:])

    def _merged(self, patches: Tensor, merge: Regroup) -> Tensor:
        """[B, n, C] -> [B, M, C], and the book of which patch is where."""
        (number, channels), outputs = patches.shape[1:], merge.index.shape[1]
        if not 1 <= outputs <= number:
            raise FoveateError(f"{self.method.name} made {outputs} patches of {number}. This is a fault of the method.")
        index, place = merge.index.clamp(0, number - 1), torch.arange(outputs, device=patches.device)
        real = torch.ones_like(index, dtype=torch.bool) if merge.valid is None else merge.valid
        known = (index == merge.index) & (merge.owner.gather(1, index) == place)  # each output stands at a patch of its own
        self._sound = self._sound & (known | ~real).all() & (merge.owner < outputs).all()
        mine = torch.where(self.valid, merge.owner, -1).clamp(-1, outputs - 1)
        if merge.share is None:
            short = patches.gather(1, index[..., None].expand(-1, -1, channels))
        else:
            into, sources = torch.where(mine < 0, outputs, mine).sort(dim=1, stable=True)
            short = sums_of_links(patches, sources, into, merge.share.gather(1, sources), outputs)
        self.owner = torch.where(self.owner < 0, -1, mine.gather(1, self.owner.clamp(min=0)))
        self.cell, valid = self.cell.gather(1, index), self.valid.gather(1, index)
        self._ragged = self._ragged or merge.valid is not None
        self.valid = valid if merge.valid is None else valid & merge.valid
        self._sizes = self._count_cells()
        if self.proportional or self._ragged:
            bias = self._sizes.clamp(min=1).log() if self.proportional else torch.zeros_like(self._sizes)
            self._bias = F.pad(bias.masked_fill(~self.valid, float("-inf")), (self.lead, self.tail))
        return short

    def _count_cells(self) -> Tensor:
        """[B, n] float32 grid cells that went into each patch."""
        number = self.cell.shape[1]
        owner = torch.where(self.owner < 0, number, self.owner)
        total = torch.zeros(len(owner), number + 1, device=owner.device)
        return total.scatter_add(1, owner, torch.ones_like(owner, dtype=torch.float32))[:, :number]

    def _after_mlp(self, module: Any, args: Any, out: Tensor) -> Tensor | None:
        if self._short is None:
            return None
        self._short = self._short + out
        return out[:, :1]  # the block adds it to its full-length residual, which nobody reads

    def _leave(self, module: Any, args: Any, out: Any) -> Any:
        self.counts.append(self.valid.sum(1))
        short, self._short, self._seen = self._short, None, {}
        if short is None:
            return None
        return (short, *out[1:]) if isinstance(out, tuple) else short

    def result(self, tokens: Tensor) -> tuple[Tensor, Reduction]:
        """What left the encoder [B, M, C], in the order that the decoder gets it in, and where it came from.

        The token that ran along is the last one, at the last cell where no other token stands.

        Parameters
        ----------
        tokens : [B, M, C] the patches, and what ran along.

        Raises
        ------
        FoveateError : the method returned something that breaks its contract.
        """
        if not bool(self._sound):
            raise FoveateError(
                f"{self.method.name} put an output at no patch, or two at one, or a patch into an output that does not exist. "
                "This is a fault of the method."
            )
        number = self.cell.shape[1]
        patches, more = tokens[:, :number], tokens[:, number:]
        order = torch.arange(number, device=self.cell.device).expand_as(self.cell)
        if self.method.order == "raster":
            order = self.cell.argsort(dim=1, stable=True)
        place = torch.empty_like(order).scatter(1, order, torch.arange(number, device=order.device).expand_as(order))
        owner = torch.where(self.owner < 0, -1, place.gather(1, self.owner.clamp(min=0)))
        valid = self.valid.gather(1, order) if self._ragged else None
        ordered = patches.gather(1, order[..., None].expand(-1, -1, patches.shape[-1]))
        index = self.cell.gather(1, order)
        if self.tail:
            every = torch.arange(self.patches, device=index.device).expand(len(index), -1)
            taken = torch.zeros_like(every, dtype=torch.bool).scatter(1, index, True)
            index = torch.cat([index, every.masked_fill(taken, -1).amax(1, keepdim=True)], 1)
            valid = None if valid is None else F.pad(valid, (0, 1), value=True)
        return torch.cat([ordered, more], 1), Reduction(index, valid, owner=owner)


def projected_alone(projector: Any, states: Tensor) -> Tensor:
    """[..., C] -> [..., D] by a projector whose weights get no gradient from that."""
    weights = {name: weight.detach() for name, weight in projector.named_parameters()}
    flat = states.reshape(1, -1, states.shape[-1])
    found: Tensor = torch.func.functional_call(projector, weights, (flat,))
    return found.reshape(*states.shape[:-1], -1)
