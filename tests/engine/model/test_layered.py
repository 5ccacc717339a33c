"""Gemma 4: pictures of any size, whose patches say where they are; layers that read the keys and values of earlier ones."""

from __future__ import annotations

import math
import re

import pytest
import torch

import foveate
from foveate.engine.cache_size import cache_bytes
from foveate.engine.model.anatomy import anatomy
from foveate.engine.vision.encoding import encode

from ... import families
from .test_families import GREEDY

FAMILY = "gemma4"


@torch.no_grad()
def test_a_token_is_a_block_of_patches():
    """Each patch counts in the mean of one token: the one that the model's own pooling puts it in."""
    model, inputs = families.load(FAMILY), families.batch(FAMILY)
    encoded = encode(
        anatomy(model), ("last",), {name: inputs[name] for name in ("pixel_values", "image_position_ids")}, project=True
    )
    places = inputs["image_position_ids"]
    padding = (places == -1).all(-1)
    assert padding.any()
    patches = torch.randn(*padding.shape, 5)
    pooled, real = model.model.vision_tower.pooler(patches, places, padding, output_length=padding.shape[1] // 4)
    torch.testing.assert_close(encoded.arrangement.cells(patches), pooled[real] / 48**0.5)
    grids = [unit.grid for unit in encoded.arrangement.units]
    assert grids == [
        (medium.size[0] // 2, medium.size[1] // 2) for row in families.SPECS[FAMILY].rows for medium in row if not medium.frames
    ]


@torch.no_grad()
def test_queries_and_keys_are_those_after_their_norms():
    model, inputs, seen = families.load(FAMILY), families.batch(FAMILY, rows=(0,)), []
    attention = model.model.vision_tower.encoder.layers[-1].self_attn
    handles = [part.register_forward_hook(lambda _, __, out: seen.append(out)) for part in (attention.q_norm, attention.k_norm)]
    pixels = {name: inputs[name] for name in ("pixel_values", "image_position_ids")}
    tap = encode(anatomy(model), ("last",), pixels, project=True).taps["last"]
    for handle in handles:
        handle.remove()
    assert torch.equal(tap.queries.unflatten(-1, (4, -1)), seen[0])
    assert torch.equal(tap.keys.unflatten(-1, (4, -1)), seen[1])


def test_layers_that_share_keys_and_values_are_not_cut():
    said = re.escape("the last 2 layers of Gemma4TextModel read the keys and values of earlier ones")
    with pytest.raises(foveate.UnsupportedModelError, match=said):
        foveate.attach(families.load(FAMILY), "fastv", budget=0.5)


def test_the_size_of_a_cache_with_layers_that_hold_nothing():
    model, inputs = families.load(FAMILY), families.batch(FAMILY)
    with foveate.DivPrune(budget=4)(model):
        sizes = cache_bytes(model.generate(**inputs, **GREEDY).past_key_values)
    assert all(sizes[:4])
    assert not any(sizes[4:])


def test_frames_of_a_video_are_told_by_their_own_counts():
    """Two videos of unlike sizes: which frames are whose, how large they are, and what each keeps."""
    model, inputs = families.load(FAMILY), families.batch(FAMILY)
    with foveate.DivPrune(budget=4)(model) as session:
        model.generate(**inputs, max_new_tokens=1)
    media = [medium for row in families.SPECS[FAMILY].rows for medium in row]
    frames = [max(1, medium.frames) for medium in media]
    before = [number * math.prod(medium.size) // 4 for number, medium in zip(frames, media, strict=True)]
    assert sorted(session.report.before) == sorted(before)
    assert session.report.after == [4] * len(media)  # a count is that of the whole video


def test_videos_without_counts_or_places_are_refused():
    for name in ("num_frames_per_video", "video_position_ids"):
        model, inputs = families.load(FAMILY), families.batch(FAMILY)
        del inputs[name]
        with foveate.DivPrune(budget=4)(model), pytest.raises(foveate.InputError, match=f"no {name}"):
            model.generate(**inputs)
    model, inputs = families.load(FAMILY), families.batch(FAMILY)
    inputs["num_frames_per_video"] = inputs["num_frames_per_video"] - torch.tensor([1, 0])
    with foveate.DivPrune(budget=4)(model), pytest.raises(foveate.InputError, match="counts 5 frames, and there are 6"):
        model.generate(**inputs)


def test_pictures_without_places_are_refused():
    model, inputs = families.load(FAMILY), families.batch(FAMILY, rows=(0,))
    del inputs["image_position_ids"]
    with foveate.DivPrune(budget=4)(model), pytest.raises(foveate.InputError, match="no image_position_ids"):
        model.generate(**inputs)
