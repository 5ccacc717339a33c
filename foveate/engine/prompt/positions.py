"""Position ids of a prompt that became shorter."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from ...errors import InputError, UnsupportedModelError
from ..model.anatomy import Anatomy, decoder_of
from ..model.marks import layout_of
from ..model.seams import cache_in, full_positions, reads_positions
from .layout import Layout, original_positions


class Positions:
    """How the tokens of a prompt are numbered, before and after it became shorter.

    Parameters
    ----------
    parts : of the model; with M-RoPE, tokens that stay keep their (t, h, w) positions in any case.
    compact : what is left is renumbered; else kept tokens keep their places.
    given : the user's positions, of all tokens or of the new ones; None = none.

    Attributes
    ----------
    full : positions before anything is removed, the user's or those of M-RoPE; None = they follow from the mask.
    ahead : [B, 1] by how much what follows the prompt is ahead of its tokens, with M-RoPE.
    """

    def __init__(self, parts: Anatomy, compact: bool, given: Tensor | None) -> None:
        self.model: Any = parts.model
        self.mrope, self.first = parts.family.mrope, parts.family.first_position
        self.compact = compact and not self.mrope
        self.full, self.given = given, given is not None
        self.ahead: Tensor | None = None

    def forget_counts(self, mask: Tensor) -> None:
        """Forget given positions that only count the tokens of the mask [B, T]: a renumbered prompt is counted anew.

        Raises
        ------
        InputError : they are others, and prompts are renumbered.
        """
        if self.full is None or not self.compact:
            return
        columns = slice(mask.shape[1] - self.full.shape[-1], None)
        counted = (original_positions(mask.bool()) + self.first)[:, columns].to(self.full.device)
        if bool(((self.full != counted) & mask.bool()[:, columns].to(self.full.device)).any()):
            raise InputError(
                "position_ids that do more than count the tokens cannot be given where the prompt is renumbered. "
                "Leave them out, or use positions='original'."
            )
        self.full, self.given = None, False

    def count(self, ids: Tensor, mask: Tensor, past: int, pictures: bool, arguments: dict[str, Any]) -> None:
        """Number a prompt of a model with M-RoPE as the model does, before anything is removed from it.

        Raises
        ------
        InputError : the user gives positions of their own where prompts are renumbered, or too little to number the tokens.
        """
        self.forget_counts(mask)
        if not self.mrope:
            return
        if self.full is None:
            self.full = self._counted(ids, mask, past, pictures, arguments)
        if self.full.ndim == 3:
            real = mask.bool().to(self.full.device)
            last = self.full[-3:].amax(0).masked_fill(~real[:, -self.full.shape[-1] :], -1).amax(-1, keepdim=True)
            self.ahead = last + 1 - real.sum(-1, keepdim=True)

    def _counted(self, ids: Tensor, mask: Tensor, past: int, pictures: bool, arguments: dict[str, Any]) -> Tensor:
        """[4, B, T] positions as the model counts them."""
        layout = layout_of(cache_in(arguments))
        if pictures or layout is None or layout.ahead is None:
            if pictures and arguments.get("mm_token_type_ids") is None:
                raise InputError(
                    "pictures and no mm_token_type_ids: without them this model cannot number its tokens. "
                    "Pass all that the processor returned."
                )
            found = full_positions(self.model, ids, mask, past, arguments)
            return found if len(found) == 4 else torch.cat([original_positions(mask.bool())[None], found.expand(3, -1, -1)])
        text = original_positions(mask.bool())
        return torch.cat([text[None], (text + layout.ahead).expand(3, -1, -1)])

    def follow(self, layout: Layout, mask: Tensor) -> Tensor | None:
        """[..., B, T'] positions of what is left of the full prompt; None where it is renumbered, which the model does itself."""
        if self.compact:
            return None
        full = original_positions(mask.bool()) if self.full is None else self.full
        # the user's may be of the new tokens only, where a cache has the others
        full = nn.functional.pad(full, (layout.length - full.shape[-1], 0))
        short = layout.take(full, 0)
        if self.mrope and len(short) == 4 and short.ndim == 3:  # the first row is read for packed sequences only
            short[0] = original_positions(layout.take(mask, 0).bool())
        return short

    def of_new(self, positions: Tensor | None, mask: Tensor, ahead: Tensor | None, new: int) -> Tensor:
        """Position ids of the ``new`` last tokens of a direct call, which the model would number by its cache.

        Parameters
        ----------
        positions : of the short prompt, or of its new tokens; not read where prompts are renumbered.
        mask : [B, T'] of the short prompt.
        ahead : [B, 1] by how much positions are ahead of what the mask counts.
        """
        positions = original_positions(mask.bool()) if self.compact or positions is None else positions
        positions = positions[..., -new:]
        if self.full is None:
            positions = positions + self.first
            positions = positions if ahead is None else positions + ahead.to(positions.device)
        return positions.expand(3, -1, -1) if self.mrope and positions.ndim == 2 else positions


# -- shifts: positions after a prompt that ends with a picture whose last tokens are gone. ``generate`` counts on from the last
# position it was given. Where kept tokens hold their original positions, that is the last kept token of the picture, and what
# follows has to go on from the end of the full prompt.


class Shifts:
    """What to add, for the ``generate`` that runs in each thread."""

    def __init__(self) -> None:
        self._open: dict[int, tuple[Tensor, int]] = {}

    def __bool__(self) -> bool:
        return bool(self._open)

    @contextmanager
    def during(self, missing: Tensor | None, prompt: int) -> Iterator[None]:
        """Add ``missing`` [..., B, 1] to positions of columns from ``prompt`` on; None adds nothing. Blocks may be nested."""
        thread = threading.get_ident()
        outer = self._open.pop(thread, None)
        if missing is not None and bool((missing > 0).any()):
            self._open[thread] = (missing, prompt)
        try:
            yield
        finally:
            self._open.pop(thread, None)
            if outer is not None:
                self._open[thread] = outer

    @torch.compiler.disable
    def applied(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a forward of ``generate``, with shifted positions."""
        missing, prompt = self._open.get(threading.get_ident(), (None, 0))
        positions, cache = kwargs.get("position_ids"), cache_in(kwargs)
        if missing is None or positions is None:
            return kwargs
        first = 0 if cache is None else int(cache.get_seq_length())
        after = torch.arange(first, first + positions.shape[-1], device=positions.device) >= prompt
        copies = positions.shape[-2] // missing.shape[-2]
        return {**kwargs, "position_ids": positions + missing.repeat_interleave(copies, -2) * after}


def missing_positions(mask: Tensor, given: Tensor | None, short: Tensor) -> Tensor:
    """[..., B, 1] how far the last of the ``short`` positions [..., B, T'] is before the last one of the full prompt.

    ``mask`` [B, T] of the full prompt; ``given`` the user's positions of all or of its last columns, None = counted by the mask.
    """
    real = mask.bool()
    if given is None:
        last = real.long().sum(1, keepdim=True) - 1
    else:
        shown = real[:, -given.shape[-1] :]
        place = (shown.long() * torch.arange(shown.shape[1], device=shown.device)).amax(1, keepdim=True)  # of the last real token
        given = given.expand(*given.shape[:-2], len(real), -1)
        last = given.gather(-1, place.expand(*given.shape[:-1], 1))
    missing = last - short[..., -1:]
    if missing.ndim == 3:  # M-RoPE: the first row is renumbered in any case
        missing[0] = 0
    return missing


# -- guards: two places where transformers reads position ids to detect packed sequences, and would take the gaps of kept tokens
# for borders. Needed only where kept tokens hold their original positions. Truly packed sequences, whose positions begin anew, are
# left alone.

Changed: TypeAlias = "tuple[tuple[Any, ...], dict[str, Any]] | None"


@torch.compiler.disable
def _increasing(positions: Tensor) -> bool:
    return bool((positions.diff(dim=-1) > 0).all())


@torch.compiler.disable
def _padded(mask: Any) -> bool:
    """Whether positions repeat because of padding, and not because sequences are packed."""
    return isinstance(mask, Tensor) and mask.ndim == 2 and not bool(mask.all())


class _Guards:
    """The hooks of one decoder; ``active`` is found once per forward and read by every layer."""

    def __init__(self, reads: bool) -> None:
        self.active, self.reads = False, reads

    def decoder(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Changed:
        """Without mask and cache the decoder looks for packed sequences: give it a mask of ones."""
        positions, embeds = kwargs.get("position_ids"), kwargs.get("inputs_embeds")
        mask, cache = kwargs.get("attention_mask"), cache_in(kwargs)
        if positions is None or embeds is None:
            self.active = False
            return None
        self.active = positions.shape[-1] == 1 or _increasing(positions) or _padded(mask)
        if self.active and mask is None and cache is None:
            kwargs["attention_mask"] = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
            return args, kwargs
        return None

    def layer(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Changed:
        """Flash attention looks again in every layer, which needs no positions: its rotary embeddings are computed already."""
        if not self.active or self.reads or kwargs.get("position_embeddings") is None or kwargs.get("position_ids") is None:
            return None
        kwargs["position_ids"] = None
        return args, kwargs


def guard_positions(model: PreTrainedModel) -> list[RemovableHandle]:
    """Install both guards; the caller removes the handles.

    Raises
    ------
    UnsupportedModelError : under flash attention, where the attention of the decoder computes with position ids.
    """
    decoder: Any = decoder_of(model)
    layers: Any = getattr(decoder, "layers", ())
    reads = len(layers) > 0 and reads_positions(layers[0])
    if reads and "flash" in str(decoder.config._attn_implementation):
        raise UnsupportedModelError(
            "positions='original' leaves gaps between positions, which flash attention takes for packed sequences, and the "
            f"attention of {type(decoder).__name__} computes with them. Use positions='compact', or attn_implementation='sdpa'."
        )
    guards = _Guards(reads)
    handles = [decoder.register_forward_pre_hook(guards.decoder, with_kwargs=True)]
    handles += [layer.register_forward_pre_hook(guards.layer, with_kwargs=True) for layer in layers]
    return handles
