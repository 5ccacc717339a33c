"""Methods of a cache that change its rows or its length: what is remembered on it follows, as an unmodified model has it."""

import copy
import inspect

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache

import foveate

from ... import zoo
from ...methods.test_conformance import PLAIN, _build

OPTIONS = dict(max_new_tokens=3, min_new_tokens=3, do_sample=False, suppress_tokens=[zoo.IMAGE], return_dict_in_generate=True)
# of a cache: what changes rows, what changes the length, and what changes neither, or is the business of layers
ROWS = {"reorder_cache", "batch_repeat_interleave", "batch_select_indices"}
LENGTH = {"crop", "reset"}
OTHERS = {"update", "offload", "prefetch", "early_initialization", "get_seq_length", "get_mask_sizes", "get_query_offset"}
OTHERS |= {"get_max_length", "get_max_cache_shape", "batch_size", "max_batch_size", "max_cache_len", "is_compileable"}
OTHERS |= {"is_initialized", "is_croppable", "is_sliding", "is_linear", "is_dummy", "activate_past_recording", "is_recording_past"}
OTHERS |= {"has_previous_state", "get_conv_state", "update_conv_state", "get_recurrent_state", "update_recurrent_state"}
OTHERS |= {"update_indexer", "to_legacy_cache", "from_legacy_cache"}


def test_every_method_of_a_cache_is_known():
    """A new one may change rows, or the length."""
    public = {name for name, _ in inspect.getmembers(Cache) if not name.startswith("_")}
    assert public <= ROWS | LENGTH | OTHERS


@pytest.fixture
def model():
    return zoo.load()


def prefilled(model, inputs):
    """A cache of the prompts, without their last token."""
    cache = DynamicCache(config=model.config.get_text_config())
    model.generate(**inputs, **{**OPTIONS, "max_new_tokens": 1, "min_new_tokens": 1}, past_key_values=cache)
    return cache


def continued(model, ids, mask, cache):
    out = model.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, **OPTIONS, output_logits=True)
    return torch.stack(out.logits, 1)


def picked(inputs, index):
    """Other rows of a batch of one picture each."""
    return {name: value[index] for name, value in inputs.items()}


@pytest.mark.parametrize(
    ("variant", "how"),
    [
        *((variant, "twice") for variant in PLAIN),
        *((v, how) for v in ("prumerge+", "fastv", "gate") for how in ("reorder", "select", "select by mask", "repeat")),
    ],
)
def test_rows(model, variant, how):
    """A cache whose rows were changed goes on as one that was filled with the rows so."""
    inputs = zoo.batch("left", rows=(0, 3))
    method = _build(variant)
    with method(model):
        cache = prefilled(model, inputs)
        if how == "reorder":
            index = torch.tensor([1, 0])
            cache.reorder_cache(index)
        elif how == "select":
            index = torch.tensor([1])
            cache.batch_select_indices(index)
        elif how == "select by mask":
            index = torch.tensor([1])
            cache.batch_select_indices(torch.tensor([False, True]))
        elif how == "repeat":
            index = torch.tensor([0, 0, 1, 1])
            cache.batch_repeat_interleave(2)
        else:
            index = torch.tensor([1, 1, 0, 0])
            cache.reorder_cache(torch.tensor([1, 0]))
            cache.batch_repeat_interleave(2)
        rows = picked(inputs, index)
        more = torch.tensor([zoo.prompt(0, 5, 0, seed=20 + row)[1:] for row in range(len(index))])
        ids = torch.cat([rows["input_ids"], more], 1)
        mask = torch.cat([rows["attention_mask"], torch.ones_like(more)], 1)
        found = continued(model, ids, mask, cache)
        wanted = continued(model, ids, mask, prefilled(model, rows))
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("variant", ["prumerge+", "fastv", "pyramiddrop", "iti", "gate"])
def test_several_questions_about_one_picture(model, variant):
    """The cache of a picture is copied for each question."""
    inputs = zoo.batch("left", rows=(0,))
    questions = torch.tensor([zoo.prompt(0, 6, 0, seed=seed)[1:] for seed in (3, 4, 5)])
    with _build(variant)(model):
        cache = prefilled(model, inputs)
        repeated = copy.deepcopy(cache)
        repeated.batch_repeat_interleave(3)
        ids = torch.cat([inputs["input_ids"].expand(3, -1), questions], 1)
        together = continued(model, ids, torch.ones_like(ids), repeated)
        for row in range(3):
            alone = continued(model, ids[row : row + 1], torch.ones_like(ids[:1]), copy.deepcopy(cache))
            torch.testing.assert_close(together[row], alone[0], atol=1e-4, rtol=1e-4)
    # the copy is one of its own
    assert len(cache.layers[0].keys) == 1


@pytest.mark.parametrize("variant", PLAIN)
def test_cropped_into_text(model, variant):
    """Words at the end of the prompt are taken back, and others asked instead."""
    inputs = zoo.batch("left", rows=(0, 3))
    words = torch.tensor([zoo.prompt(0, 5, 0, seed=30 + row)[1:] for row in range(2)])
    with _build(variant)(model):
        cache = prefilled(model, inputs)
        ids = torch.cat([inputs["input_ids"], words], 1)
        mask = torch.cat([inputs["attention_mask"], torch.ones_like(words)], 1)
        continued(model, ids, mask, cache)
        cache.crop(-(words.shape[1] + 2))  # what was generated, and the words: back to the end of the prompt
        others = torch.tensor([zoo.prompt(0, 4, 0, seed=40 + row)[1:] for row in range(2)])
        ids = torch.cat([inputs["input_ids"], others], 1)
        mask = torch.cat([inputs["attention_mask"], torch.ones_like(others)], 1)
        found = continued(model, ids, mask, cache)
        wanted = continued(model, ids, mask, prefilled(model, inputs))
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def text_behind(inputs):
    ids = inputs["input_ids"][0]
    return len(ids) - 1 - int((ids == zoo.IMAGE).nonzero()[-1])


@pytest.mark.parametrize("variant", ["prumerge+", "spatial", "fastv", "gate"])
def test_cropped_inside_the_prompt(model, variant):
    """To a place after the picture: the rest of the prompt is another one. Into the picture: refused."""
    inputs = zoo.batch("left", rows=(0,))
    back = text_behind(inputs) - 1
    with _build(variant)(model):
        cache = prefilled(model, inputs)
        kept = inputs["input_ids"][:, : inputs["input_ids"].shape[1] - back]
        cache.crop(-back)
        new = torch.tensor([zoo.prompt(0, 6, 0, seed=50)[1:]])
        ids = torch.cat([kept, new], 1)
        found = continued(model, ids, torch.ones_like(ids), cache)
        first = {**inputs, "input_ids": kept, "attention_mask": torch.ones_like(kept)}
        if not _build(variant).inside_decoder():  # which decide by the words that were taken back
            wanted = continued(model, ids, torch.ones_like(ids), prefilled(model, first))
            torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
        assert found.isfinite().all()
        cache = prefilled(model, inputs)
        cache.crop(-(back + (40 if _build(variant).inside_decoder() else 3)))
        with pytest.raises(foveate.CacheError, match="cropped"):
            continued(model, ids, torch.ones_like(ids), cache)


def test_a_search_by_hand(model):
    """Beams of one's own over the cache equal full forwards of each sequence."""
    inputs = zoo.batch("left", rows=(0, 3))
    with foveate.PyramidDrop()(model), torch.no_grad():
        cache = DynamicCache(config=model.config.get_text_config())
        model(**inputs, past_key_values=cache)
        cache.batch_repeat_interleave(2)
        ids, mask = (inputs[name].repeat_interleave(2, 0) for name in ("input_ids", "attention_mask"))
        generator = torch.Generator().manual_seed(1)
        for _ in range(3):
            new = torch.randint(10, 100, (4, 1), generator=generator)
            ids, mask = torch.cat([ids, new], 1), torch.cat([mask, torch.ones_like(new)], 1)
            found = model(input_ids=new, attention_mask=mask, past_key_values=cache).logits[:, -1]
            order = torch.tensor([1, 0, 2, 2])  # the first prompt changes places, the second drops one
            cache.reorder_cache(order)
            ids, found = ids[order], found[order]
        pictures = inputs["pixel_values"].repeat_interleave(2, 0)
        again = DynamicCache(config=model.config.get_text_config())
        start = inputs["input_ids"].shape[1]
        model(input_ids=ids[:, :start], attention_mask=mask[:, :start], pixel_values=pictures, past_key_values=again)
        for column in range(start, ids.shape[1]):
            wanted = model(
                input_ids=ids[:, column : column + 1], attention_mask=mask[:, : column + 1], past_key_values=again
            ).logits
    torch.testing.assert_close(found, wanted[:, -1], atol=1e-4, rtol=1e-4)
