"""Wrong input: our own exception, one sentence on what is wrong and one on what to do, and a model left as it was (T10)."""

from __future__ import annotations

import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import foveate
from foveate.errors import FoveateError

from .. import families, zoo


@pytest.fixture
def model():
    return zoo.load()


def refused(model, error, match, **inputs):
    """Both ways of calling refuse, and the model then works as if nothing had happened."""
    good = zoo.batch()
    with foveate.PruMergePlus()(model):
        for call in (lambda: model.generate(**inputs, max_new_tokens=2), lambda: model(**inputs)):
            with pytest.raises(error, match=match):
                call()
        model.generate(**good, max_new_tokens=1)
    assert "generate" not in model.__dict__
    assert not model._forward_pre_hooks


def test_more_placeholders_than_pictures(model):
    inputs = zoo.batch()
    inputs["pixel_values"] = inputs["pixel_values"][:3]
    refused(model, foveate.InputError, r"256 image placeholders and the 3 image\(s\) give 192", **inputs)


def test_a_picture_without_placeholders(model):
    ids = torch.tensor([[1, 20, 21]])
    match = r"0 image placeholders and the 1 image\(s\)"
    refused(model, foveate.InputError, match, input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=zoo.pictures(1))


def test_placeholders_of_one_picture_in_two_prompts(model):
    half = zoo.TOKENS // 2
    ids = torch.tensor([[1, *[zoo.IMAGE] * half, 20], [1, *[zoo.IMAGE] * half, 20]])
    inputs = dict(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=zoo.pictures(1))
    refused(model, foveate.InputError, "lie in two prompts", **inputs)


def test_placeholders_without_any_picture(model):
    ids = zoo.batch()["input_ids"]
    with foveate.PruMerge()(model), pytest.raises(foveate.InputError, match="no picture is given"):
        model.generate(input_ids=ids, max_new_tokens=1)


def test_a_batch_of_text_is_left_alone(model):
    inputs = zoo.batch(rows=(2,))
    plain = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    with foveate.PruMergePlus()(model) as session:
        assert torch.equal(plain, model.generate(**inputs, max_new_tokens=4, do_sample=False))
        assert session.report.images == []
        assert "no image" in str(session.report)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", [foveate.PruMergePlus(), foveate.PruMerge(budget=5), foveate.Spatial(budget=5)])
def test_broken_values(model, value, method):
    inputs = zoo.batch()
    inputs["pixel_values"][1, 0, 3, 3] = value
    with method(model), pytest.raises(foveate.InputError, match="NaN or infinite"):
        model.generate(**inputs, max_new_tokens=1)


def test_features_that_overflow_where_scores_do_not():
    """The features are broken, the attention of the layer the method reads is not."""
    model = zoo.load()
    with torch.no_grad():
        model.model.vision_tower.encoder.layers[1].mlp.fc2.bias[0] = float("inf")
    tower = model.model.vision_tower
    tower.encoder.layers[2].layer_norm1.register_forward_hook(lambda _, __, out: torch.nan_to_num(out))
    with foveate.PruMerge()(model), pytest.raises(foveate.InputError, match="NaN or infinite"):
        model.generate(**zoo.batch(), max_new_tokens=1)


def test_model_and_method_swapped(model):
    with pytest.raises(foveate.InputError, match="not LlavaForConditionalGeneration"):
        foveate.attach("prumerge", model)
    with pytest.raises(foveate.InputError, match="a method was expected and not dict"):
        foveate.attach(model, {})


def test_embeddings_instead_of_pictures(model):
    inputs = zoo.batch()
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    with foveate.PruMergePlus()(model):
        with pytest.raises(foveate.InputError, match="inputs_embeds holds pictures that are encoded already"):
            model.generate(inputs_embeds=embeds, attention_mask=inputs["attention_mask"], max_new_tokens=1)
        with pytest.raises(foveate.InputError, match="inputs_embeds"):
            model(inputs_embeds=embeds, pixel_values=inputs["pixel_values"])
        encoded = model.get_image_features(inputs["pixel_values"])
        ids = inputs["input_ids"]
        with pytest.raises(foveate.InputError, match="mm_encoder_outputs holds pictures"):
            model.generate(input_ids=ids, mm_encoder_outputs={"image": encoded}, max_new_tokens=1)


def test_labels_of_the_wrong_length(model):
    inputs = zoo.batch()
    with foveate.PruMergePlus()(model), pytest.raises(foveate.InputError, match="labels have shape"):
        model(**inputs, labels=inputs["input_ids"][:, 1:])


def test_masks_that_do_not_fit(model):
    inputs = zoo.batch()
    with foveate.PruMergePlus()(model):
        with pytest.raises(foveate.InputError, match="attention_mask has 3 columns"):
            model(input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"], attention_mask=torch.ones(4, 3))
        with pytest.raises(foveate.InputError, match="4 dimensions"):
            model(input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"], attention_mask=torch.ones(4, 1, 3, 3))


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        (lambda inputs: {name: value.tolist() for name, value in inputs.items()}, "return_tensors='pt'"),
        (lambda inputs: {"input_ids": inputs["input_ids"].tolist()}, "input_ids is of type list"),
        (lambda inputs: {"input_ids": inputs["input_ids"].float()}, "expected whole numbers of shape"),
        (lambda inputs: {"input_ids": inputs["input_ids"][0]}, r"input_ids\[None\]"),
        (lambda inputs: {"attention_mask": inputs["attention_mask"].tolist()}, "attention_mask is of type list"),
        (lambda inputs: {"attention_mask": inputs["attention_mask"][0]}, "attention_mask has shape"),
        (lambda inputs: {"attention_mask": inputs["attention_mask"][:2]}, "one row for each prompt"),
        (lambda inputs: {"pixel_values": list(inputs["pixel_values"])}, "pixel_values is of type list"),
        (lambda inputs: {"pixel_values": inputs["pixel_values"].numpy()}, "pixel_values is of type ndarray"),
        (lambda inputs: {"pixel_values": inputs["pixel_values"][0]}, r"pixel_values\[None\]"),
    ],
)
def test_what_is_no_batch_of_tensors(model, changed, match):
    inputs = zoo.batch()
    wrong = {**inputs, **changed(inputs)}
    refused(model, foveate.InputError, match, **wrong)
    with pytest.raises(foveate.InputError, match=match):
        foveate.encode(model, "prumerge", **wrong)
    with pytest.raises(foveate.InputError, match=match):
        foveate.Pictures(model, **wrong).reduce("prumerge")


def test_one_row_of_the_mask_for_all(model):
    inputs = zoo.batch(rows=(0,))
    every = {**inputs, "input_ids": inputs["input_ids"].repeat(2, 1), "pixel_values": inputs["pixel_values"].repeat(2, 1, 1, 1)}
    with torch.no_grad(), foveate.PruMergePlus()(model):
        wanted = model.generate(**{**every, "attention_mask": torch.ones_like(every["input_ids"])}, max_new_tokens=3)
        assert torch.equal(model.generate(**every, max_new_tokens=3), wanted)
        assert torch.equal(model(**every).logits[:1], model(**zoo.batch(rows=(0,))).logits)


def test_position_ids_where_the_prompt_is_renumbered(model):
    inputs = zoo.batch(rows=(0,))
    places = torch.arange(inputs["input_ids"].shape[1])[None]
    with foveate.PruMergePlus()(model):
        with pytest.raises(foveate.InputError, match="positions='original'"):
            model(**inputs, position_ids=places + 1)
        with torch.no_grad():  # such as a trainer gives: they only count
            assert torch.equal(model(**inputs, position_ids=places).logits, model(**inputs).logits)
        assert torch.equal(
            model.generate(**inputs, position_ids=places, max_new_tokens=4), model.generate(**inputs, max_new_tokens=4)
        )
    new, length = torch.tensor([[20, 21, 22]]), places.shape[1]
    with torch.no_grad(), foveate.PruMergePlus()(model):
        caches = [model(**inputs, use_cache=True).past_key_values for _ in range(3)]
        without = model(input_ids=new, past_key_values=caches[0]).logits
        given = model(input_ids=new, past_key_values=caches[1], position_ids=length + torch.arange(3)[None]).logits
        assert torch.equal(given, without)
        with pytest.raises(foveate.InputError, match="positions='original'"):
            model(input_ids=new, past_key_values=caches[2], position_ids=torch.arange(3)[None])
    for side in ("left", "right"):
        padded = zoo.batch(side)
        counted = (padded["attention_mask"].cumsum(1) - 1).clamp(min=0)
        for filled in (counted, counted.masked_fill(padded["attention_mask"] == 0, 1)):
            with torch.no_grad(), foveate.PruMergePlus()(model):
                given, without = model(**padded, position_ids=filled).logits, model(**padded).logits
            assert torch.equal(given, without)
    with torch.no_grad(), foveate.PruMergePlus(positions="original")(model):
        assert torch.equal(model(**inputs, position_ids=places).logits, model(**inputs).logits)


def test_attaching_twice(model):
    handle = foveate.attach(model, "prumerge")
    with pytest.raises(foveate.InputError, match="'prumerge' is attached to this model already"):
        foveate.attach(model, "prumerge+")
    with foveate.PruMergePlus()(model):  # a block inside is fine
        pass
    handle.detach()
    handle.detach()
    assert "generate" not in model.__dict__
    with foveate.attach(model, "prumerge+") as handle:  # so is a block that takes over the handle
        model.generate(**zoo.batch(), max_new_tokens=1)
    assert handle.report.after
    assert "generate" not in model.__dict__
    session = foveate.PruMerge()(model)
    with session, pytest.raises(foveate.InputError, match="attached already"), session:
        pass


def test_unknown_methods_and_fields(model):
    for arguments, fields in (
        (("prunemerge",), {}),
        (("prumerge",), {"ratio": 2}),
        ((foveate.PruMerge(),), {"budget": 3}),
        ((5,), {}),
    ):
        with pytest.raises(foveate.InputError):
            foveate.attach(model, *arguments, **fields)
    assert "generate" not in model.__dict__


@pytest.mark.parametrize("layer", [7, -9, "first"])
def test_layers_the_encoder_does_not_have(model, layer):
    with pytest.raises(foveate.UnsupportedModelError, match="does not exist"):
        foveate.attach(model, "prumerge", score_layer=layer)
    assert "generate" not in model.__dict__


def test_models_that_are_not_supported(model):
    text = LlamaForCausalLM(
        LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
    )
    for wrong, match in (
        (text, "a model without vision"),
        (model.model, "no language head"),
        (torch.nn.Linear(2, 2), "not a Hugging Face model"),
        ("llava-hf/llava-1.5-7b-hf", "not a Hugging Face model"),
    ):
        with pytest.raises(foveate.UnsupportedModelError, match=match):
            foveate.attach(wrong, "prumerge+")


def test_another_vision_encoder_is_named():
    from transformers import ViTConfig

    tower = ViTConfig(
        hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, image_size=56, patch_size=14
    )
    model = zoo.build_llava("llama", tower=tower)
    with pytest.raises(
        foveate.UnsupportedModelError, match="with a 'vit' vision encoder is not supported; supported encoders: clip"
    ):
        foveate.attach(model, "spatial", budget=3)


def test_weights_that_are_not_loaded():
    with torch.device("meta"):
        model = zoo.build_llava("llama")
    with pytest.raises(foveate.UnsupportedModelError, match="meta tensors"):
        foveate.attach(model, "spatial", budget=3)


def test_encode_needs_pictures(model):
    inputs = zoo.batch(rows=(2,))
    with pytest.raises(foveate.InputError, match="encode needs input_ids and pixel_values"):
        foveate.encode(model, "prumerge", **inputs)
    with pytest.raises(foveate.InputError, match="encode needs"):
        foveate.encode(model, "prumerge", pixel_values=zoo.pictures(1))


def test_pictures_of_another_size_than_the_encoder_takes(model):
    inputs = zoo.batch(rows=(0,))
    inputs["pixel_values"] = torch.randn(1, 3, 56, 56)
    with foveate.PruMergePlus()(model), pytest.raises(ValueError, match="doesn't match model"):  # transformers' own words
        model.generate(**inputs, max_new_tokens=1)
    assert not model.model.multi_modal_projector._forward_pre_hooks


def test_one_family_for_everything_we_raise():
    for error in (foveate.InputError, foveate.UnsupportedModelError, foveate.CacheError, foveate.MissingExtraError):
        assert issubclass(error, FoveateError)
    assert "pip install 'foveate[viz]'" in str(foveate.MissingExtraError("matplotlib", "viz"))


def test_unreadable_checkpoints(tmp_path):
    with pytest.raises(foveate.InputError, match="no readable pocket model"):
        foveate.load_pocket(folder=tmp_path)
    good = zoo.saved("llava", "llama")
    (tmp_path / "config.json").write_bytes((good / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(foveate.InputError, match="no readable pocket model"):
        foveate.load_pocket(folder=tmp_path)


def test_pictures_without_matplotlib(monkeypatch):
    from foveate.viz.canvas import new_figure

    assert new_figure(figsize=(3, 2)).get_figwidth() == 3
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(foveate.MissingExtraError, match=r"foveate\[viz\]"):
        new_figure()


SIZES = ("image_grid_thw", "video_grid_thw", "image_sizes", "spatial_shapes", "image_position_ids")
SIZED = [name for name in families.USABLE if any(key in families.batch(name) for key in SIZES)]


def calls_of(model, inputs):
    yield lambda: model(**inputs).logits
    yield lambda: model.generate(**inputs, max_new_tokens=2, do_sample=False)


@pytest.mark.parametrize("name", [name for name in families.USABLE if "pixel_values" not in families.batch(name, rows=(2,))])
def test_pixels_of_no_picture(name):
    """What collators give for a batch of text is a batch of text, whether or not the model itself takes it."""
    model, whole = families.load(name), families.batch(name)
    text = families.batch(name, rows=(2,))
    text = {
        key: value for key, value in text.items() if key in ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
    }
    beside = {key: value[:0] for key, value in whole.items() if isinstance(value, torch.Tensor) and key not in text}
    assert "pixel_values" in beside
    wanted = [call() for call in calls_of(model, text)]
    for method in (foveate.PruMergePlus(), foveate.VisionZip(budget=0.5), foveate.FastV()):
        try:
            session = foveate.attach(model, method)
        except FoveateError:
            continue
        found = [call() for call in calls_of(model, {**text, **beside})]
        foveate.detach(model)
        assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
        assert session.report.before == []
    with pytest.raises(foveate.InputError, match="pixel_values"):
        foveate.encode(model, foveate.PruMergePlus(), **text, **beside)


@pytest.mark.parametrize("name", SIZED)
def test_pictures_without_their_sizes(name):
    model, inputs = families.load(name), families.batch(name)
    for missing in [key for key in SIZES if key in inputs]:
        some = {key: value for key, value in inputs.items() if key != missing}
        with foveate.PruMergePlus()(model):
            for call in calls_of(model, some):
                with pytest.raises(foveate.InputError, match=f"s and no {missing}, which says how large each of them is"):
                    call()
        with pytest.raises(foveate.InputError, match=f"s and no {missing}"):
            foveate.encode(model, foveate.PruMergePlus(), **some)
