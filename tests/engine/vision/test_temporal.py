"""Videos: reduction frame by frame, budgets per video, and tokens that did not change since the frame before."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from transformers import CLIPVisionConfig, VideoLlavaConfig, VideoLlavaForConditionalGeneration

import foveate

from ... import reference, zoo

IMAGE, VIDEO = 5, 6
FRAMES = 8
CELLS = 256  # of a frame of Video-LLaVA: 224 pixels in patches of 14, with a [CLS] token in front


@pytest.fixture(scope="module")
def model() -> VideoLlavaForConditionalGeneration:
    """Video-LLaVA with its real geometry and narrow layers."""
    torch.manual_seed(0)
    tower = CLIPVisionConfig(
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=224,
        patch_size=14,
        projection_dim=32,
        initializer_range=0.3,
        initializer_factor=3.0,
    )
    config = VideoLlavaConfig(
        vision_config=tower, text_config=zoo.text_config("llama"), image_token_index=IMAGE, video_token_index=VIDEO
    )
    return VideoLlavaForConditionalGeneration(config).eval()


def clip(frames: int = FRAMES, seed: int = 0) -> Tensor:
    """[1, F, 3, 224, 224] noise whose strength differs from frame to frame."""
    generator = torch.Generator().manual_seed(seed)
    strength = torch.tensor([1.0, 0.3, 2.0, 0.6])[torch.arange(frames) % 4]
    return (torch.randn(frames, 3, 224, 224, generator=generator) * strength[:, None, None, None])[None]


def still(frames: int = 4) -> Tensor:
    """A clip in which each frame repeats the one before, but for its upper left quarter."""
    shown = clip(1)[0].repeat(frames, 1, 1, 1)
    shown[:, :, :112, :112] = clip(frames, seed=1)[0, :, :, :112, :112]
    return shown[None]


def inputs(video: Tensor) -> dict[str, Tensor]:
    ids = [1, 20, 21, *[VIDEO] * (video.shape[1] * (CELLS + 1)), 22, 23, 24]
    return {
        "input_ids": torch.tensor([ids]),
        "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
        "pixel_values_videos": video,
    }


def encoder_sees(model, video: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the unmodified video encoder gives for each frame: features, and queries and keys of its last layer."""
    seen: dict[str, Tensor] = {}
    attention = model.model.video_tower.encoder.layers[-1].self_attn
    handles = [
        getattr(attention, f"{name}_proj").register_forward_hook(lambda _, __, out, n=name: seen.__setitem__(n, out))
        for name in ("q", "k")
    ]
    with torch.no_grad():
        states = model.model.video_tower(video[0], output_hidden_states=True).hidden_states[-2]
    for handle in handles:
        handle.remove()
    return states, seen["q"], seen["k"]


def test_every_frame_keeps_what_it_would_keep_alone(model):
    """8 x 257 tokens: PruMerge's rule counts anew in each frame, and [CLS] stays (Video-LLaVA, Table 3 of the paper)."""
    video = clip()
    states, query, keys = encoder_sees(model, video)
    with foveate.PruMerge()(model) as session:
        model.generate(**inputs(video), max_new_tokens=1)
    encoded = foveate.encode(model, "prumerge", **inputs(video))
    report = session.report
    assert report.before == [FRAMES * (CELLS + 1)] == [2056]
    counts = [image.after for image in report.images]
    assert len(set(counts)) > 1
    assert report.after == [sum(counts) + FRAMES]
    assert report.after[0] < 700
    defaults = foveate.PruMerge()
    start = 0
    for frame, image in enumerate(report.images):
        assert (image.item, image.part, image.modality, image.before) == (0, frame, "video", CELLS)
        kept, tokens = reference.plain(states[frame, 1:], query[frame, 0], keys[frame], 4, [], defaults.k, defaults.min_tokens)
        assert image.kept == kept
        expected = torch.cat([states[frame, :1].double(), tokens])
        projected = model.model.multi_modal_projector(expected.float()[None])[0]
        torch.testing.assert_close(encoded.embeds[0][start : start + len(expected)], projected, atol=1e-4, rtol=1e-4)
        places = [place - frame * (CELLS + 1) for place in report.kept[0][start : start + len(expected)]]
        assert places == [0, *(cell + 1 for cell in kept)]
        start += len(expected)


@pytest.mark.parametrize(("budget", "total"), [(100, 100), (0.25, 512), (8, 8), (3, 3), (2000, 2000)])
def test_a_budget_is_of_the_video(model, budget, total):
    encoded = foveate.encode(model, foveate.Spatial(budget=budget), **inputs(clip()))
    counts = [image.after for image in encoded.report.images]
    assert sum(counts) == total
    assert max(counts) - min(counts) <= 1
    assert len(encoded.embeds[0]) == total + FRAMES


def changed(model, video: Tensor, similar: float) -> list[list[int]]:
    """The cells of each frame that are not too similar to the frame before."""
    states = encoder_sees(model, video)[0][:, 1:].double()
    found = [list(range(CELLS))]
    for before, now in itertools.pairwise(states):
        found.append([i for i in range(CELLS) if float(torch.cosine_similarity(before[i], now[i], dim=0)) <= similar])
    return found


@pytest.mark.parametrize("similar", [0.5, 0.8, 0.95])
def test_what_did_not_change_goes(model, similar):
    video, expected = still(), changed(model, still(), similar)
    assert CELLS > max(map(len, expected[1:])) > 0
    encoded = foveate.encode(model, foveate.Spatial(budget=1.0, temporal=similar), **inputs(video))
    whole = foveate.encode(model, foveate.Spatial(budget=1.0), **inputs(video))
    assert [image.kept for image in encoded.report.images] == expected
    torch.testing.assert_close(encoded.embeds[0], whole.embeds[0][encoded.report.kept[0]])
    for image in encoded.report.images:
        assert {cell for cell, output in enumerate(image.source) if output >= 0} == set(image.kept)


@pytest.mark.parametrize("budget", [60, 0.5, 900])
def test_budgets_count_what_is_left(model, budget):
    left = changed(model, still(), 0.8)
    total = sum(map(len, left))
    encoded = foveate.encode(model, foveate.DivPrune(budget=budget, temporal=0.8), **inputs(still()))
    counts = [image.after for image in encoded.report.images]
    assert sum(counts) == (min(budget, total) if isinstance(budget, int) else round(budget * total))
    for image, cells in zip(encoded.report.images, left, strict=True):
        assert set(image.kept) <= set(cells)


def test_a_frame_that_repeats_leaves_no_token_of_its_grid(model):
    video = clip(1).repeat(1, 3, 1, 1, 1)
    with foveate.PruMergePlus(temporal=0.999)(model) as session:
        out = model.generate(**inputs(video), max_new_tokens=2, suppress_tokens=[IMAGE, VIDEO])
        alone = foveate.encode(model, foveate.PruMergePlus(), **inputs(clip(1)))
    counts = [image.after for image in session.report.images]
    assert counts == [len(alone.embeds[0]) - 1, 0, 0]
    assert session.report.after == [counts[0] + 3]
    assert out.shape[1] == 6 + 3 * (CELLS + 1) + 2


def test_inside_the_encoder_it_has_no_effect_and_that_is_said(model):
    plain, timed = (foveate.encode(model, foveate.ToMe(budget=0.6, **more), **inputs(still())) for more in ({}, {"temporal": 0.5}))
    assert torch.equal(plain.embeds[0], timed.embeds[0])
    assert any("temporal= has no effect" in note for note in timed.report.notes)
    assert not any("temporal=" in note for note in plain.report.notes)


def test_pictures_know_no_time(model):
    ids = [1, *[IMAGE] * CELLS, 20, 21]
    given = {"input_ids": torch.tensor([ids]), "pixel_values": clip(1)[0]}
    plain, timed = (foveate.encode(model, foveate.DivPrune(budget=20, **more), **given) for more in ({}, {"temporal": -1.0}))
    assert torch.equal(plain.embeds[0], timed.embeds[0])


@pytest.mark.parametrize("temporal", [1.5, -2.0, float("nan"), "0.9", True])
def test_no_similarity(temporal):
    with pytest.raises(foveate.InputError, match="temporal"):
        foveate.Spatial(budget=4, temporal=temporal)
