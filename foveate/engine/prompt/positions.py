"""Position ids of a prompt that became shorter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...errors import InputError
from ..model.anatomy import Anatomy
from ..model.seams import PER_TOKEN_INPUTS, cache_in, full_positions, has_pixels, layout_of
from .layout import Layout, original_positions


class Positions:
    """How the tokens of a method's prompts are numbered.

    Parameters
    ----------
    parts : of the model; with M-RoPE, tokens that stay keep their (t, h, w) positions in any case.
    compact : what is left is renumbered; else kept tokens keep their places.
    """

    def __init__(self, parts: Anatomy, compact: bool) -> None:
        self.model: Any = parts.model
        self.mrope, self.first = parts.family.mrope, parts.family.first_position
        self.compact = compact and not self.mrope
        self.ahead: Tensor | None = None  # [B, 1] by how much what follows the prompt is ahead of its tokens, with M-RoPE

    def of_prompt(self, ids: Tensor, mask: Tensor, past: int, kwargs: dict[str, Any]) -> None:
        """Number a prompt of a model with M-RoPE as the model does, before anything is removed from it."""
        if not self.mrope:
            return
        if kwargs.get("position_ids") is None:
            kwargs["position_ids"] = self._counted(ids, mask, past, kwargs)
        given = kwargs["position_ids"]
        if given.ndim == 3:
            real = mask.bool().to(given.device)
            last = given[-3:].amax(0).masked_fill(~real[:, -given.shape[-1] :], -1).amax(-1, keepdim=True)
            self.ahead = last + 1 - real.sum(-1, keepdim=True)

    def _counted(self, ids: Tensor, mask: Tensor, past: int, kwargs: dict[str, Any]) -> Tensor:
        """[4, B, T] positions as the model counts them."""
        layout = layout_of(cache_in(kwargs))
        if has_pixels(kwargs) or layout is None or layout.ahead is None:
            if has_pixels(kwargs) and kwargs.get("mm_token_type_ids") is None:
                raise InputError(
                    "pictures and no mm_token_type_ids: without them this model cannot number its tokens. "
                    "Pass all that the processor returned."
                )
            found = full_positions(self.model, ids, mask, past, kwargs)
            return found if len(found) == 4 else torch.cat([original_positions(mask.bool())[None], found.expand(3, -1, -1)])
        text = original_positions(mask.bool())
        return torch.cat([text[None], (text + layout.ahead).expand(3, -1, -1)])

    def refuse(self, given: Tensor | None) -> None:
        """Raise ``InputError`` for positions of the user's where prompts are renumbered."""
        if given is not None and self.compact:
            raise InputError(
                "position_ids cannot be given where the prompt is renumbered. Leave them out, or use positions='original'."
            )

    def follow(self, layout: Layout, mask: Tensor, kwargs: dict[str, Any]) -> None:
        """Everything in ``kwargs`` that has one entry per token follows the layout."""
        given, short_mask = kwargs.get("position_ids"), layout.take(mask, 0)
        self.refuse(given)
        if not self.compact:
            full = original_positions(mask.bool()) if given is None else given
            # the user's may be of the new tokens only, where a cache has the others
            full = nn.functional.pad(full, (layout.length - full.shape[-1], 0))
            short = layout.take(full, 0)
            if self.mrope and len(short) == 4 and short.ndim == 3:  # the first row is read for packed sequences only
                short[0] = original_positions(short_mask.bool())
            kwargs["position_ids"] = short
        kwargs["attention_mask"] = short_mask
        for name in PER_TOKEN_INPUTS:
            if kwargs.get(name) is not None:
                kwargs[name] = _of_tokens(layout, kwargs[name])

    def number(self, kwargs: dict[str, Any], mask: Tensor, given: Tensor | None, ahead: Tensor | None, new: int) -> None:
        """Position ids of the ``new`` last tokens of a direct call."""
        if self.compact:
            kwargs["position_ids"] = original_positions(mask.bool())
        kwargs["position_ids"] = kwargs["position_ids"][..., -new:]
        if given is None:
            kwargs["position_ids"] = kwargs["position_ids"] + self.first
        if given is None and ahead is not None:
            kwargs["position_ids"] = kwargs["position_ids"] + ahead.to(kwargs["position_ids"].device)
        if self.mrope and kwargs["position_ids"].ndim == 2:
            kwargs["position_ids"] = kwargs["position_ids"].expand(3, -1, -1)


def _of_tokens(layout: Layout, values: Tensor) -> Tensor:
    """[B, S] values of the last S tokens of the full prompt -> those of them that are left."""
    earlier = layout.length - values.shape[1]
    taken = layout.take(nn.functional.pad(values, (earlier, 0)), 0)
    held = int((layout.gather < earlier).all(0).sum()) if earlier else 0  # columns of what a cache has
    return taken[:, held:]
