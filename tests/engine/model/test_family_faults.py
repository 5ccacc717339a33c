"""Faults that reviews of the engine found on one family or another, and towers that belong to other families."""

from __future__ import annotations

import sys
import threading

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, LlavaConfig, PixtralVisionConfig

import foveate
from foveate.engine.decoder.masks import taken_mask
from foveate.engine.model.anatomy import anatomy
from foveate.engine.vision.encoding import encode

from ... import families, reference, zoo
from ...family_prompts import IMAGE, VIDEO
from .test_family_calls import GREEDY, longer

NEW = 3


def logits(model, inputs: dict[str, Tensor], **options: object) -> Tensor:
    return torch.stack(model.generate(**inputs, **GREEDY, **options).logits, 1)


@pytest.fixture(scope="module")
def pixtral():
    """LLaVA's class with Pixtral's encoder, as Pixtral-12B is built: pictures of any size, a token for each patch."""
    torch.manual_seed(0)
    vision = PixtralVisionConfig(
        hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, image_size=112, patch_size=14, head_dim=12
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=zoo.text_config("llama"),
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    model = AutoModelForImageTextToText.from_config(config).eval()
    families.spread(model)
    model.generation_config.update(pad_token_id=zoo.PAD, eos_token_id=None)
    return model


def pixtral_inputs(sizes: list[tuple[int, int]]) -> dict[str, Tensor]:
    rows, pictures = [], torch.zeros(len(sizes), 3, 112, 112)
    for n, (height, width) in enumerate(sizes):
        rows.append([1, 20 + n, *[IMAGE] * (height // 14 * (width // 14)), 30, 31 + n])
        pictures[n, :, :height, :width] = torch.randn(3, height, width, generator=torch.Generator().manual_seed(n))
    return {**zoo.pad(rows), "pixel_values": pictures, "image_sizes": torch.tensor(sizes)}


@pytest.mark.parametrize("sizes", [[(56, 56)] * 3, [(56, 70), (84, 112), (28, 42)]])
def test_pixtral_in_llava(pixtral, sizes):
    inputs = pixtral_inputs(sizes)
    plain = logits(pixtral, inputs)
    with foveate.PruMergePlus(budget=1.0)(pixtral):
        assert torch.equal(logits(pixtral, inputs), plain)
    encoded = foveate.encode(pixtral, foveate.DivPrune(budget=5), **inputs)
    assert encoded.report.before == [h // 14 * (w // 14) for h, w in sizes]
    assert encoded.report.after == [5] * 3
    assert [image.grid for image in encoded.report.images] == [(h // 14, w // 14) for h, w in sizes]
    with foveate.DivPrune(budget=5)(pixtral):
        output = pixtral.generate(**inputs, **GREEDY)
    for row in range(3):
        embeddings, _ = reference.spliced_embeddings(pixtral, inputs, row, [encoded.report.kept[row]], [encoded.embeds[row]], IMAGE)
        places = torch.arange(embeddings.shape[1])[None]
        expected = reference.run_spliced(pixtral, embeddings, places, output.sequences[row, -NEW:].tolist())
        torch.testing.assert_close(torch.stack(output.logits, 1)[row], expected, atol=3e-4, rtol=3e-4)
    with pytest.raises(foveate.UnsupportedModelError, match="inside the vision encoder"):
        foveate.attach(pixtral, "tome", budget=5)


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
def test_threads_that_share_a_model_with_tiles(family):
    model, inputs = families.load(family), families.batch(family, rows=(0,))
    with foveate.PruMergePlus()(model):
        expected = logits(model, inputs)
    failed: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(4):
                encoded = foveate.encode(model, "prumerge+", **inputs)
                assert sum(encoded.report.after) < sum(encoded.report.before)
        except BaseException as error:
            failed.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert failed == []
    assert "pack_image_features" not in model.model.__dict__
    with foveate.PruMergePlus()(model):
        assert torch.equal(logits(model, inputs), expected)


def test_the_older_name_of_pictures():
    model, inputs = families.load("video_llava"), families.batch("video_llava")
    older = dict(inputs)
    older["pixel_values_images"] = older.pop("pixel_values")
    with foveate.PruMergePlus()(model):
        assert torch.equal(logits(model, older), logits(model, inputs))
        assert torch.equal(model(**older).logits, model(**inputs).logits)
    whole, again = (foveate.encode(model, "prumerge+", **given) for given in (inputs, older))
    assert all(torch.equal(a, b) for a, b in zip(whole.embeds, again.embeds, strict=True))


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "glm4v"])
def test_two_conversations_in_turn(family):
    """transformers keeps the offset of the last prompt on the model; another conversation must not change this one."""
    model, inputs, other = families.load(family), families.batch(family, rows=(0,)), families.batch(family, rows=(1,))
    words = torch.tensor([[40, 41, 42]])
    with foveate.PruMergePlus()(model):
        first = model.generate(**inputs, **GREEDY)
        second = longer(longer(inputs, first.sequences[:, inputs["input_ids"].shape[1] :]), words)
        model.generate(**other, **GREEDY)
        on_cache = logits(model, second, past_key_values=first.past_key_values)
        pictures = {k: v for k, v in inputs.items() if k not in second}
        torch.testing.assert_close(on_cache, logits(model, {**second, **pictures}), atol=3e-4, rtol=3e-4)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
def test_encode_leaves_the_model_as_it_is(family):
    model, inputs, other = families.load(family), families.batch(family, rows=(0,)), families.batch(family, rows=(1,))
    model.generate(**inputs, **GREEDY)
    before = model.model.rope_deltas
    foveate.encode(model, "prumerge+", **other)
    assert model.model.rope_deltas is before


@pytest.mark.parametrize("call", ["generate", "forward"])
def test_positions_that_cannot_be_known(call):
    model, inputs = families.load("qwen2_vl"), families.batch("qwen2_vl", rows=(0,))
    del inputs["mm_token_type_ids"]
    with foveate.PruMergePlus()(model), pytest.raises(foveate.InputError, match="mm_token_type_ids"):
        getattr(model, call)(**inputs)


def test_reports_of_pictures_and_videos_together():
    model, inputs = families.load("video_llava"), families.batch("video_llava")
    with foveate.ToMe(budget=0.5)(model) as session:
        model.generate(**inputs, **GREEDY)
    report = session.report
    assert {image.modality for image in report.images} == {"image", "video"}
    assert all(len(layer) == len(report.images) for layer in report.encoder_layers)
    assert len(report.notes) == len(set(report.notes))
    leads = [len(report.kept[image.item]) - sum(i.after for i in report.images if i.item == image.item) for image in report.images]
    assert all(lead >= 0 for lead in leads)


@pytest.mark.parametrize("family", ["llava", "gemma3", "paddleocr_vl"])
def test_videos_where_there_are_none(family):
    model, inputs = families.load(family), families.batch(family, rows=(0,))
    with foveate.PruMergePlus()(model), pytest.raises(foveate.UnsupportedModelError, match="videos are not supported"):
        model.generate(**inputs, pixel_values_videos=torch.zeros(1, 2, 3, 28, 28), max_new_tokens=1)


def test_marks_around_pictures_are_no_question():
    """Mistral 3 writes a break behind each row of a picture."""
    model, inputs = families.load("mistral3"), families.batch("mistral3", rows=(0,))
    ids = inputs["input_ids"][0]
    last = int((ids == IMAGE).nonzero().max())
    seen: list[Tensor] = []

    class Listener(foveate.TextRelevanceCut):
        def cut(self, tokens):
            seen.append(tokens.question)
            return super().cut(tokens)

    with Listener(budget=0.5, layers=(2,))(model):
        model.generate(**inputs, **GREEDY)
    assert set(seen[0][0].nonzero().flatten().tolist()) <= set(range(last + 1, len(ids)))
    assert bool(seen[0].any())
    assert VIDEO not in ids


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_what_is_read_of_patches_stands_at_their_tokens(family):
    """Patches that carry the token they become, and noise that cancels within it, give the tokens where the model has them."""
    model, inputs = families.load(family), families.batch(family, rows=(0, 1))
    parts, made = anatomy(model), []
    handle = model.model.visual.merger.register_forward_hook(lambda _, __, out: made.append(out))
    with torch.no_grad():
        encoded = encode(parts, (), {name: inputs[name] for name in ("pixel_values", "image_grid_thw")}, project=True)
    handle.remove()
    noise = torch.randn(len(made[0]), 4, made[0].shape[-1])
    patches = made[0][:, None] + noise - noise.mean(1, keepdim=True)
    torch.testing.assert_close(encoded.arrangement.cells(patches.flatten(0, 1)[None]), encoded.projected)
    assert torch.equal(made[0], encoded.projected) == (family == "qwen2_vl"), "windows change the order inside the encoder"


def test_masks_behind_a_cut_hide_padding():
    """Four columns that all see each other; the first row keeps two of them, behind a filler, the second row three."""
    whole = torch.ones(2, 1, 4, 4, dtype=torch.bool)
    whole[:, :, :, 3] = False
    keys = torch.tensor([[-1, 0, 3], [0, 1, 2]])
    seen = taken_mask(whole, keys, 3, 0, 4)[:, 0].tolist()
    assert seen[0][0][0], "a query of padding sees something, or its softmax is not a number"
    assert seen[0][1:] == [[False, True, False]] * 2
    assert seen[1] == [[True] * 3] * 3
