"""Canaries: each names the part of transformers that a new release has moved (T11)."""

from __future__ import annotations

import inspect

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import GenerationMixin, LlavaForConditionalGeneration, LlavaModel, ProcessorMixin
from transformers.cache_utils import DynamicCache, StaticCache

import foveate
from foveate.engine.model import marks, seams

from ... import zoo


def test_seam_forward_takes_pre_encoded_pictures():
    for cls in (LlavaModel, LlavaForConditionalGeneration):
        assert seams.PRE_ENCODED in inspect.signature(cls.forward).parameters, f"{cls.__name__}.forward lost {seams.PRE_ENCODED}"


def test_seam_features_come_as_one_tensor_per_image():
    model = zoo.load()
    output = model.base_model.get_image_features(pixel_values=zoo.pictures(2), return_dict=True)
    assert isinstance(output.pooler_output, list), "pooler_output is no list of images any more"
    assert [tuple(f.shape) for f in output.pooler_output] == [(zoo.TOKENS, 64)] * 2
    changed = seams.with_features(output, [f[:3] for f in output.pooler_output])
    assert len(changed.pooler_output[0]) == 3
    assert len(output.pooler_output[0]) == zoo.TOKENS, "the original must stay as it was"


def test_seam_processors_find_answers_in_a_method_of_their_own():
    if Version(transformers.__version__) < Version("5.24.dev0"):
        return  # where lists are read in any case
    assert callable(getattr(ProcessorMixin, seams.ASSISTANT_MASKS, None)), f"ProcessorMixin lost {seams.ASSISTANT_MASKS}"


def test_seam_generate_is_found_on_the_instance():
    """Wrappers call ``model.generate``; an attribute of the instance must win over the class."""
    model = zoo.load()
    model.__dict__["generate"] = lambda *_, **__: "ours"
    assert model.generate() == "ours"
    assert isinstance(GenerationMixin.generate, type(lambda: None))


def test_seam_generate_merges_callbacks_in_one_place():
    merge = getattr(GenerationMixin, seams.MERGE_CALLBACKS, None)
    assert merge is not None, f"generate lost {seams.MERGE_CALLBACKS}"
    assert list(inspect.signature(merge).parameters) == ["self", "default_list", "custom_list"]


def test_seam_wrappers_of_forward():
    from accelerate.hooks import ModelHook, add_hook_to_module

    assert hasattr(torch.nn.Module, seams.REPLICATE), "torch copies modules for DataParallel in another way"
    module = add_hook_to_module(torch.nn.Linear(1, 1), ModelHook())
    assert seams.WRAPPED_FORWARD in module.__dict__, "accelerate keeps the forward it wraps elsewhere"


def test_seam_caches_take_an_attribute():
    for cache in (DynamicCache(), StaticCache(config=zoo.text_config("llama"), max_cache_len=8)):
        marks.mark(cache, "layout")
        assert marks.layout_of(cache) == "layout"


def test_seam_generate_passes_positions_and_encoded_pictures_to_forward():
    model, seen = zoo.load(), []
    model.register_forward_pre_hook(lambda _, __, kwargs: seen.append(kwargs), with_kwargs=True)
    model.generate(**zoo.batch(), max_new_tokens=3, do_sample=False)
    assert seen[0].get("pixel_values") is None, "generate does not encode pictures before prefill any more"
    assert seen[0][seams.PRE_ENCODED]["image"] is not None
    assert all(kwargs.get("position_ids") is not None for kwargs in seen), "generate passes no position_ids any more"


def test_seam_gaps_in_positions_look_like_packed_sequences():
    """The reason for the guards. When this fails, they may no longer be needed."""
    decoder = zoo.load().get_decoder()
    embeds, places = torch.randn(1, 6, 64), torch.tensor([[0, 1, 2, 7, 8, 9]])
    ones = torch.ones(1, 6, dtype=torch.long)
    masked = decoder(inputs_embeds=embeds, position_ids=places, attention_mask=ones, use_cache=False).last_hidden_state
    bare = decoder(inputs_embeds=embeds, position_ids=places, use_cache=False).last_hidden_state
    assert not torch.allclose(masked, bare, atol=1e-3)


@pytest.mark.parametrize("decoder", zoo.CUT_DECODERS)
def test_seam_decoder_layers_are_called_with_what_cuts_replace(decoder):
    model = zoo.load(decoder=decoder, attn="eager")
    seen, language = [], model.get_decoder()
    for layer in language.layers:
        layer.register_forward_pre_hook(lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    model.generate(**zoo.batch(rows=(0,)), max_new_tokens=2)
    assert len(seen) == 8
    for args, kwargs in seen:
        assert {"attention_mask", "position_embeddings", "position_ids", seams.CACHE} <= set(kwargs)
        assert len(args) == 1, "hidden states are no positional argument any more"
        assert len(kwargs["position_embeddings"]) == 2
    kinds, windows = seams.layer_kinds(language.config), seams.layer_windows(language.config)
    assert len(kinds) == len(windows) == 4
    assert all((window is None) == ("sliding" not in kind) for kind, window in zip(kinds, windows, strict=True))
    hidden, places = seen[0][0][0], torch.arange(5)[None]
    for kind in set(kinds):
        assert seams.rotary(language, hidden, places, kind)[0].shape[:2] == (1, 5)


@pytest.mark.parametrize("decoder", zoo.CUT_DECODERS)
def test_seam_attention_goes_through_the_registry(decoder):
    """An attention module whose config names another function calls it, with rotated queries and keys."""
    from foveate.engine.decoder.attention import Tap

    model, seen = zoo.load(decoder=decoder, attn="eager"), []
    before = model(**zoo.batch(rows=(0,))).logits
    attention = seams.attention_of(model.get_decoder().layers[1])
    tap = Tap(attention, seen.append)
    assert torch.equal(model(**zoo.batch(rows=(0,))).logits, before)
    tap.remove()
    assert seen[0].query.shape == (1, 4, 74, 16)
    assert seen[0].keys.shape[2:] == (74, 16)
    assert (seen[0].softcap is not None) == (decoder == "gemma2")
    model(**zoo.batch(rows=(0,)))
    assert len(seen) == 1


def test_seam_caches_show_keys_and_lengths_of_layers():
    model = zoo.load(decoder="mistral")
    cache = DynamicCache(config=model.config.get_text_config())
    model(**zoo.batch(rows=(0,)), past_key_values=cache)
    assert cache.get_seq_length(2) == 74
    assert cache.get_mask_sizes(1, 2)[0] == 40
    assert seams.cached_keys(cache, 2).shape[2] == 39
    assert seams.cached_keys(None, 2) is None
    marks.mark_cuts(cache, "cuts")
    assert marks.cuts_of(cache) == "cuts"


@pytest.mark.parametrize("decoder", zoo.CUT_DECODERS)
def test_seam_parts_of_layers(decoder):
    layer = zoo.load(decoder=decoder, attn="eager").get_decoder().layers[0]
    attention = seams.attention_of(layer)
    values, begin, groups, width = seams.values_of(attention)
    assert begin + groups * width == values.out_features
    assert seams.output_of(attention).in_features == 64
    parts = seams.mlp_of(layer)
    assert parts.down.out_features == 64
    assert parts.sliceable == (decoder not in ("phi", "phi3"))


@pytest.mark.parametrize("positions", ["compact", "original"])
def test_positions_golden(positions):
    """Position ids of a prompt with two pictures, written out (T11)."""
    model = zoo.load()
    # <s> w w [64 placeholders] w w w w w [64 placeholders] w w w w w
    encoded = foveate.encode(model, foveate.Spatial(budget=4, positions=positions), **zoo.batch(rows=(1,)))
    cells = [2 * 8 + 2, 2 * 8 + 6, 6 * 8 + 2, 6 * 8 + 6]
    first, second = 3, 3 + 64 + 5
    expected = [0, 1, 2, *(first + c for c in cells), *range(67, 72), *(second + c for c in cells), *range(136, 141)]
    places = encoded.inputs["position_ids"][0].tolist()
    assert places == (expected if positions == "original" else list(range(len(expected))))
    assert [i.kept for i in encoded.report.images] == [cells] * 2
