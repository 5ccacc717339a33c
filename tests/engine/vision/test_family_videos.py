"""``temporal``: what looks as it did in the frame before is left out of a video, before the method sees the frame."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import foveate
from foveate.families import FAMILIES

from ... import families
from ... import family_reference as by_hand
from ...family_prompts import Medium

MOVING = {
    family: next(medium for row in families.SPECS[family].rows for medium in row if medium.frames)
    for family in FAMILIES
    if any(medium.frames for row in families.SPECS[family].rows for medium in row)
}
MOVING |= dict.fromkeys(families.ONE_PLACEHOLDER, Medium((6, 8), frames=4))  # whose batches are of pictures
NEW = 4


def twice_each(family: str, medium: Medium) -> Tensor:
    """A video of which every other frame is the one before."""
    frames = families.pixels(family, medium, seed=3).chunk(medium.frames)
    return torch.cat([frames[number // 2] for number in range(medium.frames)])


def prompt(family: str) -> tuple[dict[str, Tensor], list[int], list[int]]:
    """Inputs of one row with such a video; which of its placeholders are new, and which of these are cells of a grid."""
    medium = MOVING[family]
    ids = families.prompt(family, [medium], before=2, after=3, seed=0)
    inputs = families.inputs_of(family, [ids], [[(medium, twice_each(family, medium))]])
    (places,) = families.SPECS[family].lay(medium, 0).items
    cells = [at for at, place in enumerate(places) if place.kind == "cell"]
    each = len(cells) // medium.frames
    seen = {at for number, at in enumerate(cells) if number // each % 2}
    new = [at for at in range(len(places)) if at not in seen]
    return inputs, new, [at for at in new if at in cells]


@pytest.mark.parametrize("family", MOVING)
def test_repeated_frames_are_left_out(family):
    """And generation goes on as from a prompt that never had them."""
    model, (inputs, new, _) = families.load(family), prompt(family)
    with foveate.Spatial(budget=1.0, temporal=0.999)(model) as session:
        output = families.generate(model, inputs, NEW)
    assert session.report.kept == [new]
    features, deep = by_hand.whole_features(model, inputs)
    spliced = by_hand.splice(family, model, inputs, new, features[new], compact=True, deep=[layer[new] for layer in deep])
    wanted = by_hand.logits(model, spliced, output.sequences[0, -NEW:].tolist())
    torch.testing.assert_close(torch.stack(output.logits, 1)[0], wanted, atol=3e-4, rtol=3e-4)


@pytest.mark.parametrize("family", MOVING)
def test_methods_choose_from_what_is_new(family):
    inputs, _, cells = prompt(family)
    report = foveate.encode(families.load(family), foveate.DivPrune(budget=7, temporal=0.999), **inputs).report
    chosen = set(report.kept[0]) & set(cells)
    (places,) = families.SPECS[family].lay(MOVING[family], 0).items
    assert len(chosen) == 7
    assert sum(places[at].kind == "cell" for at in report.kept[0]) == 7


@pytest.mark.parametrize("family", MOVING)
def test_pictures_are_not_compared(family):
    """A batch of pictures that are all the same one stays whole."""
    medium = families.SPECS[family].rows[0][0]
    ids = [families.prompt(family, [medium], before=2, after=3, seed=seed) for seed in (0, 1)]
    media = [[(medium, families.pixels(family, medium, seed=3))]] * 2
    inputs = families.inputs_of(family, ids, media)
    report = foveate.encode(families.load(family), foveate.Spatial(budget=1.0, temporal=0.5), **inputs).report
    assert report.after == report.before
