"""What the second pocket model is trained on: the answers, and auxiliary losses whose heads are thrown away afterwards."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen2_5_VLForConditionalGeneration

from ..answers import answer_mask
from ..batches import BINS
from ..build import PIXEL_MEAN, PIXEL_STD
from ..rows import IGNORE
from ..vocabulary import COLORS, COLUMNS, DIGITS, ROWS, SHAPES, WORDS
from .batches import EVENT_CLASSES, PATCH_TARGETS, TARGET_NAMES, Batch
from .encoding import encode
from .grounding import GROUNDING
from .pictures import CELL
from .questions import FAMILIES
from .vocabulary import END, START, TOKEN_ID, VISION_END, VISION_START

PATCH_WEIGHTS = dict(zip(PATCH_TARGETS, (1, 0.7, 1.2, 1, 0.7, 0.7, 0.2, 1.2, 0.4, 0.4, 0.7), strict=True))
BACKGROUND_WEIGHT = 0.15
# an answer of a rare or hard family counts more
FAMILY_WEIGHTS = {
    "existence_adversarial": 2.5,
    "color": 1.5,
    "shape": 2,
    "count": 2,
    "where": 2,
    "relation": 2.5,
    "choice": 2.5,
    "pair": 2,
    "word": 3,
    "number": 3,
    "digit": 3,
    "board": 2.5,
    "page": 2,
    "brief": 2.5,
    "order": 3,
    "first": 3,
}
GROUNDED = (2, 4, 5)  # hidden states of the decoder from which a thing is found
PLACED = (1, 3)  # hidden states of visual tokens that tell where and when they are, and what happens there
PLACES = 16  # classes of two rows, two columns or two positions in time; the last one is all that comes later
UNEVENTFUL_WEIGHT = 0.05
OPENING = (START, TOKEN_ID["user"])


def prefix_layout(pictures: int, times: int, rows: int, columns: int, interval: float) -> tuple[list[int], Tensor, int]:
    """What stands before the questions: token ids (-1 = visual), positions [3, length] and the position of what follows.

    Parameters
    ----------
    pictures : how many, or one clip.
    times, rows, columns : of tokens in each.
    interval : positions from one temporal patch to the next.
    """
    ids, positions = list(OPENING), [torch.arange(len(OPENING)).expand(3, -1)]
    at = len(OPENING)
    grid = torch.stack(torch.meshgrid(torch.arange(times), torch.arange(rows), torch.arange(columns), indexing="ij")).flatten(1)
    grid[0] = (grid[0] * interval).long()
    for _ in range(pictures):
        ids += [VISION_START, *[-1] * (times * rows * columns), VISION_END]
        after = at + 1 + max(rows, columns)
        positions += [torch.full((3, 1), at), grid + at + 1, torch.full((3, 1), after)]
        at = after + 1
    return ids, torch.cat(positions, 1), at


class NativeTrainee(nn.Module):
    """The model with its auxiliary heads; ``forward`` returns the loss and what to log."""

    family_weights: Tensor

    def __init__(self, model: Qwen2_5_VLForConditionalGeneration) -> None:
        super().__init__()
        self.model = model
        text: Any = model.config.get_text_config()
        self.patch_head = nn.Linear(model.model.visual.config.hidden_size, sum(PATCH_TARGETS.values()))
        self.grounding_heads = nn.ModuleList(nn.Linear(text.hidden_size, sum(GROUNDING.values())) for _ in GROUNDED)
        ids = {"color": COLORS, "shape": SHAPES, "word": WORDS, "digit": DIGITS, "row": ROWS, "column": COLUMNS}
        for name, words in ids.items():
            self.register_buffer(f"{name}_ids", torch.tensor([TOKEN_ID[word] for word in words]), persistent=False)
        self.named = tuple(ids)
        self.place_heads = nn.ModuleList(nn.Linear(text.hidden_size, 3 * PLACES + len(EVENT_CLASSES)) for _ in PLACED)
        weights = torch.tensor([float(FAMILY_WEIGHTS.get(name, 1)) for name in FAMILIES])
        self.register_buffer("family_weights", weights, persistent=False)

    def body_matrices(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The weights for the matrix optimiser: the 2-D ones of the blocks and the merger."""
        for name, parameter in self.model.named_parameters():
            if parameter.ndim == 2 and any(part in name for part in ("layers.", "blocks.", "merger.")):
                yield name, parameter

    def forward(self, batch: Batch, language: bool) -> tuple[Tensor, dict[str, Tensor]]:
        pixels = (batch.frames.permute(0, 1, 4, 2, 3).float() / 255 - PIXEL_MEAN) / PIXEL_STD
        if pixels.shape[1] == 1:  # a picture is shown twice
            pixels = pixels.expand(-1, 2, -1, -1, -1)
        patches, tokens = encode(self.model.model.visual, pixels.unflatten(1, (-1, 2)).contiguous())
        log: dict[str, Tensor] = {}
        loss = self._patch_loss(patches, batch.patches.long(), log) + 0.6 * self._alignment_loss(
            tokens, batch.tokens.long(), language
        )
        if not language:
            return loss, log
        states, places = self._states(tokens, batch, batch.frames.shape[1:4])
        text = batch.ids.shape[1]
        loss = 0.5 * loss + 3 * self._answer_loss(states[-1][:, -text:], batch, log)
        for number, head in zip(GROUNDED, self.grounding_heads, strict=True):
            loss = loss + 0.25 * self._grounding_loss(head, states[number][:, -text:], batch, log)
        for number, head in zip(PLACED, self.place_heads, strict=True):
            loss = loss + 0.3 * self._place_loss(head, states[number][:, :-text], places, batch, log)
        return loss, log

    def _states(self, tokens: Tensor, batch: Batch, shape: torch.Size) -> tuple[tuple[Tensor, ...], Tensor]:
        """Hidden states of the decoder, each [B, P + T, D], and the places [P, 3] of the prefix (IGNORE = not a visual token)."""
        frames, height, width = shape
        decoder, size = self.model.model.language_model, len(batch.ids)
        pictures, device = len(tokens) // size, tokens.device
        grid = (max(1, frames // 2), height // CELL, width // CELL)
        layout = prefix_layout(pictures, *grid, float(batch.interval))
        ids = torch.tensor(layout[0], device=device)
        head = decoder.embed_tokens(ids.clamp(min=0)).expand(size, -1, -1)
        visual = tokens.reshape(size, -1, tokens.shape[-1]).to(head.dtype)
        head = head.masked_scatter((ids < 0)[None, :, None], visual)
        inputs = torch.cat([head, decoder.embed_tokens(batch.ids)], 1)
        real = torch.ones(size, len(ids), dtype=torch.bool, device=device)
        before = layout[1].to(device)[:, None].expand(-1, size, -1)
        positions = torch.cat([before, (layout[2] + batch.offset).expand(3, -1, -1)], 2)
        mask = {"full_attention": answer_mask(real, batch.block)}
        out = decoder(inputs_embeds=inputs, attention_mask=mask, position_ids=positions, use_cache=False, output_hidden_states=True)
        places = torch.full((len(ids), 3), IGNORE, device=device)
        own = layout[1].T[layout[0].index(-1) :][: math.prod(grid)]
        places[ids < 0] = ((own - own[0]) // 2).clamp(max=PLACES - 1).to(device).repeat(pictures, 1)
        return out.hidden_states, places

    def _patch_loss(self, patches: Tensor, targets: Tensor, log: dict[str, Tensor]) -> Tensor:
        """What a patch of the encoder shows."""
        outputs = self.patch_head(patches).float().split(list(PATCH_TARGETS.values()), -1)
        total = patches.new_zeros((), dtype=torch.float32)
        for name, logits, target in zip(PATCH_TARGETS, outputs, targets.unbind(-1), strict=True):
            losses = F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=IGNORE, reduction="none")
            asked = (target != IGNORE).flatten().float()
            if name == "kind":
                asked = torch.where(target.flatten() == 0, BACKGROUND_WEIGHT, asked)
            total = total + PATCH_WEIGHTS[name] * (losses * asked).sum() / asked.sum().clamp(min=1)
            shown = target > 0 if name == "kind" else target != IGNORE
            log[f"patch/{name}"] = ((logits.argmax(-1) == target) & shown).sum() / shown.sum()
        return total

    def _alignment_loss(self, visual: Tensor, targets: Tensor, learn_words: bool) -> Tensor:
        """Visual tokens point at the word embeddings of what they show (input and output embeddings of the decoder)."""
        target = dict(zip(TARGET_NAMES, targets.unbind(-1), strict=True))
        kind, printed = target["kind"], (target["tens"] != IGNORE) & (target["character"] >= 26)
        wanted = {
            "color": target["color"],
            "shape": torch.where((kind >= 1) & (kind <= len(SHAPES)), kind - 1, IGNORE),
            "word": target["word"],
            "digit": torch.where(printed, target["character"] - 26, target["digit"]),
            "row": torch.where(kind > 0, target["row"] // (BINS // 3), IGNORE),
            "column": torch.where(kind > 0, target["column"] // (BINS // 3), IGNORE),
        }
        direction = F.normalize(visual.float(), dim=-1).flatten(0, 1)
        total = direction.new_zeros(())
        for words in (self.model.model.language_model.embed_tokens.weight, self.model.lm_head.weight):
            table = F.normalize((words if learn_words else words.detach()).float(), dim=-1)
            for name in self.named:
                classes = wanted[name].flatten()
                logits = 12 * direction @ table[getattr(self, f"{name}_ids")].T
                losses = F.cross_entropy(logits, classes, ignore_index=IGNORE, reduction="sum")
                total = total + (0.5 if name in ("row", "column") else 1.0) * losses / (classes != IGNORE).sum().clamp(min=1)
        return total

    def _answer_loss(self, hidden: Tensor, batch: Batch, log: dict[str, Tensor]) -> Tensor:
        logits, labels, family = self.model.lm_head(hidden).float().flatten(0, 1), batch.labels.flatten(), batch.family.flatten()
        losses = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none")
        asked = labels != IGNORE
        weight = self.family_weights[family] * asked
        log["loss"] = losses.detach().sum() / asked.sum()
        correct, word = logits.argmax(-1) == labels, asked & (labels != END)
        for number, name in enumerate(FAMILIES):
            mine = (family == number) & word
            log[f"answer/{name}"] = (correct & mine).sum() / mine.sum()
        return (losses * weight).sum() / weight.sum()

    def _grounding_loss(self, head: nn.Module, hidden: Tensor, batch: Batch, log: dict[str, Tensor]) -> Tensor:
        """Decoder layers know, at the word that names a thing, where and when it is, and whether it is there at all."""
        outputs = head(hidden).float().split(list(GROUNDING.values()), -1)
        total = hidden.new_zeros((), dtype=torch.float32)
        for name, logits, target in zip(GROUNDING, outputs, batch.grounding.unbind(-1), strict=True):
            known = target != IGNORE
            losses = F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=IGNORE, reduction="sum")
            total = total + losses / known.sum().clamp(min=1)
            log[f"grounding/{name}"] = ((logits.argmax(-1) == target) & known).sum() / known.sum()
        return total

    def _place_loss(self, head: nn.Module, hidden: Tensor, places: Tensor, batch: Batch, log: dict[str, Tensor]) -> Tensor:
        """Inside the decoder, visual tokens tell their time, row and column, and what has just happened there.

        Positions only rotate queries and keys there, and only the frames before show what has just appeared, vanished or changed.
        """
        outputs = head(hidden[:, places[:, 0] != IGNORE]).float()
        logits, happens = outputs[..., : 3 * PLACES].unflatten(-1, (3, PLACES)), outputs[..., 3 * PLACES :].flatten(0, 1)
        target = places[places[:, 0] != IGNORE].expand(len(hidden), -1, -1)
        for number, name in enumerate(("time", "row", "column")):
            log[f"place/{name}"] = (logits[:, :, number].argmax(-1) == target[..., number]).float().mean()
        loss = F.cross_entropy(logits.flatten(0, 2), target.flatten())
        events = batch.events.long().flatten()
        log["place/event"] = ((happens.argmax(-1) == events) & (events > 0)).sum() / (events > 0).sum()
        losses = F.cross_entropy(happens, events, ignore_index=IGNORE, reduction="none")
        weight = torch.where(events > 0, 1.0, UNEVENTFUL_WEIGHT) * (events != IGNORE)
        return loss + (losses * weight).sum() / weight.sum().clamp(min=1)
