"""T11: the positions that the decoder of each family reads, for small prompts, worked out by hand.

A prompt is <s>, a word, a medium with what its processor writes around it, and two words; the first and the last token of each grid
stay.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch

from foveate.families import FAMILIES
from foveate.methods.base import ProjectorReducer
from foveate.tokens import Reduction, VisualTokens

from ... import families
from ...family_prompts import IMAGE, VIDEO, Medium


@dataclass(kw_only=True)
class Ends(ProjectorReducer):
    """The first and the last token of each grid."""

    def reduce(self, tokens: VisualTokens) -> Reduction:
        return Reduction(torch.tensor([0, tokens.number - 1]).expand(len(tokens.features), -1))


@contextmanager
def positions_read(model: torch.nn.Module) -> Iterator[list[list]]:
    """What the decoder gets for one row at each call: numbers, or [time, height, width]."""
    found: list[list] = []

    def look(_, __, kwargs):
        places = kwargs["position_ids"]
        found.append(places[-3:, 0].T.tolist() if places.ndim == 3 else places[0].tolist())

    handle = families.decoder_of(model).register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield found
    finally:
        handle.remove()


def text(*numbers: int) -> list[list[int]]:
    return [[number] * 3 for number in numbers]


SPLIT, FILM, CLIP = Medium((1, 2)), Medium(frames=3), Medium((6, 8), frames=4)
GOLDENS: dict[str, tuple[Medium, list]] = {
    "llava": (Medium(), [0, 1, 2, 65, 66, 67]),
    "vipllava": (Medium(), [0, 1, 2, 37, 38, 39]),
    # 48 and 103 end the first and last of six lines of ten, of which each tile has five; the lines between are gone
    "llava_next": (Medium((84, 150)), [0, 1, 2, 37, 38, 43, 48, 97, 102, 103, 104, 105]),
    "llava_next_video": (FILM, [0, 1, 2, 10, 11, 19, 20, 28, 29, 30]),
    "llava_onevision": (FILM, [0, 1, 2, 10, 11, 19, 20, 28, 29, 30, 31]),  # 29 ends the video
    "video_llava": (FILM, [0, 1, 2, 3, 18, 19, 20, 35, 36, 37, 52, 53, 54]),  # 2, 19 and 36 are [CLS]
    "gemma3": (Medium(), [0, 1, 2, 3, 4, 19, 20, 21, 22, 23]),
    "paligemma": (Medium(), [1, 64, 65, 66, 67, 68, 69]),  # counts from 1, pictures come first
    "internvl": (SPLIT, [0, 1, 2, 3, 11, 12, 20, 21, 22, 23]),
    "idefics3": (SPLIT, [0, 1, 2, 3, 4, 12, 13, 14, 15, 23, 24, 25, 26, 27, 28, 36, 37, 38, 39]),
    "smolvlm": (SPLIT, [0, 1, 2, 3, 4, 12, 13, 14, 15, 23, 24, 25, 26, 27, 28, 36, 37, 38, 39]),
    "qianfan_ocr": (SPLIT, [0, 1, 2, 3, 11, 12, 20, 21, 22, 23]),
    "cohere2_vision": (SPLIT, [0, 1, 2, 3, 11, 12, 13, 21, 22, 23, 31, 32, 33, 34, 35]),
    "gemma4": (Medium((6, 8)), [0, 1, 2, 3, 14, 15, 16, 17]),
    "llama4": (SPLIT, [0, 1, 2, 3, 11, 12, 13, 21, 22, 23, 24, 32, 33, 34, 35]),
    "lfm2_vl": (Medium((6, 8)), [0, 1, 2, 3, 14, 15, 16, 17]),
    "ovis2": (SPLIT, [0, 1, 2, 3, 11, 12, 13, 21, 22, 23, 31, 32, 33, 34]),
    "lighton_ocr": (Medium((84, 112)), [0, 1, 2, 3, 14, 15, 16, 17]),
    "aya_vision": (SPLIT, [0, 1, 2, 3, 4, 12, 13, 14, 22, 23, 24, 32, 33, 34, 35]),
    "mistral3": (Medium((84, 112)), [0, 1, 2, 6, 11, 15, 16, 17, 18]),  # 6 and 11 are breaks between lines of four
    "glm4v": (Medium((6, 8)), [*text(0, 1, 2), [3, 3, 3], [3, 5, 6], *text(7, 8, 9)]),
    "qwen2_vl": (CLIP, [*text(0, 1, 2), *([t, *at] for t in (3, 4, 5, 6) for at in ([3, 3], [5, 6])), *text(7, 8, 9)]),
    "qwen2_5_vl": (CLIP, [*text(0, 1, 2), *([t, *at] for t in (3, 6, 9, 12) for at in ([3, 3], [5, 6])), *text(7, 8, 9)]),
}


GOLDENS |= dict.fromkeys(
    ("qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"),
    (
        CLIP,  # each frame has its time and its marks around it
        [
            *[*text(0, 1, 2, 3, 4), [5, 5, 5], [5, 7, 8]],
            *[*text(9, 10, 11, 12), [13, 13, 13], [13, 15, 16]],
            *[*text(17, 18, 19, 20), [21, 21, 21], [21, 23, 24]],
            *[*text(25, 26, 27, 28), [29, 29, 29], [29, 31, 32]],
            *text(33, 34, 35),
        ],
    ),
)
GOLDENS |= dict.fromkeys(("paddleocr_vl", "glm4v_moe", "glm46v"), GOLDENS["glm4v"])


@pytest.mark.parametrize("positions", ["compact", "original"])
@pytest.mark.parametrize("family", FAMILIES)
def test_t11_positions(family, positions):
    """While a prompt is read and while decoding goes on; M-RoPE models keep (time, height, width) in both cases, and say so."""
    medium, expected = GOLDENS[family]
    model, spec = families.load(family), families.SPECS[family]
    ids = families.prompt(family, [medium], before=1, after=2, seed=0)
    inputs = families.inputs_of(family, [ids], [[(medium, families.pixels(family, medium, seed=0))]])
    if positions == "compact" and spec.types != "mrope":
        expected = list(range(expected[0], expected[0] + len(expected)))
    last = expected[-1][0] if spec.types == "mrope" else expected[-1]
    following = [text(last + step) if spec.types == "mrope" else [last + step] for step in (1, 2)]
    with Ends(positions=positions)(model) as session, positions_read(model) as found:
        model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False, suppress_tokens=[IMAGE, VIDEO])
        assert found == [expected, *following]
        assert any("positions" in note for note in session.report.notes) == (spec.types == "mrope" and positions == "compact")
        found.clear()
        model(**inputs)
        assert found == [expected]
