"""One forward of a decoder with cuts: which tokens each layer runs, and with which mask and rotary embeddings."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...cuts import Cut, PromptTokens
from ...errors import UnsupportedModelError
from ...methods.base import DecoderReducer, FirstTokens
from ...report import Report
from ..model.seams import layer_kinds, layer_windows, reads_positions, rotary
from .attention import Recorded
from .masks import layer_mask, taken_mask
from .stages import DecoderPrompt, Held, HeldCuts, Stage, take


class DecoderKind:
    """What is the same in every forward of a decoder: its sliding windows, kinds of layers, and whether its masks are two-way."""

    def __init__(self, decoder: Any, two_way: bool) -> None:
        self.decoder, self.two_way = decoder, two_way
        self.windows, self.kinds = layer_windows(decoder.config), layer_kinds(decoder.config)
        self.reads_positions = reads_positions(decoder.layers[0])
        shared = getattr(decoder.config, "num_kv_shared_layers", 0)
        if shared:
            raise UnsupportedModelError(
                f"the last {shared} layers of {type(decoder).__name__} read the keys and values of earlier ones, and run the last "
                "token of prompts only, so that none can leave between layers. Use a method that acts before the decoder, such as "
                "'prumerge+'."
            )
        strange = sorted({*self.kinds} - {"full_attention", "sliding_attention"})
        if strange:
            raise UnsupportedModelError(
                f"{type(decoder).__name__} has layers of kind {', '.join(strange)}: what they hold of a token cannot be told apart "
                "from what they hold of others, so that none can leave between layers. Use a method that acts before the decoder, "
                "such as 'prumerge+'."
            )

    @property
    def implementation(self) -> str:
        """Of attention; it can be changed while a method is attached."""
        return str(self.decoder.config._attn_implementation)


@dataclass
class Forward:
    """One forward: rows and columns of it, after ``past`` columns that ``cache`` holds.

    Attributes
    ----------
    positions : [B or 1, width] position ids.
    mask : [B, past + width] bool, or None: as the decoder was given it.
    earlier : cuts of earlier turns in the cache, None = none.
    """

    kind: DecoderKind
    cache: Any
    earlier: HeldCuts | None
    past: int
    rows: int
    width: int
    positions: Tensor
    mask: Tensor | None
    recorded: dict[int, Recorded] = field(default_factory=dict)
    dry: bool = False  # the layer that is running only shows its queries and keys
    memo: dict[Any, Any] = field(default_factory=dict)

    def adopt(self, cache: Any, method: dict[str, Any]) -> None:
        """Use a cache that the decoder has made after the forward began."""
        self.cache = cache

    def held(self, layer: int) -> Held | None:
        """What the layer's cache held before this forward, None = everything."""
        return None if self.earlier is None else self.earlier.of(layer)

    def window(self, layer: int) -> int | None:
        """How far back a layer sees, None where that is everything."""
        window = self.kind.windows[layer]
        return None if window is None or self.past + self.width <= window else window

    def length(self, layer: int) -> int:
        """Keys that a layer's cache has seen before this forward, also those that a sliding window has dropped since."""
        return 0 if self.cache is None else int(self.cache.get_seq_length(layer))

    def present(self, layer: int, columns: Tensor, queries: int) -> Tensor:
        """The columns of those keys that the cache of a layer hands out; a sliding window hands out the last ones."""
        return columns if self.cache is None else columns[:, -self.cache.get_mask_sizes(queries, layer)[0] :]

    def mask_of(self, columns: Tensor, queries: int, *, plain: bool, window: int | None, hidden: Tensor) -> Tensor | None:
        return layer_mask(
            columns,
            columns[:, -queries:],
            plain=plain,
            window=window,
            implementation=self.kind.implementation,
            dtype=hidden.dtype,
        )

    def continued(self, layer: int, hidden: Tensor) -> dict[str, Any] | None:
        """Arguments of a layer for tokens after a prompt that its cache holds in part. None: the given ones are right."""
        held, window, device = self.held(layer), self.window(layer), hidden.device
        if held is None:
            return None
        key = ("mask", id(held), window, device)
        if key not in self.memo:
            # keys of the prompt stand where they were in it, later ones after its full length
            columns = held.extended(self.length(layer), self.width, self.rows).to(device)
            columns = self.present(layer, columns, self.width)
            plain = held.plain
            if self.mask is not None and not self.unpadded():
                real = self.mask.to(device).gather(1, columns.clamp(min=0, max=self.mask.shape[1] - 1))
                columns, plain = columns.masked_fill(~real, -1), False
            self.memo[key] = self.mask_of(columns, self.width, plain=plain, window=window, hidden=hidden)
        changed = {"attention_mask": self.memo[key]}
        if held.shift is not None:
            # positions were counted anew after a cut: later tokens go on from there
            shift = held.shift.repeat_interleave(self.rows // len(held.shift), 0)
            positions = self.positions.to(shift.device) - shift
            changed["position_embeddings"] = self.rotary(layer, hidden, positions, id(held))
            if self.kind.reads_positions:
                changed["position_ids"] = positions
        return changed

    def unpadded(self) -> bool:
        """The mask hides nothing."""
        if "unpadded" not in self.memo:
            self.memo["unpadded"] = self.mask is None or bool(self.mask.all())
        return bool(self.memo["unpadded"])

    def rotary(self, layer: int, hidden: Tensor, positions: Tensor, owner: int) -> Any:
        """Rotary embeddings at other positions than the prompt's."""
        key = ("rotary", owner, self.kind.kinds[layer], hidden.device)
        if key not in self.memo:
            self.memo[key] = rotary(self.kind.decoder, hidden, positions.to(hidden.device), self.kind.kinds[layer])
        return self.memo[key]


@dataclass
class Prefill(Forward):
    """A forward that reads a prompt with pictures.

    Attributes
    ----------
    prompt : what it reads, for the rows and columns of this forward.
    asked : columns of it without those that were guessed ahead (assisted generation).
    tokens : the same as methods see it, before the first layer.
    cuts : what the cache is marked with, layer by layer; None without a cache.
    plan : the reducer that acts before a layer, of those that the budget leaves anything to do.
    patterned : whether the computation of visual tokens is changed.
    several : tokens have several positions each (M-RoPE), which they keep.
    first_tokens : what the first token of a prompt becomes before each layer; None = it stays.
    given : the masks of the layers whose queries and keys are read.
    stages : what runs from a layer on, by that layer; ``mixes`` tokens that change there.
    decided : layers before which the method has been asked already.
    """

    prompt: DecoderPrompt = field(kw_only=True)
    asked: int = field(kw_only=True)
    tokens: PromptTokens = field(kw_only=True)
    report: Report = field(kw_only=True)
    cuts: HeldCuts | None = field(kw_only=True)
    plan: dict[int, DecoderReducer] = field(kw_only=True)
    patterned: bool = field(kw_only=True)
    several: bool = field(kw_only=True)
    first_tokens: FirstTokens | None = field(kw_only=True, default=None)
    given: dict[int, Tensor | None] = field(default_factory=dict)
    stages: dict[int, Stage] = field(default_factory=dict)
    mixes: dict[int, Cut] = field(default_factory=dict)
    decided: set[int] = field(default_factory=set)
    columns: dict[int, Tensor] = field(default_factory=dict)

    def adopt(self, cache: Any, method: dict[str, Any]) -> None:
        self.cache, self.cuts = cache, None if cache is None else HeldCuts(method)

    def stage(self, layer: int) -> Stage | None:
        """What runs in a layer, None = everything."""
        starts = [start for start in self.stages if start <= layer]
        return self.stages[max(starts)] if starts else None

    def image(self, layer: int) -> Tensor:
        """[B, M] the image of its row that each token of a layer belongs to, -1 = none."""
        stage = self.stage(layer)
        if stage is None:
            return self.prompt.image
        key = ("image", stage.start)
        if key not in self.memo:
            self.memo[key] = take(self.prompt.image, stage.index).masked_fill(~stage.valid, -1)
        found: Tensor = self.memo[key]
        return found

    def with_first_tokens(self, layer: int, hidden: Tensor) -> Tensor:
        """Hidden states [B, M, D] before a layer, with the first token of each prompt with pictures as the method makes it."""
        before = self.stage(layer - 1)
        valid = self.prompt.valid if before is None else before.valid
        if "pictures" not in self.memo:
            self.memo["pictures"] = (self.prompt.image >= 0).any(1).nonzero().flatten()
        rows = self.memo["pictures"].to(hidden.device)
        place = rows, valid.long().argmax(1).to(hidden.device)[rows]
        if self.first_tokens is None or not len(rows):
            return hidden
        return hidden.index_put(place, self.first_tokens(layer, hidden[place]).to(hidden))

    def sees_pictures(self, layer: int) -> bool:
        """Whether a layer runs any visual token; known without waiting for the device."""
        stage = self.stage(layer)
        return stage is None or stage.visual > 0

    def note_columns(self, layer: int) -> None:
        """Note the column of each key of a layer, before its attention adds the new ones to its cache."""
        stage, held = self.stage(layer), self.held(layer)
        key = ("columns", -1 if stage is None else stage.start, id(held), self.length(layer))
        if key not in self.memo:
            if stage is None:
                column = torch.arange(self.width, device=self.prompt.valid.device).expand(self.rows, -1)
                now = torch.where(self.prompt.valid, column + self.past, -1)
            else:
                now = torch.where(stage.valid, stage.index + self.past, -1)
            self.memo[key] = torch.cat([self._past_columns(layer, held).to(now.device), now], 1)
        self.columns[layer] = self.memo[key]

    def _past_columns(self, layer: int, held: Held | None) -> Tensor:
        """[B, n] columns of the keys in a layer's cache, those included that a sliding window forgot."""
        length, real = self.length(layer), self.prompt.past_valid
        if length == 0:
            return torch.zeros(self.rows, 0, dtype=torch.long, device=real.device)
        if held is None:
            columns = torch.arange(length, device=real.device).expand(self.rows, -1)
        else:
            columns = held.extended(length, 0, self.rows).to(real.device)
        return columns.masked_fill(~real.gather(1, columns.clamp(min=0)), -1)

    def plain(self, layer: int, stage: Stage) -> bool:
        """No key of the layer is padding."""
        held = self.held(layer)
        if self.past > 0 and "past" not in self.memo:
            self.memo["past"] = bool(self.prompt.past_valid.all())
        return stage.plain and (self.past == 0 or (self.memo["past"] and (held is None or held.plain)))

    def hold(self, layer: int, stage: Stage) -> None:
        """Note for later forwards which columns the caches hold, of this layer and those after it up to the next cut."""
        if self.cuts is None:
            return
        ahead = self.width - self.asked  # guesses may be taken back
        columns = self.columns[layer]
        columns = columns[:, : columns.shape[1] - ahead]
        self.cuts.held[layer] = Held(columns, self.past + self.asked, self.plain(layer, stage), stage.shift)

    def numbered_as_held(self, layer: int, stage: Stage | None) -> Tensor | None:
        """[B, M] position of each token as this layer's cache counts them. None if the prompt already counts that way."""
        held, above = self.held(layer), self.held(layer - 1)
        shift = None if held is None else held.shift
        if shift is None:
            return None
        # by the prompt's own count, less what the cache of this layer is behind; a stage may be counted anew already
        mine = self.positions.to(shift.device).expand(self.rows, -1)
        if stage is not None:
            mine = take(mine, stage.index) if stage.positions is None else stage.positions
            shift = shift - (0 if stage.positions is None or above is None or above.shift is None else above.shift)
        return (mine - shift).clamp(min=0)

    def positions_of(self, stage: Stage) -> Tensor:
        """[B, M] positions of the tokens of a stage."""
        return take(self.positions.expand(self.rows, -1), stage.index) if stage.positions is None else stage.positions

    def inputs(self, layer: int, stage: Stage, hidden: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments of a layer that runs fewer tokens."""
        own = ("attention_mask", "hidden_states", "position_ids")
        changed: dict[str, Any] = {name: self.followed(stage, value) for name, value in kwargs.items() if name not in own}
        number = stage.index.shape[1]
        if stage.positions is None:
            changed["position_embeddings"] = self._gathered(layer, stage, kwargs["position_embeddings"], hidden.device)
        else:
            changed["position_embeddings"] = self.rotary(layer, hidden, stage.positions, stage.start)
        if self.kind.reads_positions:
            changed["position_ids"] = self.positions_of(stage).to(hidden.device)
        else:  # rotary embeddings are made already; flash attention takes gaps in position ids for packed sequences
            changed["position_ids"] = torch.arange(number, device=hidden.device)[None]
        changed["attention_mask"] = self.mask_before(layer, stage, hidden, kwargs["attention_mask"])
        return changed

    def followed(self, stage: Stage, value: Any) -> Any:
        """An argument of a layer; what has one entry per token of the prompt, such as per-layer embeddings, is shortened."""
        follows = isinstance(value, Tensor) and value.ndim >= 2 and value.shape[1] == self.width
        return take(value, stage.index) if follows else value

    def mask_before(self, layer: int, stage: Stage | None, hidden: Tensor, whole: Any) -> Tensor | None:
        """The mask of a layer that runs a stage; ``whole`` is what the model made for all of the prompt.

        A mask [B, 1, S, K] of the model's own says who sees whom, so that its rows and columns are taken; elsewhere it is causal.
        """
        if stage is None:
            return whole if isinstance(whole, Tensor) else None
        number, window = stage.index.shape[1], self.window(layer)
        own = self.kind.two_way and isinstance(whole, Tensor) and whole.ndim == 4
        key = ("mask", stage.start, window, id(self.held(layer)), hidden.device, self.kind.kinds[layer] if own else None)
        if key not in self.memo:
            columns = self.present(layer, self.columns[layer].to(hidden.device), number)
            if own:
                self.memo[key] = taken_mask(whole, columns, number, self.past, self.past + self.width)
            else:
                self.memo[key] = self.mask_of(columns, number, plain=self.plain(layer, stage), window=window, hidden=hidden)
        mask: Tensor | None = self.memo[key]
        return mask

    def _gathered(self, layer: int, stage: Stage, embeddings: Any, device: torch.device) -> Any:
        key = ("gathered", stage.start, self.kind.kinds[layer], device)
        if key not in self.memo:
            self.memo[key] = tuple(take(part, stage.index) for part in embeddings)
        return self.memo[key]
