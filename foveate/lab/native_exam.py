"""All questions about a picture or clip of the second pocket world in one forward, with the tokens that a method leaves of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..chat import collate, question_about
from ..loading import Loaded
from ..methods.base import FrontReducer, KeepAll
from ..pictures import Pictures
from ..pocket.answers import answer_mask
from ..pocket.native.batches import LANGUAGE, text_rows
from ..pocket.native.clips import Clip
from ..pocket.native.objectives import prefix_layout
from ..pocket.native.pictures import CELL, Picture
from ..pocket.rows import IGNORE
from .exam import Result, as_shown
from .testset import TestSet

CLIP_INTERVAL = 2.0  # positions from one temporal patch of a clip to the next, as the processor makes them


class NativeEvaluator:
    """Encodes the pictures and clips of a test set once. For methods that act before the decoder and never see the question.

    Parameters
    ----------
    loaded : the second pocket model.
    data : the test set.
    """

    def __init__(self, loaded: Loaded, data: TestSet[Picture | Clip]) -> None:
        self.loaded, self.data = loaded, data
        self.depth = int(loaded.model.config.get_text_config().num_hidden_layers)
        self.pictures: list[Pictures] = []
        self.text: list[dict[str, Tensor]] = []
        for scene, asked in zip(data.scenes, data.questions, strict=True):
            prompt = question_about(loaded.processor, loaded.model, as_shown(scene), asked[0].text)
            self.pictures.append(Pictures(loaded.model, **collate(loaded, [prompt])))
            rows = LANGUAGE.collated([text_rows([(question, None) for question in asked])])
            self.text.append({name: value.to(loaded.model.device) for name, value in rows.items()})

    @torch.no_grad()
    def run(self, method: FrontReducer | None) -> Result:
        """Answer everything with the tokens a method leaves; None = all of them."""
        right: list[bool] = []
        tokens: list[int] = []
        for scene, pictures, text in zip(self.data.scenes, self.pictures, self.text, strict=True):
            reduced = pictures.reduce(method or KeepAll())
            tokens.append(len(reduced.embeds[0]))
            right += self._answers(scene, reduced.embeds[0], torch.tensor(reduced.report.kept[0]), text)
        return Result(np.array(right, bool), tokens, [float(np.mean(tokens))] * self.depth)

    def _answers(self, scene: Picture | Clip, embeds: Tensor, kept: Tensor, text: dict[str, Tensor]) -> list[bool]:
        """Per question whether every token of the answer, its end included, is the most likely one."""
        model: Any = self.loaded.model
        decoder, device = model.model.language_model, embeds.device
        width, height = scene.size
        times, interval = (scene.patches, CLIP_INTERVAL) if isinstance(scene, Clip) else (1, 1.0)
        ids, positions, after = prefix_layout(1, times, height // CELL, width // CELL, interval)
        places = torch.tensor(ids)
        visual = (places < 0).nonzero().flatten()
        stays = torch.cat([(places >= 0).nonzero().flatten(), visual[kept]]).sort().values.to(device)
        places, positions = places.to(device)[stays], positions.to(device)[:, None, stays]
        head = decoder.embed_tokens(places.clamp(min=0))
        head[places < 0] = embeds.to(head.dtype)
        inputs = torch.cat([head[None], decoder.embed_tokens(text["ids"])], 1)
        where = torch.cat([positions, (after + text["offset"]).expand(3, -1, -1)], 2)
        real = torch.ones(1, len(places), dtype=torch.bool, device=device)
        mask = {"full_attention": answer_mask(real, text["block"])}
        out = decoder(inputs_embeds=inputs, attention_mask=mask, position_ids=where, use_cache=False)
        labels, block = text["labels"][0], text["block"][0]
        asked = labels != IGNORE
        found = model.lm_head(out.last_hidden_state[0, len(places) :][asked]).argmax(-1)
        wrong = torch.zeros_like(asked)
        wrong[asked] = found != labels[asked]
        return [not bool(wrong[block == number].any()) for number in range(int(block.max()) + 1)]
