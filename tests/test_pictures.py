"""Pictures that are encoded once: equal to encoding them anew, for every method, and usable as inputs of the model."""

import copy

import pytest
import torch

import foveate
from foveate.chat import make_inputs
from foveate.families import FAMILIES
from foveate.pictures import encoded_call

from . import families, zoo
from .methods.test_conformance import BEFORE, PLAIN, _build


@pytest.fixture
def model():
    return zoo.load()


@pytest.fixture
def runs(model):
    """How often the vision encoder ran."""
    count = []
    handle = model.model.vision_tower.register_forward_hook(lambda *_: count.append(1))
    yield count
    handle.remove()


def test_every_method_equals_encoding_anew(model):
    inputs = zoo.batch()
    pictures = foveate.Pictures(model, **inputs)
    for variant in BEFORE:
        method = _build(variant)
        found, wanted = pictures.reduce(method), foveate.encode(model, method, **inputs)
        for ours, theirs in zip(found.embeds, wanted.embeds, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
        assert found.report.kept == wanted.report.kept, variant
        assert found.inputs.keys() == wanted.inputs.keys()
        assert all(torch.equal(found.inputs[name], wanted.inputs[name]) for name in wanted.inputs)
        assert found.report.method == wanted.report.method


@pytest.mark.parametrize("family", families.USABLE)
def test_every_family(family):
    model, inputs = families.load(family), families.batch(family)
    pictures = foveate.Pictures(model, **inputs)
    for method in (foveate.Spatial(budget=0.3), foveate.PruMergePlus(), foveate.PruMergePlus(budget=5)):
        found, wanted = pictures.reduce(method), foveate.encode(model, method, **inputs)
        assert found.report.kept == wanted.report.kept
        for ours, theirs in zip(found.embeds, wanted.embeds, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    options = dict(max_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_logits=True)
    plain, ours = model.generate(**inputs, **options), model.generate(**pictures.inputs, **options)
    assert torch.equal(plain.sequences, ours.sequences)
    torch.testing.assert_close(torch.stack(plain.logits), torch.stack(ours.logits), atol=1e-4, rtol=1e-4)
    with foveate.Spatial(budget=0.3)(model) as session:
        plain, before = model.generate(**inputs, **options), session.report.after
        ours = model.generate(**pictures.inputs, **options)
        assert session.report.after == before
    torch.testing.assert_close(torch.stack(plain.logits), torch.stack(ours.logits), atol=1e-4, rtol=1e-4)


def test_the_encoder_runs_once(model, runs):
    """And once more for each set of layers that nobody has read before."""
    pictures = foveate.Pictures(model, **zoo.batch())
    for budget in (4, 8, 16):
        pictures.reduce("spatial", budget=budget)
    assert len(runs) == 1
    for budget in (4, 8, 16):
        pictures.reduce("prumerge+", budget=budget)
    assert len(runs) == 2, "queries and keys of its last layer are recorded"
    pictures.reduce("prumerge")
    pictures.reduce("random", budget=3)
    assert len(runs) == 2
    with foveate.PruMergePlus()(model), torch.no_grad():
        model.generate(**pictures.inputs, max_new_tokens=1)
        model(**pictures.inputs)
    assert len(runs) == 2
    pictures.reduce("tome", budget=20)  # acts inside the encoder
    assert len(runs) == 3


@pytest.mark.parametrize("variant", PLAIN)
def test_as_inputs_with_a_method_attached(model, variant):
    """``generate`` and ``forward`` answer as from pixels."""
    inputs = zoo.batch()
    pictures = foveate.Pictures(model, **inputs)
    method = _build(variant)
    options = dict(max_new_tokens=2, do_sample=False, return_dict_in_generate=True, output_logits=True)
    with method(model) as session, torch.no_grad():
        wanted, counts = model.generate(**inputs, **options), session.report.layers
        found = model.generate(**pictures.inputs, **options)
        assert session.report.layers == counts
        torch.testing.assert_close(torch.stack(found.logits), torch.stack(wanted.logits), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(model(**pictures.inputs).logits, model(**inputs).logits, atol=1e-4, rtol=1e-4)


def test_all_tokens(model):
    inputs = zoo.batch()
    pictures = foveate.Pictures(model, **inputs)
    features = model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(pictures.embeds, features, strict=True))
    assert pictures.report.before == pictures.report.after == [zoo.TOKENS] * 4
    assert pictures.report.method["name"] == "full"


def test_without_a_prompt(model):
    inputs = zoo.batch()
    pictures = foveate.Pictures(model, pixel_values=inputs["pixel_values"])
    found, wanted = pictures.reduce("prumerge+"), foveate.encode(model, "prumerge+", **inputs)
    assert found.inputs == {}
    for ours, theirs in zip(found.embeds, wanted.embeds, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    with pytest.raises(foveate.InputError, match="came without a prompt"):
        pictures.reduce("cdpruner", budget=8)


def test_what_is_refused(model):
    with pytest.raises(foveate.InputError, match="there are no pictures"):
        foveate.Pictures(model, input_ids=torch.tensor([[1, 20]]))
    with pytest.raises(foveate.InputError, match=r"'budget' is no input of this model.*reduce"):
        foveate.Pictures(model, **zoo.batch(), budget=9)
    pictures = foveate.Pictures(model, **zoo.batch())
    with pytest.raises(foveate.InputError, match="unknown method 'magic'"):
        pictures.reduce("magic")
    with pytest.raises(foveate.InputError, match="can only be given with the name"):
        pictures.reduce(foveate.PruMerge(), budget=3)
    with pytest.raises(foveate.UnsupportedModelError):
        foveate.Pictures(torch.nn.Linear(2, 2), **zoo.batch())
    wrong = zoo.batch()
    wrong["input_ids"][0, -1] = zoo.IMAGE
    with pytest.raises(foveate.InputError, match="placeholder"):
        foveate.Pictures(model, **wrong).reduce("spatial", budget=4)


def test_nothing_is_attached_and_nothing_changed(model):
    inputs = zoo.batch()
    given, before = dict(inputs), sorted(model.__dict__)
    copies = {name: value.clone() for name, value in inputs.items()}
    pictures = foveate.Pictures(model, **inputs)
    first = pictures.reduce("prumerge+")
    pictures.reduce("fastv", budget=0.5)
    with foveate.PruMergePlus()(model):
        model.generate(**pictures.inputs, max_new_tokens=1)
    assert sorted(model.__dict__) == before
    assert inputs.keys() == given.keys()
    assert all(inputs[name] is given[name] for name in given)
    assert all(torch.equal(inputs[name], copies[name]) for name in copies)
    again = pictures.reduce("prumerge+")
    assert all(torch.equal(*pair) for pair in zip(first.embeds, again.embeds, strict=True))
    assert "acts inside the decoder; encode does not run it" in pictures.reduce("fastv", budget=0.5).report.warnings[0]


@pytest.mark.parametrize("call", ["generate", "forward", "encode"])
def test_arguments_are_never_changed_in_place(model, call):
    """Dictionaries, tensors and lists of the user are as they were, and the same objects."""
    inputs = zoo.batch("left")
    arguments = {**inputs, "position_ids": None, "labels": None} if call == "forward" else dict(inputs)
    if call == "generate":
        arguments |= dict(max_length=300, eos_token_id=[2, 3], logits_processor=[], bad_words_ids=[[7]])
    objects = dict(arguments)
    copies = {name: copy.deepcopy(value) for name, value in arguments.items()}
    config = copy.deepcopy(model.generation_config.to_dict())
    with foveate.PruMergePlus()(model):
        if call == "encode":
            foveate.encode(model, "prumerge+", **arguments)
        else:
            (model.generate if call == "generate" else model)(**arguments)
    assert arguments.keys() == objects.keys()
    for name, value in arguments.items():
        assert value is objects[name]
        assert torch.equal(value, copies[name]) if isinstance(value, torch.Tensor) else value == copies[name]
    assert model.generation_config.to_dict() == config


def test_several_questions_about_one_picture():
    """The example of the documentation: encoded once, asked many times."""
    model, processor = foveate.load_pocket()
    from PIL import Image

    picture = Image.effect_noise((336, 336), 80).convert("RGB")
    first, second = (make_inputs(processor, model, picture, f"what color is the {word} ?")[0] for word in ("star", "ring"))
    pictures = foveate.Pictures(model, **first)
    with foveate.PruMergePlus()(model):
        wanted = model.generate(**second, max_new_tokens=3, do_sample=False)
        text = {name: value for name, value in second.items() if name in ("input_ids", "attention_mask")}
        assert torch.equal(model.generate(**{**pictures.inputs, **text}, max_new_tokens=3, do_sample=False), wanted)
    assert callable(encoded_call)


@pytest.mark.parametrize("family", families.USABLE)
def test_encoded_pictures_are_all_that_a_decoder_needs(family):
    """The bare decoder with the embeddings, and with what it adds to its first layers, says what the attached model says."""
    model, inputs = families.load(family), families.batch(family)
    for method in (foveate.Spatial(budget=1.0), foveate.PruMergePlus(), foveate.PruMerge(budget=5)):
        encoded = foveate.encode(model, method, **inputs)
        ids, mask, places = (encoded.inputs[name] for name in ("input_ids", "attention_mask", "position_ids"))
        visual = (ids == families.IMAGE) | (ids == families.VIDEO)
        deep = [torch.cat(level) for level in zip(*encoded.deepstack, strict=True)]
        assert len(deep) == len(getattr(model.config.vision_config, "deepstack_visual_indexes", ()))
        assert any("deepstack" in warning for warning in encoded.report.warnings) == bool(deep)
        own = getattr(model.config.get_text_config(), "hidden_size_per_layer_input", 0)
        assert any("look up embeddings" in warning for warning in encoded.report.warnings) == bool(own)
        if families.SPECS[family].types in ("gemma", "prefix", "typed"):  # their masks are made outside the decoder
            continue
        marks = getattr(model.config, FAMILIES[family].marks or "", ())
        assert any("replaces the embeddings" in warning for warning in encoded.report.warnings) == bool(marks)
        embeds = model.get_input_embeddings()(ids).masked_scatter(visual[..., None], torch.cat(encoded.embeds))
        for number, token in enumerate(marks):
            embeds[ids == token] = model.base_model.visual_embeddings_table.weight[number - len(marks)].detach()

        def add(number, deep=deep, visual=visual):
            def after(_, __, output):
                return output.masked_scatter(visual[..., None], output[visual] + deep[number])

            return after

        layers = families.decoder_of(model).layers
        handles = [layers[number].register_forward_hook(add(number)) for number in range(len(deep))]
        try:
            with torch.no_grad():
                hidden = families.decoder_of(model)(inputs_embeds=embeds, attention_mask=mask, position_ids=places, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        with torch.no_grad(), method(model):
            expected = model(**inputs).logits
        got = model.get_output_embeddings()(hidden.last_hidden_state)
        torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], atol=3e-4, rtol=3e-4)
