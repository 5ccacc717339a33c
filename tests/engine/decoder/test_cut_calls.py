"""Ways of calling a model with a method inside its decoder that once went wrong, or must be refused."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass

import pytest
import torch
from transformers import DynamicCache

import foveate

from ... import reference, zoo
from .test_hooks import OPTIONS, Ragged

CLOSE = dict(atol=3e-4, rtol=3e-4)
CUTS = {
    "original": foveate.FastV(layer=1, budget=9),
    "compact": foveate.FastV(layer=2, budget=9, positions="compact"),
    "both": foveate.Compose(foveate.PruMergePlus(), foveate.FastV(layer=1)),
}


@pytest.fixture(scope="module")
def model():
    return zoo.load()


def generate(model, inputs, new=4, **options):
    options = {**OPTIONS, "max_new_tokens": new, "min_new_tokens": new, **options}
    return model.generate(**inputs, **options)


def logits(out):
    return torch.stack(out.logits, 1)


def own_cache(model):
    return DynamicCache(config=model.config.get_text_config())


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("name", CUTS)
def test_a_decoding_loop_by_hand(model, name, given, masked):
    """Also where the decoder makes the cache itself."""
    inputs = zoo.batch(rows=(0, 1) if masked else (1,))
    with CUTS[name](model), torch.no_grad():
        wanted = logits(generate(model, inputs))
        mask = inputs["attention_mask"]
        out = model(**inputs, use_cache=True, past_key_values=own_cache(model) if given else None)
        for step in range(4):
            torch.testing.assert_close(
                out.logits[:, -1].masked_fill(wanted[:, step].isinf(), float("-inf")), wanted[:, step], **CLOSE
            )
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            token = wanted[:, step].argmax(-1, keepdim=True)
            more = {"attention_mask": mask} if masked else {}
            out = model(input_ids=token, past_key_values=out.past_key_values, **more)


@pytest.mark.parametrize("method", [foveate.FastV(layer=2, budget=3), foveate.PyramidDrop(), foveate.get("aim-prune")])
def test_a_prompt_that_ends_with_its_picture(model, method):
    """What follows is predicted from the last visual token: it stays. Captions are taught from there, too."""
    inputs = zoo.batch(rows=(0,))
    end = int((inputs["input_ids"][0] == zoo.IMAGE).nonzero()[-1]) + 1
    short = {**{name: inputs[name][:, :end] for name in ("input_ids", "attention_mask")}, "pixel_values": inputs["pixel_values"]}
    with method(model) as session:
        out = generate(model, short)
        assert all(stage.kept[-1] == zoo.TOKENS - 1 for stage in session.report.images[0].stages)
        uncached = generate(model, short, use_cache=False)
        torch.testing.assert_close(logits(uncached), logits(out), **CLOSE)
        labels = inputs["input_ids"].masked_fill(torch.arange(inputs["input_ids"].shape[1]) < end, -100)
        taught = model(**inputs, labels=labels).logits[0, end - 1]
    assert logits(out)[0, 0][logits(out)[0, 0].isfinite()].abs().max() > 0
    torch.testing.assert_close(taught.masked_fill(logits(out)[0, 0].isinf(), float("-inf")), logits(out)[0, 0], **CLOSE)


@pytest.mark.parametrize("rows", [(0,), (0, 3)])
@pytest.mark.parametrize("name", CUTS)
def test_a_text_turn(model, name, rows):
    """In one piece by ``generate`` it gives what the same tokens one by one give."""
    inputs, cache = zoo.batch(rows=rows), own_cache(model)
    with CUTS[name](model) as session, torch.no_grad():
        first = generate(model, inputs, past_key_values=cache)
        extra = torch.tensor([zoo.prompt(0, 7, 0, seed=9)] * len(rows))
        ids, held = torch.cat([first.sequences, extra], 1), copy.deepcopy(cache)
        ones = torch.ones(len(rows), ids.shape[1] - inputs["input_ids"].shape[1], dtype=torch.long)
        mask = torch.cat([inputs["attention_mask"], ones], 1)
        out = generate(model, {"input_ids": ids, "attention_mask": mask}, past_key_values=cache)
        assert session.report.before == []
        for column in range(ids.shape[1] - 9, ids.shape[1]):  # the last token of the first turn is not in the cache yet
            seen = mask[:, : column + 1]
            # without them, transformers itself numbers tokens by hand by columns, padding too
            places = {} if name == "both" else {"position_ids": seen.sum(1, keepdim=True) - 1}
            one = model(input_ids=ids[:, column : column + 1], attention_mask=seen, past_key_values=held, **places).logits
    wanted = logits(out)[:, 0]
    torch.testing.assert_close(one[:, -1].masked_fill(wanted.isinf(), float("-inf")), wanted, **CLOSE)


@pytest.mark.parametrize("decoder", ["llama", "gemma3"])
@pytest.mark.parametrize("cached_by_config", [True, False])
def test_padding_inside_a_later_turn(decoder, cached_by_config):
    """Under SDPA the model leaves out masks that it takes for empty; Gemma 3 sizes those of full layers by one that is cut here."""
    inputs = {**zoo.pad([zoo.prompt(1, 3, 4, 1), zoo.prompt(1, 3, 4, 2)]), "pixel_values": zoo.pictures(2)}
    more, found = zoo.pad([zoo.prompt(0, 7, 0, seed=9), zoo.prompt(0, 3, 0, seed=8)]), []
    for attn in ("sdpa", "eager"):
        model = zoo.load(decoder=decoder, attn=attn)
        cache = own_cache(model) if cached_by_config else DynamicCache()
        with foveate.FastV(layer=1, budget=9)(model):
            first = generate(model, inputs, 2, past_key_values=cache)
            ids = torch.cat([first.sequences, more["input_ids"]], 1)
            mask = torch.cat([inputs["attention_mask"], torch.ones(2, 2, dtype=torch.long), more["attention_mask"]], 1)
            found.append(logits(generate(model, {"input_ids": ids, "attention_mask": mask}, 3, past_key_values=cache)))
    torch.testing.assert_close(*found, **CLOSE)


@pytest.mark.parametrize("name", CUTS)
def test_guidance_by_another_prompt(model, name):
    """Classifier-free guidance runs a second, text-only prompt through the same model in between."""
    inputs, other = zoo.batch(rows=(0,)), torch.tensor([zoo.prompt(0, 90, 0, 4)])
    with CUTS[name](model):
        wanted = logits(generate(model, inputs))[:, 0]
        guided = generate(model, inputs, guidance_scale=1.5, negative_prompt_ids=other)
    torch.testing.assert_close(logits(guided)[:, 0], wanted)


def test_the_model_as_its_own_assistant(model):
    inputs = zoo.batch(rows=(1,))
    with CUTS["original"](model):
        wanted = generate(model, inputs)
        assisted = generate(model, inputs, assistant_model=zoo.load())
    assert torch.equal(assisted.sequences, wanted.sequences)


@pytest.mark.parametrize("name", ["original", "compact"])
def test_caches_of_others_are_refused(model, name):
    inputs, cache = zoo.batch(rows=(0,)), own_cache(model)
    with CUTS[name](model):
        first = generate(model, inputs, past_key_values=cache)
    ids = torch.cat([first.sequences, torch.tensor([zoo.prompt(0, 7, 0, seed=9)])], 1)
    more = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for other in (foveate.PruMerge(), foveate.FastV(layer=1, budget=8), foveate.Spatial(budget=1.0)):
        with other(model):
            with pytest.raises(foveate.CacheError, match="another method"):
                generate(model, more, past_key_values=copy.deepcopy(cache))
            with pytest.raises(foveate.CacheError, match="another method"):
                model(input_ids=ids[:, -1:], past_key_values=copy.deepcopy(cache))


def test_caches_that_cannot_be_continued(model):
    inputs = zoo.batch(rows=(0,))
    with CUTS["original"](model):
        beams = generate(model, inputs, num_beams=2, output_logits=False).past_key_values
        with pytest.raises(foveate.CacheError, match="beam"):
            model(input_ids=torch.tensor([[7], [7]]), past_key_values=beams)
        cropped = own_cache(model)
        model(**inputs, past_key_values=cropped)
        cropped.crop(-20)
        with pytest.raises(foveate.CacheError, match="cropped"):
            model(input_ids=torch.randint(10, 90, (1, 25)), past_key_values=cropped)
        cropped.reset()
        words = torch.randint(10, 90, (1, 12))
        again = model(input_ids=words, past_key_values=cropped).logits
    torch.testing.assert_close(again, model(input_ids=words).logits)
    failed = own_cache(model)
    with foveate.PyramidDrop(budget=0.1)(model), pytest.raises(foveate.InputError, match="mean over layers"):
        generate(model, inputs, past_key_values=failed)
    with foveate.PyramidDrop(budget=0.6)(model), pytest.raises(foveate.CacheError, match="failed"):
        generate(model, inputs, past_key_values=failed)


def test_prompts_that_cannot_be_cut(model):
    inputs = zoo.batch(rows=(0,))
    square = torch.ones(1, 1, *[inputs["input_ids"].shape[1]] * 2, dtype=torch.bool).tril()
    with CUTS["original"](model):
        with pytest.raises(foveate.InputError, match="in pieces"):
            generate(model, inputs, prefill_chunk_size=16)
        with pytest.raises(foveate.InputError, match="attention_mask has 4"):
            model(**{**inputs, "attention_mask": square})
    for layer in (0, 4, 99):
        with pytest.raises(foveate.InputError, match="cut before"):
            Ragged(layers=(layer,))(model).attach()
    with pytest.raises(foveate.InputError, match="both cut before decoder layer 2"):
        foveate.Compose(foveate.FastV(), foveate.get("text-relevance"))(model).attach()
    with pytest.raises(foveate.InputError, match="both act before"):
        foveate.Compose(foveate.PruMerge(), foveate.Spatial(budget=3))
    with pytest.raises(foveate.InputError, match="Compose takes methods"):
        foveate.Compose("fastv")
    assert foveate.engine.session.installed_on(model) is None


def test_prompt_tuning_is_refused(model):
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, num_layers=4, token_dim=64, num_attention_heads=4)
    tuned = peft.get_peft_model(zoo.load(), config).eval()
    with CUTS["original"](tuned), pytest.raises(foveate.UnsupportedModelError, match="embeddings"):
        tuned.generate(**zoo.batch(rows=(0,)), max_new_tokens=1)


def test_strange_layers_are_refused():
    model = zoo.load()
    model.get_decoder().config.layer_types = ["full_attention", "conv"] * 2
    with pytest.raises(foveate.UnsupportedModelError, match="kind conv"):
        foveate.FastV()(model).attach()


@dataclass(kw_only=True)
class Pairs(foveate.DecoderReducer):
    """Every second visual token becomes the mean of itself and its neighbour."""

    name = "pairs"
    reads = "nothing"

    def cuts(self, layers):
        return (2,)

    def cut(self, tokens):
        number = tokens.valid.shape[1]
        target = torch.arange(number).expand(len(tokens.valid), -1)
        eye = torch.eye(number)
        even = tokens.visual & (tokens.columns % 2 == 0)
        mix = (eye + torch.roll(eye, 1, 1)) / 2 * even[..., None]
        return foveate.Cut(even, target=target, mix=mix)


@pytest.mark.parametrize("positions", ["original", "compact"])
def test_merging_inside_the_decoder(monkeypatch, positions):
    model, plain, method = zoo.load(), zoo.load(attn="eager"), Pairs(positions=positions)
    inputs, heard = zoo.batch(rows=(1,)), reference.overheard(Pairs, monkeypatch)
    with method(model) as session:
        out = generate(model, inputs)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            generate(model, inputs, 1)
    assert session.report.layers == [128, 128, 64, 64]
    every = [list(range(zoo.TOKENS))] * 2
    embeds = list(model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output)
    embeddings, places = reference.spliced_embeddings(model, inputs, 0, every, embeds, zoo.IMAGE)
    cuts = reference.cuts_of_row(heard[:1], 0, offset=0)
    wanted = reference.Masked(plain, cuts, embeddings.shape[1], positions == "compact")
    torch.testing.assert_close(logits(out)[0], wanted.logits(embeddings, out.sequences[0, -4:].tolist(), places), **CLOSE)


def test_budgets_that_cover_everything_inside_compose(model):
    inputs = zoo.batch("right")
    plain = generate(model, inputs)
    every = (foveate.ITI(budget=1.0), foveate.ITI(budget=64), foveate.AIM(budget=64), foveate.SparseVLM.released(budget=64))
    for method in (*every, *(foveate.Compose(each) for each in every), foveate.Compose(foveate.YOPO(budget=1.0), every[3])):
        with method(model) as session:
            out = generate(model, inputs)
        assert session.report.layers == [256] * 4
        assert torch.equal(logits(out), logits(plain))
    with foveate.AIM(budget=1)(model) as session:
        generate(model, inputs)
        assert session.report.layers == [4, 4, 4, 0]
    with foveate.GSearch(rates=(1, 1, 1, 0.999))(model) as session:
        generate(model, zoo.batch())
        assert session.report.layers == [256] * 4  # 0.999 of 64 tokens are 64
    with foveate.GSearch(rates=(1, 1, 1, 0.98))(model) as session:
        generate(model, zoo.batch())
        assert session.report.layers == [256, 256, 256, 252]


def test_text_that_one_method_removes_and_another_reads(model):
    first, second = foveate.TextRelevanceCut(prune_text=True, layers=(1,)), foveate.SparseVLM(layers=(2,))
    with foveate.Compose(first, second)(model) as session:
        generate(model, zoo.batch())
    assert session.report.layers[2] < session.report.layers[1] < 256


def test_a_method_that_does_not_fit_leaves_nothing_behind(model, tmp_path):
    file, inputs = tmp_path / "heads.json", zoo.batch(rows=(0,))
    before, plain = sorted(model.__dict__), generate(model, inputs)
    for heads in ([[True, False]] * 3 + [[False] * 3], [[True] * 3] * 4):
        file.write_text(json.dumps({"heads": heads}))
        with pytest.raises(foveate.InputError, match="a mask of 3 heads"):
            foveate.attach(model, "yopo", heads=str(file))
        assert sorted(model.__dict__) == before
        assert not any(module._forward_pre_hooks for module in model.get_decoder().modules())
        assert torch.equal(logits(generate(model, inputs)), logits(plain))
    for text in ('{"heads": ["ab"]}', '{"heads": [["false", 0.1]]}', "[]"):
        file.write_text(text)
        with pytest.raises(foveate.InputError, match="no head mask"):
            foveate.YOPO(heads=str(file))


def test_nested_methods_and_copies(model):
    """The innermost method acts; a copy of an attached model does what the original does."""
    inputs = zoo.batch()
    with foveate.FastV(layer=1)(model) as outer:
        wanted = generate(model, inputs)
        with foveate.Spatial(budget=10)(model) as inner:
            generate(model, inputs)
            assert inner.report.layers == [40] * 4
        with foveate.PyramidDrop()(model) as inner:
            generate(model, inputs)
            assert inner.report.layers == [256, 128, 64, 32]
        assert torch.equal(generate(model, inputs).sequences, wanted.sequences)
        assert outer.report.layers == [256, 128, 128, 128]
        twin = copy.deepcopy(model)
    assert torch.equal(generate(twin, inputs).sequences, wanted.sequences)
    foveate.detach(twin)
    assert torch.equal(logits(generate(twin, inputs)), logits(generate(model, inputs)))


def test_gradient_checkpointing_is_refused_where_patterns_change_layers():
    model = zoo.load().train()
    model.gradient_checkpointing_enable()
    inputs = zoo.batch(rows=(0,))
    with foveate.get("yopo")(model), pytest.raises(foveate.UnsupportedModelError, match="checkpointing"):
        model(**inputs, labels=inputs["input_ids"])


def test_dropout_of_adapters_does_not_touch_the_choice():
    """Adapters with dropout in the layer that is asked: its dry run makes no noise, and takes no random numbers."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4, lora_dropout=0.5, target_modules=r".*language_model.*layers\.3\.self_attn\.[qk]_proj", init_lora_weights=False
    )
    tuned, inputs, scores = peft.get_peft_model(zoo.load(), config), zoo.batch(rows=(1,)), []
    with foveate.PyramidDrop(layers=(3,))(tuned) as session, torch.no_grad():
        for seed, training in ((0, False), (1, True), (2, True)):
            torch.manual_seed(seed)
            tuned.train(training)
            tuned(**inputs)
            scores.append([image.stages[0].scores for image in session.report.images])
            assert all(part.training == training for part in tuned.modules())
    assert scores[0] == scores[1] == scores[2]
