"""``generate`` unchanged: every way of calling it, on shortened prompts."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList, StaticCache, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

import foveate

from .. import zoo

OPTIONS = dict(do_sample=False, suppress_tokens=[zoo.IMAGE], min_new_tokens=5, max_new_tokens=5)


@pytest.fixture(scope="module")
def model():
    return zoo.load()


@pytest.fixture(scope="module")
def expected(model):
    """Greedy tokens of each row alone, with PruMerge+."""
    with foveate.PruMergePlus()(model):
        return [model.generate(**zoo.batch(rows=(row,)), **OPTIONS)[0, -5:] for row in range(4)]


def new_tokens(model, inputs, **options):
    with foveate.PruMergePlus()(model):
        out = model.generate(**inputs, **{**OPTIONS, **options})
    assert torch.equal(out[:, : inputs["input_ids"].shape[1]], inputs["input_ids"]), "the full prompt comes back"
    return out[:, inputs["input_ids"].shape[1] :]


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(use_cache=False),
        dict(cache_implementation="static", disable_compile=True),
        dict(prefill_chunk_size=16, disable_compile=True),
        dict(num_return_sequences=1, num_beams=1),
    ],
    ids=["dynamic cache", "no cache", "static cache", "chunked prefill", "explicit defaults"],
)
def test_caches(model, expected, options):
    if "prefill_chunk_size" in options:
        plain, inputs = dict(max_new_tokens=3, do_sample=False), zoo.batch()
        if not torch.equal(model.generate(**inputs, **plain), model.generate(**inputs, **plain, **options)):
            pytest.skip(f"transformers {transformers.__version__} by itself gets chunked prefill of pictures wrong")
    assert torch.equal(new_tokens(model, zoo.batch(), **options), torch.stack(expected))


def test_a_static_cache_of_the_users_own(model, expected):
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=400)
    assert torch.equal(new_tokens(model, zoo.batch(), past_key_values=cache, disable_compile=True), torch.stack(expected))


def test_prompt_lookup(model, expected):
    got = new_tokens(model, zoo.batch(rows=(1,)), prompt_lookup_num_tokens=3)
    assert torch.equal(got[0], expected[1])


def test_assisted_generation(model, expected):
    assistant = zoo.load(decoder="llama")
    with torch.no_grad():
        for parameter in assistant.model.language_model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01)
    got = new_tokens(model, zoo.batch(rows=(1,)), assistant_model=assistant)
    assert torch.equal(got[0], expected[1])


def test_beams_equal_the_rows_alone(model):
    together = new_tokens(model, zoo.batch(), num_beams=3)
    for row in range(4):
        assert torch.equal(together[row], new_tokens(model, zoo.batch(rows=(row,)), num_beams=3)[0])


def test_several_sequences_per_prompt(model):
    inputs = zoo.batch()
    with foveate.PruMergePlus()(model):
        out = model.generate(**inputs, **{**OPTIONS, "do_sample": True}, num_return_sequences=2)
    assert out.shape == (8, inputs["input_ids"].shape[1] + 5)
    assert torch.equal(out[:, :-5], inputs["input_ids"].repeat_interleave(2, 0))


def test_sampling_is_seeded(model):
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        runs.append(new_tokens(model, zoo.batch(), do_sample=True))
    assert torch.equal(*runs)


def test_without_an_attention_mask(model, expected):
    inputs = zoo.batch()  # the mask is inferred from the padding token, as transformers does
    del inputs["attention_mask"]
    assert torch.equal(new_tokens(model, inputs), torch.stack(expected))


def test_a_model_without_pad_token(expected):
    model = zoo.load()
    model.generation_config.pad_token_id = None
    inputs = zoo.batch()
    assert torch.equal(new_tokens(model, inputs), torch.stack(expected))


def test_padding_does_not_change_repetition_penalties(model):
    together = new_tokens(model, zoo.batch(), repetition_penalty=1.8)
    for row in range(4):
        assert torch.equal(together[row], new_tokens(model, zoo.batch(rows=(row,)), repetition_penalty=1.8)[0])


def test_lengths_count_the_full_prompt(model, expected):
    inputs = zoo.batch()
    length = inputs["input_ids"].shape[1]
    options = dict(do_sample=False, suppress_tokens=[zoo.IMAGE, zoo.EOS])
    config = copy.deepcopy(model.generation_config)
    config.max_length = length + 3
    with foveate.PruMergePlus()(model):
        by_argument = model.generate(**inputs, **options, max_length=length + 3)
        by_config = model.generate(**inputs, **options, generation_config=config)
        shortest = model.generate(**inputs, do_sample=False, suppress_tokens=[zoo.IMAGE], min_length=length + 4, max_new_tokens=4)
    assert by_argument.shape[1] == by_config.shape[1] == shortest.shape[1] - 1 == length + 3


class Seen:
    def __init__(self, kind):
        self.kind, self.lengths, self.prompts = kind, [], []

    def note(self, ids):
        self.lengths.append(ids.shape[1])
        self.prompts.append(ids)


def test_callbacks_see_the_full_prompt(model):
    inputs, seen, criteria = zoo.batch(), Seen("processor"), Seen("criterion")
    length = inputs["input_ids"].shape[1]

    class Processor(LogitsProcessor):
        def __call__(self, input_ids, scores):
            seen.note(input_ids)
            return scores

    class Criterion(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            criteria.note(input_ids)
            return torch.full((len(input_ids),), input_ids.shape[1] >= length + 3)

    allowed = []

    def prefix(row, sequence):
        allowed.append((int(row), len(sequence)))
        return [20, 21]

    with foveate.PruMergePlus()(model):
        out = model.generate(
            **inputs,
            do_sample=False,
            suppress_tokens=[zoo.EOS],
            max_new_tokens=9,
            logits_processor=LogitsProcessorList([Processor()]),
            stopping_criteria=StoppingCriteriaList([Criterion()]),
            prefix_allowed_tokens_fn=prefix,
        )
    assert out.shape[1] == length + 3
    assert seen.lengths == [length, length + 1, length + 2]
    assert criteria.lengths == [length + 1, length + 2, length + 3]
    assert all(torch.equal(ids[:, :length], inputs["input_ids"]) for ids in seen.prompts + criteria.prompts)
    assert allowed[:5] == [(0, length), (1, length), (2, length), (3, length), (0, length + 1)]
    assert set(out[:, length:].flatten().tolist()) <= {20, 21}


def test_streamers_get_the_full_prompt_first(model, expected):
    class Streamer(BaseStreamer):
        def __init__(self):
            self.values, self.ended = [], False

        def put(self, value):
            self.values.append(value)

        def end(self):
            self.ended = True

    inputs, streamer = zoo.batch(rows=(1,)), Streamer()
    new_tokens(model, inputs, streamer=streamer)
    assert torch.equal(streamer.values[0], inputs["input_ids"])
    assert torch.equal(torch.cat(streamer.values[1:]), expected[1])
    assert streamer.ended


def test_positional_and_keyword_prompts(model, expected):
    inputs = zoo.batch()
    ids = inputs.pop("input_ids")
    with foveate.PruMergePlus()(model):
        out = model.generate(ids, **inputs, **OPTIONS)
        config = copy.deepcopy(model.generation_config)
        config.update(**OPTIONS)
        positional = model.generate(ids, config, **inputs)
    assert torch.equal(out[:, ids.shape[1] :], torch.stack(expected))
    assert torch.equal(out, positional)


def test_scores_and_hidden_states_come_back(model):
    inputs = zoo.batch()
    with foveate.PruMergePlus()(model) as session:
        out = model.generate(
            **inputs, **OPTIONS, return_dict_in_generate=True, output_scores=True, output_logits=True, output_hidden_states=True
        )
    assert len(out.scores) == len(out.logits) == len(out.hidden_states) == 5
    removed = sum(session.report.before[:1]) - sum(session.report.after[:1])
    assert out.hidden_states[0][0].shape[1] < inputs["input_ids"].shape[1] - removed // 2
    assert torch.equal(torch.stack(out.logits, 1).argmax(-1)[:, 0], out.sequences[:, -5])


# -- several turns -------------------------------------------------------------------------------------------------------------


def conversation(turns: int, images: tuple[int, ...], rows: int):
    """Token ids to add in each turn, left-padded rows of different length in the first, and the pictures."""
    added = []
    for turn in range(turns):
        prompts = [zoo.prompt(1 if turn in images else 0, 2 + 2 * row * (turn == 0), 3, 10 * turn + row) for row in range(rows)]
        if turn:
            prompts = [p[1:] for p in prompts]
        added.append(zoo.pad(prompts))
    return added, {turn: zoo.pictures(rows, seed=turn) for turn in images}


@pytest.mark.parametrize("only_new", [False, True], ids=["whole prompt", "only new tokens"])
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("positions", ["compact", "original"])
@pytest.mark.parametrize("decoder", ["llama", "mistral"])
def test_turns_with_a_reused_cache_equal_starting_anew(decoder, positions, rows, only_new):
    """Pictures in turns 1 and 3; each turn against one generate without a cache to start from, all pictures at once."""
    model = zoo.load(decoder=decoder)
    added, pictures = conversation(3, (0, 2), rows)
    method = foveate.PruMergePlus(positions=positions)
    options = {**OPTIONS, "return_dict_in_generate": True, "output_logits": True}
    cache = DynamicCache(config=model.config.get_text_config())
    ids = torch.zeros(rows, 0, dtype=torch.long)
    mask = torch.zeros(rows, 0, dtype=torch.long)
    seen = []
    with method(model) as session:
        for turn, new in enumerate(added):
            ids, mask = torch.cat([ids, new["input_ids"]], 1), torch.cat([mask, new["attention_mask"]], 1)
            extra = {"pixel_values": pictures[turn]} if turn in pictures else {}
            if turn in pictures:
                seen.append(pictures[turn])
            past = ids.shape[1] - new["input_ids"].shape[1]
            # the last generated token of the turn before is not in the cache yet
            given = ids[:, max(0, past - 1) :] if only_new else ids
            out = model.generate(input_ids=given, attention_mask=mask, past_key_values=cache, **extra, **options)
            fresh_pixels = torch.stack([p[row] for row in range(rows) for p in seen])
            fresh = model.generate(input_ids=ids, attention_mask=mask, pixel_values=fresh_pixels, **options)
            torch.testing.assert_close(torch.stack(out.logits), torch.stack(fresh.logits), atol=3e-4, rtol=3e-4)
            assert torch.equal(out.sequences[:, : given.shape[1]], given)
            generated = out.sequences[:, given.shape[1] :]
            ids, mask = torch.cat([ids, generated], 1), torch.cat([mask, torch.ones_like(generated)], 1)
    assert session.report.after != session.report.before


def test_turns_that_keep_everything_are_untouched(model):
    added, pictures = conversation(2, (0,), 2)
    results = []
    for method in (None, foveate.PruMergePlus(budget=1.0)):
        cache = DynamicCache(config=model.config.get_text_config())
        ids, mask = added[0]["input_ids"], added[0]["attention_mask"]
        session = method(model) if method else None
        if session:
            session.attach()
        first = model.generate(input_ids=ids, attention_mask=mask, pixel_values=pictures[0], past_key_values=cache, **OPTIONS)
        ids = torch.cat([first, added[1]["input_ids"]], 1)
        mask = torch.cat([mask, torch.ones_like(first[:, mask.shape[1] :]), added[1]["attention_mask"]], 1)
        out = model.generate(
            input_ids=ids, attention_mask=mask, past_key_values=cache, **OPTIONS, return_dict_in_generate=True, output_logits=True
        )
        results.append((out.sequences, torch.stack(out.logits)))
        if session:
            session.detach()
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_a_picture_on_a_cache_that_began_with_text(model):
    """The cache was made without foveate; only the new picture is reduced."""
    cache = DynamicCache(config=model.config.get_text_config())
    text = torch.tensor([[1, 20, 21, 22]])
    first = model.generate(input_ids=text, past_key_values=cache, **OPTIONS)
    ids = torch.cat([first, torch.tensor([zoo.prompt(1, 2, 3, 5)[1:]])], 1)
    with foveate.PruMergePlus()(model):
        out = model.generate(input_ids=ids, past_key_values=cache, pixel_values=zoo.pictures(1), **OPTIONS)
        fresh = model.generate(input_ids=ids, pixel_values=zoo.pictures(1), **OPTIONS)
    assert torch.equal(out, fresh)


def test_caches_that_cannot_be_continued_are_refused(model):
    inputs = zoo.batch(rows=(0,))
    longer = torch.cat([inputs["input_ids"], torch.tensor([[20, 21, 22, 23, 24, 25, 26]])], 1)

    def made(method, **options):
        cache = DynamicCache(config=model.config.get_text_config())
        with method(model):
            model.generate(**inputs, past_key_values=cache, **{**OPTIONS, **options})
        return cache

    for cache, match in (
        (made(foveate.PruMerge()), "made with 'prumerge'"),
        (made(foveate.PruMergePlus(), num_beams=2), "beam search"),
    ):
        with foveate.PruMergePlus()(model), pytest.raises(foveate.CacheError, match=match):
            model.generate(input_ids=longer, past_key_values=cache, **OPTIONS)
    cut = made(foveate.PruMergePlus())
    cut.crop(5 - cut.get_seq_length())
    with foveate.PruMergePlus()(model), pytest.raises(foveate.CacheError, match="cropped to 5 tokens"):
        model.generate(input_ids=longer, past_key_values=cut, **OPTIONS)


# -- compiled ------------------------------------------------------------------------------------------------------------------


def test_compiled_forward_with_a_static_cache(expected):
    model = zoo.load()
    model.forward = torch.compile(model.forward, backend="eager")
    got = new_tokens(model, zoo.batch(), cache_implementation="static", disable_compile=True)
    assert torch.equal(got, torch.stack(expected))


def test_a_compiled_model(expected):
    model = zoo.load()
    compiled = torch.compile(model, backend="eager")
    inputs = zoo.batch()
    with foveate.PruMergePlus()(compiled) as session:
        assert torch.equal(compiled.generate(**inputs, **OPTIONS)[:, -5:], torch.stack(expected))
        logits = compiled(**inputs).logits
        assert session.report.after != session.report.before
    with foveate.PruMergePlus()(model):
        torch.testing.assert_close(logits, model(**inputs).logits)
