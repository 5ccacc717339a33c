"""Smaller pictures, the baseline that published methods often lose to."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import foveate
from foveate import families
from foveate.tokens import VisualTokens

from .. import zoo


def inputs_for(number: int = 2) -> dict[str, torch.Tensor]:
    return {**zoo.pad([zoo.prompt(1, 2, 2, seed) for seed in range(number)]), "pixel_values": zoo.pictures(number)}


@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_the_encoder_sees_a_smaller_picture(tower):
    model = zoo.tower("siglip") if tower == "siglip" else zoo.load()
    inputs = inputs_for()
    encoded = foveate.encode(model, foveate.Resize(budget=12), **inputs)
    pixels = inputs["pixel_values"]
    small = F.interpolate(pixels, (3 * zoo.PATCH, 4 * zoo.PATCH), mode="bicubic", antialias=True)
    small = small.maximum(pixels.amin((2, 3), keepdim=True)).minimum(pixels.amax((2, 3), keepdim=True))
    with torch.no_grad():
        expected = model.get_image_features(small, interpolate_pos_encoding=True).pooler_output
    for embeds, wanted in zip(encoded.embeds, expected, strict=True):
        torch.testing.assert_close(embeds, wanted)
    assert any("pictures were shrunk to 42 x 56 pixels" in note for note in encoded.report.notes)
    assert torch.equal(inputs["pixel_values"], zoo.pictures(2)), "the picture of the user stays as it is"
    image = encoded.report.images[0]
    assert image.kept == [r * 8 + c for r in (1, 4, 6) for c in (1, 3, 5, 7)]
    rows = [0, 0, 0, 1, 1, 2, 2, 2]  # nearest of three middles
    assert image.source == [rows[r] * 4 + c // 2 for r in range(8) for c in range(8)]


def test_encoders_that_take_one_size_get_their_features_shrunk(monkeypatch):
    monkeypatch.setitem(families.TOWERS, "clip_vision_model", replace(families.TOWERS["clip_vision_model"], resizable=False))
    model, inputs = zoo.load(), inputs_for()
    encoded = foveate.encode(model, foveate.Resize(budget=16), **inputs)
    asked = foveate.encode(model, foveate.Resize(budget=16, where="features"), **inputs)
    assert any("its features were shrunk instead" in note for note in encoded.report.notes)
    assert not asked.report.notes
    seen = []
    handle = model.model.multi_modal_projector.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model.get_image_features(inputs["pixel_values"])
    handle.remove()
    grid = seen[0].transpose(1, 2).reshape(2, -1, 8, 8)
    small = F.interpolate(grid, (4, 4), mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
    with torch.no_grad():
        expected = model.model.multi_modal_projector(small)
    for one, other, wanted in zip(encoded.embeds, asked.embeds, expected, strict=True):
        torch.testing.assert_close(one, wanted, atol=1e-4, rtol=1e-4)
        assert torch.equal(one, other)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 1600))
def test_shapes(rows, columns, budget):
    budget = min(budget, rows * columns)
    r, c = foveate.Resize(budget=budget).shape((rows, columns))
    assert 1 <= r <= rows
    assert 1 <= c <= columns
    assert r * c <= budget
    if rows == columns:
        side = int(budget**0.5)
        assert r * c >= side * side
        assert max(r, c) <= 2 * min(r, c) + 1


@pytest.mark.parametrize(
    ("budget", "shape"), [(16, (4, 4)), (36, (6, 6)), (64, (8, 8)), (144, (12, 12)), (288, (16, 18)), (50, (7, 7))]
)
def test_known_shapes(budget, shape):
    assert foveate.Resize(budget=budget).shape((24, 24)) == shape


def test_encoders_whose_weights_are_elsewhere_get_their_features_shrunk():
    """Position embeddings that accelerate brings in later cannot be interpolated."""
    accelerate = pytest.importorskip("accelerate")
    model, inputs = zoo.load(), inputs_for()
    expected = foveate.encode(model, foveate.Resize(budget=16, where="features"), **inputs).embeds
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    encoded = foveate.encode(model, foveate.Resize(budget=16), **inputs)
    assert any("its features were shrunk instead" in note for note in encoded.report.notes)
    for a, b in zip(encoded.embeds, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_constant_features_stay_constant():
    tokens = VisualTokens(torch.full((1, 63, 4), 3.0), (7, 9))
    small = foveate.Resize(budget=20, where="features").reduce(tokens).apply(tokens.features)
    torch.testing.assert_close(small, torch.full_like(small, 3.0))
