"""Families whose prompts have one placeholder for pictures and videos: batches of videos, and what is said of both together.

Their batches of pictures go through the same tests as those of all families.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import foveate

from ... import families
from ... import family_reference as by_hand
from ...family_prompts import Medium

NEW = 4
ROWS = (Medium((6, 8), frames=4), Medium((8, 4), frames=2), None)
METHODS = {"divprune": dict(budget=7), "prumerge+": {}, "fastv": dict(budget=0.5, layer=2)}


def batch(family: str, rows: tuple[int, ...] = (0, 1, 2)) -> dict[str, Tensor]:
    """Rows with a video each, and one without."""
    media = [[] if ROWS[row] is None else [ROWS[row]] for row in rows]
    ids = [families.prompt(family, own, 2 + row, 5, seed=row) for row, own in zip(rows, media, strict=True)]
    pixels = [[(medium, families.pixels(family, medium, seed=row)) for medium in own] for row, own in zip(rows, media, strict=True)]
    return families.inputs_of(family, ids, pixels)


def logits(family: str, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    output = families.generate(families.load(family), inputs, NEW)
    return torch.stack(output.logits, 1), output.sequences[:, -NEW:]


@pytest.mark.parametrize("family", families.ONE_PLACEHOLDER)
def test_positions_by_hand_are_those_of_the_model(family):
    inputs = batch(family, (0,))
    known = {name: value for name, value in inputs.items() if "pixel" not in name}
    found = families.load(family).model.get_rope_index(**known)[0]
    assert torch.equal(found[:, 0], by_hand.rope_positions(family, inputs))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("family", families.ONE_PLACEHOLDER)
def test_videos(family, name):
    """All tokens change nothing; a row is what it is alone; and what is generated is what the spliced rows lead to."""
    model, inputs, method = families.load(family), batch(family), foveate.get(name, **METHODS[name])
    plain, _ = logits(family, inputs)
    with method.with_budget(1.0)(model):
        assert torch.equal(logits(family, inputs)[0], plain)
    with method(model) as session:
        found, tokens = logits(family, inputs)
        report = session.report
        assert {item.modality for item in report.items} == {"video"}
        assert [len(item.grids) for item in report.items] == [4, 2]
        assert report.layers[-1] < sum(report.before)
        for row in range(len(ROWS)):
            alone, _ = logits(family, batch(family, (row,)))
            torch.testing.assert_close(found[row], alone[0], atol=2e-4, rtol=2e-4)
    if method.inside_decoder():
        return
    for row in range(len(ROWS) - 1):
        alone, kept = batch(family, (row,)), report.kept[row]
        features, _ = by_hand.whole_features(model, alone)
        embeds = foveate.encode(model, method, **alone).embeds[0]
        if name == "divprune":
            torch.testing.assert_close(embeds, features[kept], atol=1e-4, rtol=1e-4)
        spliced = by_hand.splice(family, model, alone, kept, embeds, compact=True)
        torch.testing.assert_close(found[row], by_hand.logits(model, spliced, tokens[row].tolist()), atol=3e-4, rtol=3e-4)


@pytest.mark.parametrize("call", ["generate", "forward"])
def test_both_in_a_call_are_refused(call):
    family = families.ONE_PLACEHOLDER[0]
    model, pictures = families.load(family), families.batch(family, (0,))
    both = batch(family, (0,)) | {name: pictures[name] for name in ("pixel_values", "image_grid_thw")}
    with foveate.PruMergePlus()(model), pytest.raises(foveate.InputError, match="takes either in a call"):
        getattr(model, call)(**both)
