"""What the pocket model is trained on: the answers, and auxiliary losses whose heads are thrown away afterwards.

There is no supervision of attention anywhere: which patches [CLS] looks at follows from the captions it has to match.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from .answers import text_states
from .batches import BINS, CAPTION_SIZE, PATCH_TARGETS, Batch
from .questions import QUESTION_KINDS
from .rows import IGNORE
from .vocabulary import COLORS, COLUMNS, DIGITS, EOS, ROWS, SHAPES, TOKEN_ID, WORDS

PATCH_WEIGHTS = dict(zip(PATCH_TARGETS, (1, 0.7, 1.2, 1, 0.7, 0.7, 0.2, 1.2, 0.4, 0.4), strict=True))
BACKGROUND_WEIGHT = 0.15
# an answer of a rare family counts more, so that reading is not drowned by the many questions about shapes
FAMILY_WEIGHTS = dict(zip(QUESTION_KINDS, (1, 1, 1, 1, 1.2, 1.5, 1.5, 4, 4, 4, 1, 1), strict=True))
SPREAD = 1.5  # standard deviation of the attention logits of [CLS] over the patches
QUEUE = 256  # captions of earlier batches, as further negatives


class PocketTrainee(nn.Module):
    """The model with its auxiliary heads; ``forward`` returns the loss and what to log."""

    queue: Tensor

    def __init__(self, model: LlavaForConditionalGeneration) -> None:
        super().__init__()
        self.model = model
        vision, text = model.model.vision_tower.config.hidden_size, model.model.language_model.config.hidden_size
        self.patch_head = nn.Linear(vision, sum(PATCH_TARGETS.values()))
        self.image_head = nn.Linear(vision, vision, bias=False)
        self.caption_head = nn.Linear(CAPTION_SIZE, vision)
        self.temperature = nn.Parameter(torch.tensor(2.0))
        self.grounding_heads = nn.ModuleList(nn.Linear(text, 2 * BINS + 2) for _ in range(2))
        self.register_buffer("queue", torch.zeros(QUEUE, CAPTION_SIZE))
        ids = {"color": COLORS, "shape": SHAPES, "word": WORDS, "digit": DIGITS, "row": ROWS, "column": COLUMNS}
        self.named_ids = {name: [TOKEN_ID[word] for word in words] for name, words in ids.items()}

    def body_matrices(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The weights for the matrix optimiser: the 2-D ones of the blocks and the projector."""
        for name, parameter in self.model.named_parameters():
            if parameter.ndim == 2 and ("layers." in name or "projector" in name):
                yield name, parameter

    def encode(self, pixels: Tensor, positions: Tensor) -> Tensor:
        """Windows of pictures -> hidden states [B, 1 + N, C] before the last block.

        The model's own modules, with the rows of the position table that belong to the window.
        """
        tower = self.model.model.vision_tower
        embeddings = tower.embeddings
        patches = embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)
        table = embeddings.position_embedding.weight
        cls = (embeddings.class_embedding + table[0]).expand(len(pixels), 1, -1)
        hidden = tower.pre_layrnorm(torch.cat([cls, patches + table[positions]], 1))
        for layer in tower.encoder.layers[:-1]:
            hidden = layer(hidden, None)
        return hidden

    def summarise(self, hidden: Tensor, calm: bool) -> tuple[Tensor, Tensor]:
        """The final [CLS] [B, C], and by how much its attention in the last block is sharper than that of large encoders.

        Left alone, [CLS] puts all its attention on ten tokens, with logits 50 above the others; no rule on its attention then means
        anything. ``calm`` training hides a random half of the patches from the last block, so that all patches of an object
        matter, and penalises a spread of the logits above ``SPREAD``. It says nothing about where to look.
        """
        tower = self.model.model.vision_tower
        layer = tower.encoder.layers[-1]
        if calm:
            patches = hidden.shape[1] - 1
            shown = torch.rand(len(hidden), patches, device=hidden.device).argsort(1)[:, : (patches + 1) // 2] + 1
            shown = torch.cat([shown.new_zeros(len(shown), 1), shown], 1)
            hidden = hidden.gather(1, shown[..., None].expand(-1, -1, hidden.shape[-1]))
        normed, heads = layer.layer_norm1(hidden), tower.config.num_attention_heads
        query = layer.self_attn.q_proj(normed[:, 0]).unflatten(-1, (heads, -1))
        keys = layer.self_attn.k_proj(normed[:, 1:]).unflatten(-1, (heads, -1))
        spread = (torch.einsum("bhd,bnhd->bhn", query, keys).float() * query.shape[-1] ** -0.5).std(-1)
        return tower.post_layernorm(layer(hidden, None)[:, 0]), F.relu(spread - SPREAD).square().mean()

    def forward(self, batch: Batch, language: bool, calm: bool) -> tuple[Tensor, dict[str, Tensor]]:
        hidden = self.encode(batch.pixels, batch.positions)
        features = hidden[:, 1:]
        cls, excess = self.summarise(hidden, calm)
        visual = self.model.model.multi_modal_projector(features)
        log: dict[str, Tensor] = {}
        patch = self._patch_loss(features, batch, log)
        align = self._alignment_loss(visual, batch, log, learn_words=language)
        loss = (0.5 if language else 1.0) * (patch + 0.6 * align) + 0.7 * self._caption_loss(cls, batch, log)
        log["excess"] = excess.detach()
        if calm:
            loss = loss + 0.05 * excess
        if language:
            real = torch.ones(visual.shape[:2], dtype=torch.bool, device=visual.device)
            states = text_states(self.model, visual, real, {"ids": batch.ids, "block": batch.block, "offset": batch.offset})
            loss = loss + 3.5 * self._answer_loss(states[-1], batch, log)
            for head, state in zip(self.grounding_heads, states[2:4], strict=True):
                loss = loss + 0.3 * self._grounding_loss(head, state, batch, log)
        return loss, log

    def _patch_loss(self, features: Tensor, batch: Batch, log: dict[str, Tensor]) -> Tensor:
        outputs = self.patch_head(features).float().split(list(PATCH_TARGETS.values()), -1)
        total = outputs[0].sum() * 0
        for i, (name, logits) in enumerate(zip(PATCH_TARGETS, outputs, strict=True)):
            target = batch.patches[..., i]
            asked = target != IGNORE
            if not asked.any():
                continue
            weight = None
            if name == "kind":
                weight = torch.ones(logits.shape[-1], device=logits.device)
                weight[0] = BACKGROUND_WEIGHT
            total = total + PATCH_WEIGHTS[name] * F.cross_entropy(logits[asked], target[asked], weight)
            shown = asked & (target > 0) if name == "kind" else asked
            log[f"patch/{name}"] = (logits.argmax(-1) == target)[shown].float().mean()
        return total

    def _alignment_loss(self, visual: Tensor, batch: Batch, log: dict[str, Tensor], learn_words: bool) -> Tensor:
        """Projected patches point at the word embeddings of what they show (input and output embeddings of the decoder)."""
        names = list(PATCH_TARGETS)
        target = {name: batch.patches[..., names.index(name)] for name in names}
        nothing = torch.full_like(target["kind"], IGNORE)
        shapes = (target["kind"] >= 1) & (target["kind"] <= len(SHAPES))
        printed = (target["tens"] != IGNORE) & (target["character"] >= 26)
        wanted = {
            "color": target["color"],
            "shape": torch.where(shapes, target["kind"] - 1, nothing),
            "word": target["word"],
            "digit": torch.where(printed, target["character"] - 26, target["digit"]),
            "row": torch.where(target["row"] != IGNORE, target["row"] // (BINS // 3), nothing),
            "column": torch.where(target["column"] != IGNORE, target["column"] // (BINS // 3), nothing),
        }
        direction = F.normalize(visual.float(), dim=-1)
        total = direction.sum() * 0
        for name, classes in wanted.items():
            asked = classes != IGNORE
            if not asked.any():
                continue
            for words in (self.model.model.language_model.embed_tokens.weight, self.model.lm_head.weight):
                table = words[self.named_ids[name]] if learn_words else words[self.named_ids[name]].detach()
                logits = 12 * direction[asked] @ F.normalize(table.float(), dim=-1).T
                total = total + (0.5 if name in ("row", "column") else 1.0) * F.cross_entropy(logits, classes[asked])
        return total

    def _caption_loss(self, cls: Tensor, batch: Batch, log: dict[str, Tensor]) -> Tensor:
        """InfoNCE of [CLS] against captions: of the batch, of earlier ones, and wrong ones of the same picture."""
        image = F.normalize(self.image_head(cls).float(), dim=-1)
        right = F.normalize(self.caption_head(batch.caption).float(), dim=-1)
        wrong = F.normalize(self.caption_head(batch.wrong_captions).float(), dim=-1)
        earlier = F.normalize(self.caption_head(self.queue).float(), dim=-1)
        scale = self.temperature.exp().clamp(max=60)
        own = torch.arange(len(image), device=image.device)
        others = torch.cat([batch.caption, self.queue])
        logits = scale * image @ torch.cat([right, earlier]).T
        same = (batch.caption[:, None] == others[None]).all(-1)
        same[own, own] = False  # an identical caption of another picture is not a negative
        logits = logits.masked_fill(same, -1e4)
        hard = scale * torch.einsum("bc,bmc->bm", image, wrong)
        log["caption"] = (torch.cat([logits, hard], 1).argmax(1) == own).float().mean()
        log["caption/hard"] = (hard < logits[own, own][:, None]).all(1).float().mean()
        self.queue = torch.cat([batch.caption, self.queue])[:QUEUE].detach()
        backward = F.cross_entropy(logits[:, : len(image)].T, own)
        return F.cross_entropy(torch.cat([logits, hard], 1), own) + 0.5 * backward

    def _answer_loss(self, hidden: Tensor, batch: Batch, log: dict[str, Tensor]) -> Tensor:
        asked = batch.labels != IGNORE
        labels, family = batch.labels[asked], batch.family[asked]
        logits = self.model.lm_head(hidden[asked]).float()
        losses = F.cross_entropy(logits, labels, reduction="none")
        weight = torch.tensor(list(FAMILY_WEIGHTS.values()), device=losses.device)[family]
        log["loss"] = losses.mean().detach()
        correct, word = logits.argmax(-1) == labels, labels != EOS
        for i, name in enumerate(QUESTION_KINDS):
            mine = (family == i) & word
            if mine.any():
                log[f"answer/{name}"] = correct[mine].float().mean()
        return (losses * weight).sum() / weight.sum()

    def _grounding_loss(self, head: nn.Module, hidden: Tensor, batch: Batch, log: dict[str, Tensor]) -> Tensor:
        """Early decoder layers know, at the word that names an object, where it is and whether it is there at all."""
        asked = (batch.grounding != IGNORE).any(-1)
        total = hidden.sum() * 0
        if not asked.any():
            return total
        outputs = head(hidden[asked]).float().split([BINS, BINS, 2], -1)
        for name, logits, target in zip(("column", "row", "present"), outputs, batch.grounding[asked].T, strict=True):
            known = target != IGNORE
            if known.any():
                total = total + F.cross_entropy(logits[known], target[known])
                log[f"grounding/{name}"] = (logits.argmax(-1) == target)[known].float().mean()
        return total
