"""Reducing inside the vision encoder: against a written-out encoder, exact counts, and what people do with towers."""

from __future__ import annotations

import copy
import functools
import itertools
import json
import statistics
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AttentionInterface, CLIPVisionConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import foveate
from foveate.methods.tools.plans import even_plan, least_left, staged_plan
from foveate.tokens import BlockTokens, EncoderTap

from .. import encoder_reference as slow
from .. import zoo

DEEP = "llama-deep"  # four encoder blocks make the features


def inputs_for(number: int = 2) -> dict[str, torch.Tensor]:
    return {**zoo.pad([zoo.prompt(1, 2, 2, seed) for seed in range(number)]), "pixel_values": zoo.pictures(number)}


CASES = {
    "tome": (foveate.ToMe(budget=21), slow.tome, True),
    "tome, plain attention": (foveate.ToMe(budget=21, proportional=False), slow.tome, False),
    "tome, two blocks": (foveate.ToMe(r=(40, 9), layers=(1, 3)), slow.tome, True),
    "evit": (foveate.EViT(), slow.evit, False),
    "evit, budget": (foveate.EViT(budget=13), slow.evit, False),
    "evit, no sum": (foveate.EViT(fuse=False), functools.partial(slow.evit, fuse=False), False),
    "ats": (foveate.ATS(), slow.ats_official, False),
    "ats, K": (foveate.ATS(points=20), slow.ats_official, False),
    "ats, haurum": (foveate.ATS(points=20, variant="haurum"), slow.ats_haurum, False),
    "crossget": (foveate.CrossGET(), slow.crossget, True),
    "crossget, budget": (foveate.CrossGET(budget=21), slow.crossget, True),
}


@pytest.mark.parametrize("case", CASES)
def test_the_encoder_written_out(case):
    """Features, places, where each cell went, and counts per layer, for two pictures in one batch."""
    method, step, proportional = CASES[case]
    model, inputs = zoo.load(decoder=DEEP, dtype=torch.float64), inputs_for()
    inputs["pixel_values"] = inputs["pixel_values"].double()
    encoded = foveate.encode(model, method, **inputs)
    with torch.no_grad():
        for i, pixels in enumerate(inputs["pixel_values"]):
            plan = method.plan(4, zoo.TOKENS)
            states, cells, owner, counts = slow.encode(model.model.vision_tower, pixels, 4, plan, step, proportional)
            raster = sorted(range(len(cells)), key=lambda o: cells[o])
            expected = model.model.multi_modal_projector(states[1:][raster][None])[0]
            image = encoded.report.images[i]
            assert image.kept == [cells[o] for o in raster]
            assert image.source == [raster.index(o) if o >= 0 else -1 for o in owner]
            assert [layer[i] for layer in encoded.report.encoder_layers] == counts
            torch.testing.assert_close(encoded.embeds[i], expected, atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def deep():
    """The depth and grid of CLIP-L/14-336, narrow."""
    tower = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=24, num_attention_heads=2, image_size=336, patch_size=14
    )
    torch.manual_seed(0)
    return zoo.build_llava("llama", tower=tower).eval()


def run(model, method, images: int = 1):
    ids = torch.tensor([[1, 20, *[zoo.IMAGE] * 576, 30]] * images)
    pixels = torch.randn(images, 3, 336, 336, generator=torch.Generator().manual_seed(1))
    return foveate.encode(model, method, input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels)


@pytest.mark.parametrize(
    ("method", "left"),
    [
        (foveate.ToMe(budget=288), [13] * 12 + [12] * 11),
        (foveate.ToMe(budget=192), [17] * 16 + [16] * 7),
        (foveate.ToMe(budget=144), [19] * 18 + [18] * 5),
        (foveate.ToMe(budget=64), [23] * 6 + [22] * 17),
        (foveate.ToMe(budget=32), [24] * 15 + [23] * 8),
        (foveate.CrossGET(), [13] * 23),
    ],
)
def test_exact_schedules(deep, method, left):
    """The released CrossGET merges 13 patches in each of 23 blocks; the others are the most even ones for their count."""
    report = run(deep, method).report
    counts = [576, *(layer[0] for layer in report.encoder_layers)]
    assert [a - b for a, b in itertools.pairwise(counts)] == left
    # every token is made of some cells, and with [CLS] all of them sum to 577
    sizes = [report.images[0].source.count(output) for output in range(report.after[0])]
    assert min(sizes) >= 1
    assert sum(sizes) + 1 == 577
    assert report.after == [576 - sum(left)]


@pytest.mark.parametrize(
    ("method", "stages"),
    [
        (foveate.EViT(), [405, 285, 201]),
        (foveate.EViT(keep_rate=0.63), [364, 231, 147]),
        (foveate.EViT(keep_rate=0.5), [289, 146, 74]),
        (foveate.EViT(keep_rate=0.25, counting="absolute"), [145, 37, 10]),
        (foveate.ToMe(layers=(6, 12, 18), r=(432, 108, 27)), [288, 180, 153]),
        (foveate.EViT(budget=144), [363, 229, 144]),
        (foveate.ATS(budget=144, variant="haurum"), [363, 229, 144]),
    ],
)
def test_three_stages(deep, method, stages):
    counts = [layer[0] for layer in run(deep, method).report.encoder_layers]
    assert counts == [576] * 6 + [stages[0]] * 6 + [stages[1]] * 6 + [stages[2]] * 5


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        ("haurum", [(145, 145), (135, 145), (95, 110), (29, 55)]),
        ("official", [(145, 145), (130, 145), (80, 100), (25, 45)]),
    ],
)
def test_ats_adapts_to_the_picture(variant, expected):
    """The more [CLS] attention is concentrated, the fewer tokens of at most 145: medians of seven pictures."""
    method = foveate.ATS(points=145, variant=variant)
    for spread, (low, high) in zip((0.0, 1.0, 2.0, 4.0), expected, strict=True):
        counts = []
        for seed in range(7):
            logits = spread * torch.randn(1, 576, generator=torch.Generator().manual_seed(seed))
            keys = torch.cat([torch.zeros(1, 1, 1), logits[..., None]], 1)
            tap = EncoderTap(torch.ones(1, 1), keys, 1, values=torch.ones(1, 577, 1))
            tokens = BlockTokens(tap, torch.ones(1, 576, dtype=torch.bool), torch.ones(1, 576), 0, 145)
            counts.append(method.shrink(tokens).index.shape[1])
        assert low <= statistics.median(counts) <= high


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(-3, 3), min_size=2, max_size=40),
    st.integers(1, 40),
    st.sampled_from(["official", "haurum"]),
    st.booleans(),
)
def test_ats_with_ties_and_any_count(levels, count, variant, budget):
    number = len(levels)
    count = min(count, number - 1) if budget else count
    keys = torch.cat([torch.zeros(1, 1), torch.tensor(levels, dtype=torch.float32)[:, None]])[None]
    tap = EncoderTap(torch.ones(1, 1), keys, 1, values=torch.ones_like(keys))
    tokens = BlockTokens(tap, torch.ones(1, number, dtype=torch.bool), torch.ones(1, number), 0, count)
    method = foveate.ATS(variant=variant, min_tokens=1, **({"budget": count} if budget else {"points": count}))
    merge = method.shrink(tokens)
    kept = merge.index[0].tolist()
    assert kept == sorted(set(kept))
    assert 1 <= len(kept) <= count
    assert not budget or len(kept) == count
    assert [i for i, o in enumerate(merge.owner[0].tolist()) if o >= 0] == kept


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 700), st.integers(1, 30), st.data())
def test_plans(patches, blocks, data):
    left = data.draw(st.integers(1, patches - 1))
    numbers = list(range(blocks))
    plan = even_plan("m", patches, left, numbers, at_most_half=False)
    steps = [a - b for a, b in zip([patches, *plan.values()], plan.values(), strict=False)]
    assert list(plan.values())[-1] == left
    assert min(steps) >= 1
    if len(plan) == blocks:
        assert max(steps) - min(steps) <= 1
    least = least_left(patches, blocks)
    if left >= least:
        halved = [patches, *even_plan("m", patches, left, numbers, at_most_half=True).values()]
        assert halved[-1] == left
        assert all(b >= a - a // 2 for a, b in itertools.pairwise(halved))
    else:
        with pytest.raises(foveate.InputError, match=f"leave {least} of {patches}"):
            even_plan("m", patches, left, numbers, at_most_half=True)
    staged = [patches, *staged_plan(patches, left, numbers).values()]
    assert staged == sorted(staged, reverse=True)
    assert staged[-1] == left


def test_nothing_to_merge_leaves_the_features_alone(deep):
    """r=0 everywhere: the vanilla tower."""
    ids, pixels = torch.tensor([[1, *[zoo.IMAGE] * 576]]), torch.randn(1, 3, 336, 336)
    encoded = foveate.encode(deep, foveate.ToMe(r=(0,)), input_ids=ids, pixel_values=pixels)
    with torch.no_grad():
        torch.testing.assert_close(encoded.embeds[0], deep.get_image_features(pixels).pooler_output[0])


@pytest.mark.parametrize(
    ("method", "step", "proportional"),
    [
        (foveate.ToMe(budget=21, order="encoder"), slow.tome, True),
        (foveate.EViT(order="encoder"), functools.partial(slow.evit, ordered=True), False),
        (foveate.ATS(order="encoder"), functools.partial(slow.ats_official, ordered=True), False),
    ],
)
def test_order_of_the_official_code(method, step, proportional):
    model, inputs = zoo.load(decoder=DEEP, dtype=torch.float64), inputs_for(1)
    inputs["pixel_values"] = inputs["pixel_values"].double()
    encoded = foveate.encode(model, method, **inputs)
    plan = method.plan(4, zoo.TOKENS)
    with torch.no_grad():
        states, cells, *_ = slow.encode(model.model.vision_tower, inputs["pixel_values"][0], 4, plan, step, proportional)
        expected = model.model.multi_modal_projector(states[1:][None])[0]
    assert encoded.report.images[0].kept == cells
    assert cells != sorted(cells)
    torch.testing.assert_close(encoded.embeds[0], expected, atol=1e-5, rtol=1e-5)


def test_tome_without_cls():
    """Without [CLS] the first patch is an even one."""
    model, method = zoo.tower("siglip"), foveate.ToMe(budget=21)
    encoded = foveate.encode(model, method, **inputs_for(1))
    tower = copy.deepcopy(model.model.vision_tower)
    with torch.no_grad():
        states, cells, owner, _ = slow.encode(tower, zoo.pictures(1)[0], 4, method.plan(4, zoo.TOKENS), slow.tome, True, lead=0)
        order = sorted(range(len(cells)), key=lambda o: cells[o])
        expected = model.model.multi_modal_projector(states[order][None].float())[0]
    assert encoded.report.images[0].kept == sorted(cells)
    assert encoded.report.images[0].source == [order.index(o) for o in owner]
    torch.testing.assert_close(encoded.embeds[0], expected, atol=1e-4, rtol=1e-4)


def test_order_of_the_encoder():
    """As the blocks left them: the same tokens as in raster order, otherwise arranged."""
    model, inputs = zoo.load(decoder=DEEP), inputs_for()
    for name in ("tome", "evit"):
        raster = foveate.encode(model, foveate.get(name, budget=20), **inputs)
        found = foveate.encode(model, foveate.get(name, budget=20, order="encoder"), **inputs)
        for a, b, image in zip(raster.embeds, found.embeds, found.report.images, strict=True):
            place = torch.tensor(image.kept).argsort()
            assert image.kept != sorted(image.kept)
            torch.testing.assert_close(b[place], a, atol=2e-5, rtol=2e-5)
        assert [sorted(image.kept) for image in found.report.images] == [image.kept for image in raster.report.images]


def test_the_report_counts_per_layer_and_is_json():
    model, inputs = zoo.load(decoder=DEEP), inputs_for()
    with foveate.EViT(budget=16)(model) as session:
        model.generate(**inputs, max_new_tokens=1)
    assert session.report.encoder_layers == [[64] * 2, [40] * 2, [25] * 2, [16] * 2]
    assert json.loads(session.report.to_json())["encoder_layers"] == session.report.encoder_layers
    assert "in the encoder, after each layer: 128, 80, 50, 32" in str(session.report)
    with foveate.Spatial(budget=16)(model) as session:
        model.generate(**inputs, max_new_tokens=1)
    assert session.report.encoder_layers == []


def test_training_through_merged_tokens_and_checkpointing():
    """Gradients reach the tower and are the same with checkpointing, which stays switched on afterwards."""
    inputs = inputs_for()
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == zoo.IMAGE, -100)
    gradients = []
    for checkpointed in (False, True):
        model = zoo.load(decoder=DEEP).train()
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        layers = model.model.vision_tower.encoder.layers
        with foveate.ToMe(budget=20)(model):
            model(**inputs, labels=labels).loss.backward()
        assert all(layer.gradient_checkpointing == checkpointed for layer in layers)
        gradients.append([layers[at].mlp.fc1.weight.grad.clone() for at in (0, 3)])
    for a, b in zip(*gradients, strict=True):
        assert a.abs().max() > 0
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_attention_that_takes_no_bias(monkeypatch):
    """Blocks that must weigh sizes or hide padding attend with SDPA; the others as they were asked to."""
    seen = []

    def strange(module, query, key, value, attention_mask, **kwargs):
        seen.append(attention_mask)
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register("strange_kernel", strange)
    model, inputs = zoo.load(decoder=DEEP), inputs_for()
    expected = foveate.encode(model, foveate.ToMe(budget=20), **inputs).embeds
    tower = model.model.vision_tower
    tower.config._attn_implementation = "strange_kernel"
    configs = [layer.self_attn.config for layer in tower.encoder.layers]
    encoded = foveate.encode(model, foveate.ToMe(budget=20), **inputs)
    for a, b in zip(encoded.embeds, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert all(mask is None for mask in seen)
    assert len(seen) == 2, "the first block, and the one behind the features"
    assert any("strange_kernel takes no bias" in note for note in encoded.report.notes)
    assert [layer.self_attn.config for layer in tower.encoder.layers] == configs
    seen.clear()
    assert not foveate.encode(model, foveate.EViT(budget=20), **inputs).report.notes
    assert len(seen) == 5


def test_another_thread_is_left_alone():
    """While one thread reduces, the same tower encodes in full for another."""
    model, inputs, found = zoo.load(decoder=DEEP), inputs_for(), []
    full = model.get_image_features(inputs["pixel_values"]).pooler_output

    class Slow(foveate.EViT):
        def shrink(self, tokens):
            other = threading.Thread(target=lambda: found.append(model.get_image_features(inputs["pixel_values"]).pooler_output))
            other.start()
            other.join()
            return super().shrink(tokens)

    alone = foveate.encode(model, foveate.EViT(budget=20), **inputs).embeds
    together = foveate.encode(model, Slow(budget=20), **inputs).embeds
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
    assert len(found) == 3
    assert all(torch.equal(a, b) for other in found for a, b in zip(other, full, strict=True))


@pytest.mark.parametrize(
    ("layers", "method", "match"),
    [
        ([-2, -1], foveate.ToMe(budget=20), r"several encoder layers \(3, 4\)"),
        (-6, foveate.ATS(), "no layer of its vision encoder"),
        (-6, foveate.ToMe(r=5), "no layer of its vision encoder"),
        (-6, foveate.Scope(budget=5), "no layer of its vision encoder"),
        (-2, foveate.EViT(layers=(1, 9)), "blocks 0 to 3 make the features"),
        (-2, foveate.EViT(layers=(-1,)), "blocks 0 to 3 make the features"),
        (-2, foveate.ToMe(r=(1, 2, 3)), "r has 3 numbers"),
        (-2, foveate.ATS(points=(1, 2)), "points has 2 numbers"),
        (-2, foveate.ToMe(budget=3), "leave 4 of 64"),
    ],
)
def test_what_a_model_lacks_is_said_when_attaching(layers, method, match):
    model = zoo.load(decoder=DEEP)
    model.config.vision_feature_layer = layers
    with pytest.raises(foveate.FoveateError, match=match):
        foveate.attach(model, method)
    assert "generate" not in model.__dict__
    model.config.vision_feature_layer = -2
    with foveate.Spatial(budget=9)(model):
        model.generate(**inputs_for(), max_new_tokens=1)


@pytest.mark.parametrize("layer", [-4, -3, -1, 2])
def test_a_call_that_names_its_feature_layer(layer):
    """As if the config had named it, for methods in the encoder and behind it."""
    for method in (foveate.ATS(points=30), foveate.ToMe(budget=30), foveate.Scope(budget=9), foveate.VisionZip(budget=9)):
        model, other = zoo.load(decoder=DEEP), zoo.load(decoder=DEEP)
        other.config.vision_feature_layer = layer
        named = foveate.encode(model, method, **inputs_for(), vision_feature_layer=layer)
        expected = foveate.encode(other, method, **inputs_for())
        for a, b in zip(named.embeds, expected.embeds, strict=True):
            assert torch.equal(a, b)


def test_a_tower_that_is_compiled_by_itself():
    model = zoo.load(decoder=DEEP)
    torch._dynamo.reset()  # what other tests compiled counts against the limit, beyond which nothing is compiled
    model.model.vision_tower.compile(backend="eager")
    for method in (foveate.EViT(budget=20), foveate.ATS()):
        with method(model), pytest.raises(foveate.UnsupportedModelError, match="compiled by itself"):
            model.generate(**inputs_for(), max_new_tokens=1)


def test_threads_that_change_how_attention_is_computed():
    """The configs of attention modules are shared; the last of several calls puts them back."""
    seen = []

    def strange(module, query, key, value, attention_mask, **kwargs):
        seen.append(attention_mask is not None)
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register("strange_kernel", strange)
    model, inputs = zoo.load(decoder=DEEP), inputs_for(1)
    model.model.vision_tower.config._attn_implementation = "strange_kernel"
    configs = [layer.self_attn.config for layer in model.model.vision_tower.encoder.layers]

    def work():
        for _ in range(25):
            foveate.encode(model, foveate.ToMe(budget=20), **inputs)

    threads = [threading.Thread(target=work) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert seen
    assert not any(seen)
    layers = model.model.vision_tower.encoder.layers
    assert all(layer.self_attn.config is config for layer, config in zip(layers, configs, strict=True))
    assert not any("_foveate_attends" in layer.self_attn.__dict__ for layer in layers)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: foveate.Merge(m.index + 1000, m.owner, m.share, m.valid),
        lambda m: foveate.Merge(m.index * 0, m.owner, m.share, m.valid),
        lambda m: foveate.Merge(m.index, m.owner.clamp(min=999), m.share, m.valid),
        lambda m: foveate.Merge(m.index, m.owner.roll(1, 1), m.share, m.valid),
    ],
    ids=["no such patch", "one patch for all", "no such output", "another's patch"],
)
def test_faults_of_a_method_are_named(change):
    class Broken(foveate.EViT):
        def shrink(self, tokens):
            return change(super().shrink(tokens))

    with pytest.raises(foveate.FoveateError, match="This is a fault of the method"):
        foveate.encode(zoo.load(decoder=DEEP), Broken(budget=20), **inputs_for())


@pytest.mark.parametrize("method", [foveate.Resize(budget=16), foveate.EViT(budget=16), foveate.ToMe(budget=16)])
def test_pictures_smaller_than_a_patch(method):
    with pytest.raises(foveate.InputError, match="10 x 10 pixels are smaller than one patch"):
        foveate.encode(zoo.load(decoder=DEEP), method, **{**inputs_for(), "pixel_values": torch.zeros(2, 3, 10, 10)})


def test_ats_with_one_token_keeps_the_most_significant():
    """A single point is the end of the curve, not its beginning."""
    for method in (foveate.ATS(budget=1), foveate.ATS(points=1, min_tokens=1)):
        tap = EncoderTap(torch.ones(1, 1), torch.randn(1, 65, 1), 1, values=torch.ones(1, 65, 1))
        tokens = BlockTokens(tap, torch.ones(1, 64, dtype=torch.bool), torch.ones(1, 64), 0, 1)
        assert method.shrink(tokens).index.tolist() == [[int(tap.keys[0, 1:, 0].argmax())]]


def test_one_number_stands_for_all_blocks():
    assert foveate.ToMe(r=5).plan(3, 64) == foveate.ToMe(r=(5, 5, 5)).plan(3, 64) == {0: 59, 1: 54, 2: 49}
    assert foveate.ATS(points=(145, 37, 10), variant="haurum").plan(23, 576) == {6: 145, 12: 37, 18: 10}


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: foveate.ToMe(), "no rule of its own"),
        (lambda: foveate.ToMe(budget=5, r=(3,)), "give one of them"),
        (lambda: foveate.ToMe(r=(-1,)), "at least 0"),
        (lambda: foveate.ToMe(budget=5, layers=(3, 1)), "ascending order"),
        (lambda: foveate.EViT(keep_rate=0.0), "above 0"),
        (lambda: foveate.ATS(points=0), "at least 1"),
        (lambda: foveate.ATS(points=3, budget=9), "give one of them"),
        (lambda: foveate.ToMe(r=1.5), "expected several of a whole number"),
        (lambda: foveate.CrossGET(r=0), "at least 1"),
        (lambda: foveate.Compose(foveate.ToMe(budget=5), foveate.PruMerge()), "both act before the decoder"),
    ],
)
def test_wrong_fields(build, match):
    with pytest.raises(foveate.InputError, match=match):
        build()


def test_with_a_method_inside_the_decoder():
    """Encoder reducers compose with decoder reducers."""
    model, inputs = zoo.load(decoder=DEEP), inputs_for()
    with foveate.Compose(foveate.ToMe(budget=20), foveate.FastV(budget=0.5))(model) as session:
        model.generate(**inputs, max_new_tokens=2)
    assert session.report.layers == [40, 40, 20, 20]
