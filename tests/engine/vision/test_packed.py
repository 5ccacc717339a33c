"""PixelPrune: which cells stay, what the encoder makes of them, and what the model answers, against loops and masked encoders."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, vision_utils

import foveate
from foveate.errors import InputError, UnsupportedModelError

from ... import families, zoo
from ... import family_reference as by_hand
from ...family_prompts import Medium

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
PICTURE, FLAT, VIDEO = Medium((8, 12)), Medium((4, 8)), Medium((4, 8), frames=4)
NEW = 4


def merged(model) -> int:
    return int(model.base_model.visual.spatial_merge_size) ** 2


def repeating(family: str, medium: Medium, seed: int) -> Tensor:
    """Pixels of a picture or video of which every third cell is one of the first two again."""
    pixels = families.pixels(family, medium, seed=seed).clone()
    cells = pixels.unflatten(0, (-1, merged(families.load(family))))
    for number in range(2, len(cells)):
        if number % 3 == 0:
            cells[number] = cells[number % 2]
    return cells.flatten(0, 1)


def inputs_of(family: str, rows: list[list[tuple[Medium, int]]]) -> dict[str, Tensor]:
    ids = [families.prompt(family, [medium for medium, _ in row], before=2, after=3, seed=n) for n, row in enumerate(rows)]
    return families.inputs_of(family, ids, [[(medium, repeating(family, medium, seed)) for medium, seed in row] for row in rows])


def kept_by_loop(cells: Tensor, tau: float) -> list[int]:
    """As the paper says it: a cell is dropped if it equals one that is kept, or differs by ``tau`` on average at most."""
    kept: list[int] = []
    for number in range(len(cells)):
        if not any(float((cells[number] - cells[other]).abs().mean()) <= tau for other in kept):
            kept.append(number)
    return kept


@contextmanager
def masked(model, grid_thw: Tensor, dropped: Tensor) -> Iterator[None]:
    """The encoder on whole pictures, in which no patch attends to those that were dropped."""
    tower = model.base_model.visual
    order = torch.arange(len(dropped))
    if hasattr(tower, "window_size"):
        cells = vision_utils.get_vision_window_index(grid_thw, tower.spatial_merge_size, tower.window_size, tower.patch_size)[0]
        order = order.unflatten(0, (-1, merged(model)))[cells].flatten()
    gone, at = dropped[order], 0

    def attend(_, query, key, value, scaling, **__):
        nonlocal at
        part = gone[at : at + query.shape[2]]
        at = (at + query.shape[2]) % len(gone)
        scores = query @ key.transpose(2, 3) * scaling
        scores = scores.masked_fill(part & ~part.all(), float("-inf"))
        return (scores.softmax(-1) @ value).transpose(1, 2), None

    AttentionInterface.register("masked-for-a-test", attend)
    before, tower.config._attn_implementation = tower.config._attn_implementation, "masked-for-a-test"
    try:
        yield
    finally:
        tower.config._attn_implementation = before


@pytest.mark.parametrize("medium", [PICTURE, VIDEO], ids=["picture", "video"])
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_of_an_encoder_that_does_not_see_what_was_dropped(family, medium):
    model, inputs = families.load(family), inputs_of(family, [[(medium, 3)]])
    kind = "video" if medium.frames else "image"
    pixels = inputs["pixel_values_videos" if medium.frames else "pixel_values"]
    kept = kept_by_loop(pixels.unflatten(0, (-1, merged(model))).flatten(1), 0.0)
    cells = len(pixels) // merged(model)
    assert cells // 2 < len(kept) < cells
    seen = []
    handle = model.base_model.visual.patch_embed.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    with foveate.PixelPrune()(model) as session:
        output = families.generate(model, inputs, NEW)
    handle.remove()
    assert seen == [len(kept) * merged(model)], "the encoder itself gets fewer patches"
    assert session.report.kept == [kept]
    dropped = torch.ones(cells, dtype=torch.bool)
    dropped[kept] = False
    with masked(model, inputs[f"{kind}_grid_thw"], dropped.repeat_interleave(merged(model))):
        features, deep = by_hand.whole_features(model, inputs)
    spliced = by_hand.splice(family, model, inputs, kept, features[kept], compact=True, deep=[layer[kept] for layer in deep])
    wanted = by_hand.logits(model, spliced, output.sequences[0, -NEW:].tolist())
    torch.testing.assert_close(torch.stack(output.logits, 1)[0], wanted, atol=3e-4, rtol=3e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_of_a_batch_equals_the_row_alone(family):
    model, rows = families.load(family), [[(PICTURE, 1), (FLAT, 2)], [(FLAT, 4)], [(VIDEO, 5)]]
    with foveate.PixelPrune()(model) as session:
        together = families.generate(model, inputs_of(family, rows), NEW)
        counts = session.report.after
        for number, row in enumerate(rows):
            alone = inputs_of(family, [row])
            alone |= {"input_ids": torch.tensor([families.prompt(family, [m for m, _ in row], before=2, after=3, seed=number)])}
            alone["attention_mask"] = torch.ones_like(alone["input_ids"])
            output = families.generate(model, alone, NEW)
            torch.testing.assert_close(
                torch.stack(together.logits, 1)[number], torch.stack(output.logits, 1)[0], atol=3e-4, rtol=3e-4
            )
            assert set(session.report.after) <= set(counts)
    assert len(set(counts)) > 1


@pytest.mark.parametrize("family", FAMILIES)
def test_still_clips_of_other_sizes_in_one_batch(family):
    """Of each, frames are gone as a whole, so that its units are not all there; each is as it is alone."""
    model, media = families.load(family), [Medium((4, 8), frames=4), Medium((8, 12), frames=4), Medium((4, 4), frames=4)]
    pixels = [families.pixels(family, medium, seed=seed) for seed, medium in enumerate(media)]
    pixels = [each[: len(each) // 2].repeat(2, 1) for each in pixels]  # the second half of each clip is the first one again
    ids = [families.prompt(family, [medium], before=2, after=3, seed=seed) for seed, medium in enumerate(media)]
    with foveate.PixelPrune()(model) as session:
        inputs = families.inputs_of(family, ids, [[pair] for pair in zip(media, pixels, strict=True)])
        together, report = families.generate(model, inputs, NEW), session.report
        kept, images = report.kept, report.images
        for number, (medium, own) in enumerate(zip(media, pixels, strict=True)):
            alone = families.generate(model, families.inputs_of(family, [ids[number]], [[(medium, own)]]), NEW)
            torch.testing.assert_close(
                torch.stack(together.logits, 1)[number], torch.stack(alone.logits, 1)[0], atol=3e-4, rtol=3e-4
            )
            assert session.report.kept == [kept[number]]
            mine = [(each.part, each.source, each.kept) for each in session.report.images]
            assert mine == [(each.part, each.source, each.kept) for each in images if each.row == number]
    assert [len(each) for each in kept] == [len(own) // merged(model) // 2 for own in pixels]


@pytest.mark.parametrize("family", FAMILIES)
def test_pictures_without_repetition_stay_as_they_are(family):
    model, inputs = families.load(family), families.batch(family)
    before = model(**inputs).logits
    with foveate.PixelPrune()(model) as session:
        assert torch.equal(model(**inputs).logits, before)
    assert session.report.after == session.report.before
    with foveate.PixelPrune(budget=1.0, tau=9.0)(model):
        assert torch.equal(model(**inputs).logits, before)


@pytest.mark.parametrize("tau", [0.0, 0.05, 0.4, 1.2])
def test_what_stays_is_what_a_loop_keeps(tau):
    generator = torch.Generator().manual_seed(5)
    for number, kinds in itertools.product((1, 7, 40), (1, 3, 20)):
        base = torch.randn(kinds, 24, generator=generator)
        cells = base[torch.randint(kinds, (number,), generator=generator)] + 0.3 * torch.randint(
            2, (number, 1), generator=generator
        )
        source = foveate.PixelPrune(tau=tau).sources(cells)
        kept = kept_by_loop(cells, tau)
        assert (source == torch.arange(number)).nonzero().flatten().tolist() == kept
        assert set(source.tolist()) == set(kept)
        assert float((cells - cells[source]).abs().mean(1).max()) <= tau + 1e-6, "each is like the one that stands for it"
        assert source[0] == 0


def test_a_still_background_is_seen_once():
    """All frames of a video alike: one frame stays, whatever the number of frames."""
    model = families.load("qwen2_5_vl")
    medium = Medium((4, 8), frames=6)
    frame = families.pixels("qwen2_5_vl", Medium((4, 8), frames=2), seed=1)
    patches = 4 * 8
    pixels = frame[:patches].repeat(len(families.pixels("qwen2_5_vl", medium, seed=1)) // patches, 1)
    ids = families.prompt("qwen2_5_vl", [medium], before=2, after=3, seed=1)
    inputs = families.inputs_of("qwen2_5_vl", [ids], [[(medium, pixels)]])
    with foveate.PixelPrune()(model) as session:
        families.generate(model, inputs, NEW)
    assert session.report.kept == [list(range(patches // merged(model)))]
    assert session.report.before[0] > 2 * session.report.after[0]
    first, *others = [image.source for image in session.report.images]
    assert first == list(range(len(first)))
    assert all(source == [-2] * len(first) for source in others), "each stands in the first frame"


def test_what_cannot_work_says_so():
    with pytest.raises(UnsupportedModelError, match=r"before the vision encoder, and that of LLaVA-1\.5 takes whole pictures only"):
        foveate.attach(zoo.load(), "pixelprune")
    with pytest.raises(InputError, match=r"what is alike decides\. Give tau="):
        foveate.get("pixelprune", budget=64)
    with pytest.raises(InputError, match="tau=-1"):
        foveate.get("pixelprune", tau=-1)
    with pytest.raises(InputError, match="before there are any"):
        foveate.get("pixelprune", temporal=0.9)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_pixels_are_told(value):
    model, inputs = families.load("qwen2_vl"), inputs_of("qwen2_vl", [[(FLAT, 3)]])
    inputs["pixel_values"][0, 0] = value
    with foveate.PixelPrune()(model), pytest.raises(InputError, match="pixels hold NaN or infinite values"):
        model(**inputs)


class Wrong(foveate.PixelReducer, name="wrong-pixels", listed=False):
    """Says that each cell is like the next one."""

    def sources(self, cells: Tensor) -> Tensor:
        return (torch.arange(len(cells)) + 1) % len(cells)


def test_a_method_that_breaks_the_contract_is_told():
    model, inputs = families.load("qwen2_vl"), inputs_of("qwen2_vl", [[(FLAT, 3)]])
    with Wrong()(model), pytest.raises(foveate.FoveateError, match="cells that stand for themselves"):
        model(**inputs)
