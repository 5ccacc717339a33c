"""Less usual ways to call an attached model: each was wrong once, without an error."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from transformers import DynamicCache, LogitsProcessorList, RepetitionPenaltyLogitsProcessor, StaticCache
from transformers.generation.streamers import BaseStreamer

import foveate
from foveate.engine.model.seams import ROWS_ARE_SEQUENCES

from .. import reference, zoo

NEW = 4
OPTIONS = dict(do_sample=False, suppress_tokens=[zoo.IMAGE], min_new_tokens=NEW, max_new_tokens=NEW)
CLOSE = dict(atol=3e-4, rtol=3e-4)


@pytest.fixture(scope="module")
def model():
    return zoo.load()


def new_cache(model) -> DynamicCache:
    return DynamicCache(config=model.config.get_text_config())


def pictures_first(side: str = "left") -> tuple[dict[str, torch.Tensor], list[dict[str, torch.Tensor]]]:
    """Prompts that begin with a picture, as a batch and alone."""
    rows = [[zoo.IMAGE] * zoo.TOKENS + [20, 21, 22], [zoo.IMAGE] * zoo.TOKENS + [30, 31] + [zoo.IMAGE] * zoo.TOKENS + [40, 41]]
    pixels = zoo.pictures(3)
    together = {**zoo.pad(rows, side), "pixel_values": pixels}
    return together, [{**zoo.pad([rows[0]]), "pixel_values": pixels[:1]}, {**zoo.pad([rows[1]]), "pixel_values": pixels[1:]}]


@pytest.mark.parametrize("side", ["left", "right"])
def test_prompts_that_begin_with_a_picture(model, side):
    together, alone = pictures_first(side)
    with torch.no_grad(), foveate.PruMergePlus()(model):
        out = model.generate(**together, **OPTIONS)[:, -NEW:]
        logits = model(**together).logits
        for row in range(2):
            assert torch.equal(out[row], model.generate(**alone[row], **OPTIONS)[0, -NEW:])
            expected = model(**alone[row]).logits[0]
            mine = reference.row_end(logits, together, row, len(expected))
            torch.testing.assert_close(mine, expected, **CLOSE)
    encoded = foveate.encode(model, "prumerge+", **together)
    assert (encoded.inputs["input_ids"] == zoo.IMAGE).sum() == sum(len(e) for e in encoded.embeds)


def test_forward_that_skips_the_hooks_of_the_module(model):
    """As PEFT up to 0.20 calls it, for one."""
    inputs = zoo.batch()
    with torch.no_grad(), foveate.PruMergePlus()(model) as session:
        expected = model(**inputs).logits
        session.report = None
        assert torch.equal(model.forward(**inputs).logits, expected)
        assert session.report.after != session.report.before


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("positions", ["compact", "original"])
def test_a_batch_decoded_by_hand_from_its_last_column(model, positions, masked):
    """Prompts of equal length whose pictures keep different numbers of tokens."""
    rows, pixels = [zoo.prompt(1, 3, 6, 1), zoo.prompt(1, 3, 6, 2)], zoo.pictures(2)
    together = {**zoo.pad(rows), "pixel_values": pixels}
    if not masked:
        del together["attention_mask"]
    token = torch.tensor([[33], [44]])
    with torch.no_grad(), foveate.PruMergePlus(positions=positions)(model) as session:
        cache = new_cache(model)
        first = model(**together, past_key_values=cache).logits[:, -1]
        assert len(set(session.report.after)) == 2
        second = model(input_ids=token, past_key_values=cache).logits[:, -1]
        for row in range(2):
            cache = new_cache(model)
            alone = model(**zoo.pad([rows[row]]), pixel_values=pixels[row : row + 1], past_key_values=cache).logits[0, -1]
            torch.testing.assert_close(first[row], alone, **CLOSE)
            alone = model(input_ids=token[row : row + 1], past_key_values=cache).logits[0, -1]
            torch.testing.assert_close(second[row], alone, **CLOSE)


@pytest.mark.parametrize("positions", ["compact", "original"])
def test_pictures_that_come_later_in_a_batch_by_hand(model, positions):
    text, later = torch.tensor([[1, 20, 21, 22], [1, 30, 31, 32]]), [zoo.prompt(1, 2, 3, 5)[1:], zoo.prompt(1, 2, 3, 6)[1:]]
    pixels = zoo.pictures(2)
    with torch.no_grad(), foveate.PruMergePlus(positions=positions)(model):
        cache = new_cache(model)
        model(input_ids=text, past_key_values=cache)
        together = model(input_ids=torch.tensor(later), pixel_values=pixels, past_key_values=cache).logits
        for row in range(2):
            whole = torch.cat([text[row], torch.tensor(later[row])])[None]
            alone = model(input_ids=whole, pixel_values=pixels[row : row + 1]).logits[0, -4:]
            torch.testing.assert_close(together[row, -4:], alone, **CLOSE)


def test_decoding_by_hand_with_position_ids(model):
    inputs, token = zoo.batch(rows=(0, 1)), torch.tensor([[33], [44]])
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.long)], 1)
    places = (mask.cumsum(1) - 1)[:, -1:]
    with torch.no_grad(), foveate.PruMergePlus(positions="original")(model):
        logits = []
        for given in ({}, {"position_ids": places}):
            cache = new_cache(model)
            model(**inputs, past_key_values=cache)
            logits.append(model(input_ids=token, attention_mask=mask, past_key_values=cache, **given).logits)
        torch.testing.assert_close(*logits)
    with torch.no_grad(), foveate.PruMergePlus()(model):
        logits = []
        for given in ({}, {"position_ids": places}):  # which only count
            cache = new_cache(model)
            model(**inputs, past_key_values=cache)
            logits.append(model(input_ids=token, attention_mask=mask, past_key_values=cache, **given).logits)
        assert torch.equal(*logits)
        with pytest.raises(foveate.InputError, match="positions='original'"):
            model(input_ids=token, attention_mask=mask, past_key_values=cache, position_ids=places + 1)


class Stop(BaseStreamer):
    """A user who presses stop after two tokens, and the tokens that came before."""

    def __init__(self):
        self.seen = []

    def put(self, value):
        self.seen.append(value)
        if len(self.seen) == 3:
            raise KeyboardInterrupt

    def end(self):
        raise AssertionError("not reached")


def test_a_generate_that_was_interrupted_leaves_a_cache_that_goes_on(model):
    inputs, cache, stop = zoo.batch(rows=(0,)), new_cache(model), Stop()
    options = {**OPTIONS, "return_dict_in_generate": True, "output_logits": True}
    with foveate.PruMergePlus()(model):
        with pytest.raises(KeyboardInterrupt):
            model.generate(**inputs, past_key_values=cache, streamer=stop, **OPTIONS)
        ids = torch.cat([inputs["input_ids"], *(v.view(1, -1) for v in stop.seen[1:]), torch.tensor([[50, 51, 52]])], 1)
        later = model.generate(input_ids=ids, past_key_values=cache, **options)
        anew = model.generate(input_ids=ids, pixel_values=inputs["pixel_values"], **options)
    torch.testing.assert_close(torch.stack(later.logits), torch.stack(anew.logits), **CLOSE)


def test_a_forward_that_failed_marks_no_other_cache(model):
    inputs = zoo.batch(rows=(0,))
    with torch.no_grad(), foveate.PruMergePlus()(model):
        with pytest.raises(Exception):  # noqa: B017, PT011 - whatever transformers makes of it
            model(**inputs, labels=inputs["input_ids"], num_items_in_batch="x")
        cache = new_cache(model)
        text = torch.tensor([[1, 20, 21, 22]])
        model(input_ids=text, past_key_values=cache)
        step = model(input_ids=torch.tensor([[23]]), past_key_values=cache).logits[:, -1]
    with torch.no_grad():
        torch.testing.assert_close(step, model(input_ids=torch.tensor([[1, 20, 21, 22, 23]])).logits[:, -1], **CLOSE)


def test_a_compiled_model_goes_on_from_the_cache_it_filled(model):
    inputs, token, logits = zoo.batch(rows=(0,)), torch.tensor([[33]]), []
    mask = torch.cat([inputs["attention_mask"], torch.ones(1, 1, dtype=torch.long)], 1)
    plain = zoo.load()
    for callable_model in (plain, torch.compile(plain, backend="eager")):
        with torch.no_grad(), foveate.PruMergePlus(positions="original")(plain):
            cache = new_cache(plain)
            callable_model(**inputs, past_key_values=cache)
            logits.append(callable_model(input_ids=token, past_key_values=cache, attention_mask=mask).logits)
    torch.testing.assert_close(*logits, **CLOSE)


def test_threads(model):
    """Several requests at once on one attached model."""
    requests = [zoo.batch(rows=(row,)) for row in (0, 1, 3)]
    with foveate.PruMergePlus()(model):
        expected = [model.generate(**r, **OPTIONS) for r in requests]
        found = [[] for _ in requests]

        def work(i: int) -> None:
            for _ in range(6):
                found[i].append(model.generate(**requests[i], **OPTIONS))

        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(requests))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for each, right in zip(found, expected, strict=True):
        assert len(each) == 6
        assert all(torch.equal(out, right) for out in each)


def test_allowed_tokens_of_several_sequences_per_prompt(model):
    inputs, seen = zoo.batch(rows=(0, 1)), []

    def allowed(row, sequence):
        seen.append((row, sequence[: inputs["input_ids"].shape[1]]))
        return [20, 21]

    with foveate.PruMergePlus()(model):
        model.generate(**inputs, **{**OPTIONS, "do_sample": True}, num_return_sequences=2, prefix_allowed_tokens_fn=allowed)
    each = 2 if ROWS_ARE_SEQUENCES else 1
    assert {row for row, _ in seen} == {*range(2 * each)}
    assert all(torch.equal(prompt, inputs["input_ids"][row // each]) for row, prompt in seen)


@pytest.mark.parametrize("method", [foveate.Spatial(budget=4, positions="original"), foveate.PruMerge(positions="original")])
def test_a_prompt_that_ends_with_its_picture(model, method):
    """With original positions, what comes behind goes on from the end of the full prompt."""
    inputs = {"input_ids": torch.tensor([[1, 20, 21, 22] + [zoo.IMAGE] * zoo.TOKENS]), "pixel_values": zoo.pictures(1)}
    options = {**OPTIONS, "return_dict_in_generate": True, "output_logits": True}
    with torch.no_grad(), method(model):
        cache, by_hand = new_cache(model), new_cache(model)
        out = model.generate(**inputs, past_key_values=cache, **options)
        steps = [model(**inputs, past_key_values=by_hand).logits[:, -1]]
        for token in out.sequences[0, -NEW:-1]:
            steps.append(model(input_ids=token.view(1, 1), past_key_values=by_hand).logits[:, -1])
        torch.testing.assert_close(torch.stack(steps), torch.stack(out.logits), **CLOSE)
        ids = torch.cat([out.sequences, torch.tensor([[50, 51]])], 1)
        later = model.generate(input_ids=ids, past_key_values=cache, **options)
        anew = model.generate(input_ids=ids, pixel_values=inputs["pixel_values"], **options)
        torch.testing.assert_close(torch.stack(later.logits), torch.stack(anew.logits), **CLOSE)


def test_a_cache_that_was_reset_is_empty(model):
    inputs = zoo.batch(rows=(0,))
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=300)
    text = torch.tensor([[1, 20, 21, 22]])
    with torch.no_grad(), foveate.PruMergePlus()(model):
        expected = model.generate(**inputs, **OPTIONS)
        model.generate(**inputs, past_key_values=cache, disable_compile=True, **OPTIONS)
        cache.reset()
        assert torch.equal(model.generate(**inputs, past_key_values=cache, disable_compile=True, **OPTIONS), expected)
        cache.reset()
        first = model.generate(text, past_key_values=cache, disable_compile=True, **OPTIONS)
        longer = torch.cat([first, text[:, 1:]], 1)
        second = model.generate(longer, past_key_values=cache, disable_compile=True, **OPTIONS)
        assert torch.equal(second, model.generate(longer, **OPTIONS))


def test_a_processor_of_the_user_replaces_the_one_of_generate(model):
    inputs = zoo.batch(rows=(0,))
    options = {**OPTIONS, "return_dict_in_generate": True, "output_scores": True}
    strong = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(3.0)])
    with foveate.PruMergePlus()(model):
        alone = model.generate(**inputs, **options, logits_processor=strong)
        both = model.generate(**inputs, **options, logits_processor=strong, repetition_penalty=1.2)
    assert all(torch.equal(a, b) for a, b in zip(alone.scores, both.scores, strict=True))


def test_a_streamer_by_position_and_several_sequences(model):
    class Collect(BaseStreamer):
        def __init__(self):
            self.values = []

        def put(self, value):
            self.values.append(value)

        def end(self):
            pass

    inputs, streamer = zoo.batch(rows=(0,)), Collect()
    ids = inputs.pop("input_ids")
    with foveate.PruMergePlus()(model):
        model.generate(ids, None, None, None, None, None, None, streamer, **inputs, **OPTIONS)
    assert torch.equal(streamer.values[0], ids)
    assert len(streamer.values) == 1 + NEW
    plain, reduced = Collect(), Collect()
    options = {**OPTIONS, "do_sample": True, "num_return_sequences": 2}
    model.generate(ids, **inputs, **options, streamer=plain)
    with foveate.PruMergePlus()(model):
        model.generate(ids, **inputs, **options, streamer=reduced)
    assert torch.equal(plain.values[0], reduced.values[0])


def test_an_assistant_with_a_method_of_its_own(model):
    assistant, inputs = zoo.load(), zoo.batch(rows=(1,))
    with foveate.PruMergePlus()(model), foveate.PruMergePlus()(assistant):
        expected = model.generate(**inputs, **OPTIONS)
        assert torch.equal(model.generate(**inputs, **OPTIONS, assistant_model=assistant), expected)


def test_mixed_precision_selects_as_float32_does():
    from foveate.methods.tools.scoring import cls_attention
    from foveate.tokens import EncoderTap, VisualTokens

    seen = []

    class Watch(foveate.PruMergePlus):
        def reduce(self, tokens: VisualTokens) -> foveate.Reduction:
            reduction = super().reduce(tokens)
            tap = tokens.taps["last"]
            with torch.autocast("cpu", enabled=False):
                exact = cls_attention(EncoderTap(tap.query.float(), tap.keys.float(), tap.heads))
            seen.append((reduction.scores, exact))
            return reduction

    model = zoo.load()
    with Watch()(model), torch.autocast("cpu", dtype=torch.bfloat16):
        model(**zoo.batch())
    assert torch.equal(*seen[0])


def test_packed_text_is_left_alone(model):
    """Positions that begin anew are borders of packed sequences; only gaps are not."""
    packed = dict(
        input_ids=torch.tensor([[1, 20, 21, 1, 30, 31]]), position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]), use_cache=False
    )
    with torch.no_grad():
        expected = model(**packed).logits
        with foveate.PruMergePlus(positions="original")(model):
            assert torch.equal(model(**packed).logits, expected)


def test_a_mask_of_four_dimensions_where_everything_stays(model):
    inputs = zoo.batch(rows=(0,))
    length = inputs["input_ids"].shape[1]
    inputs["attention_mask"] = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
    with torch.no_grad():
        expected = model(**inputs).logits
        with foveate.PruMergePlus(budget=1.0)(model):
            assert torch.equal(model(**inputs).logits, expected)


def test_placeholders_that_a_mask_hides(model):
    inputs = zoo.batch(rows=(0,))
    inputs["attention_mask"][inputs["input_ids"] == zoo.IMAGE] = 0
    with foveate.PruMergePlus()(model) as session:
        out = model.generate(**inputs, **OPTIONS)
        assert session.report.after != session.report.before
    assert torch.equal(out, model.generate(**inputs, **OPTIONS)), "nobody sees the picture, so nothing changes"


def test_what_cannot_be_followed_is_refused(model):
    inputs = zoo.batch(rows=(0,))
    with torch.no_grad(), foveate.PruMergePlus()(model):
        with pytest.raises(foveate.InputError, match="logits_to_keep"):
            model(**inputs, logits_to_keep=torch.tensor([3]))
        assert model(**inputs, logits_to_keep=2).logits.shape[1] == 2
        cache = new_cache(model)
        model(**inputs, past_key_values=cache)
        with pytest.raises(foveate.InputError, match="goes on with input_ids"):
            model(inputs_embeds=torch.zeros(1, 1, 64), past_key_values=cache)


def test_detach_by_model(model):
    foveate.attach(model, "prumerge+")
    clone = copy.deepcopy(model)
    foveate.detach(model)
    assert not {"generate", "forward"} & set(model.__dict__)
    assert "generate" in clone.__dict__
    foveate.detach(clone)
    foveate.detach(clone)
    assert not {"generate", "forward"} & set(clone.__dict__)
    saved = foveate.attach(model, "prumerge+") and model.generate
    foveate.detach(model)
    assert torch.equal(saved(**zoo.batch(), **OPTIONS), model.generate(**zoo.batch(), **OPTIONS)), "kept from when it was attached"


def test_a_block_cannot_take_over_an_outer_handle(model):
    handle = foveate.attach(model, "prumerge")
    with foveate.Spatial(budget=4)(model), pytest.raises(foveate.InputError, match="inside this one"), handle:
        pass
    handle.detach()


def test_encode_takes_the_fields_of_a_method(model):
    inputs = zoo.batch()
    assert [len(e) for e in foveate.encode(model, "prumerge+", budget=5, **inputs).embeds] == [5] * 4
    with pytest.raises(foveate.InputError, match="has no field 'nonsense'"):
        foveate.encode(model, "prumerge+", nonsense=1, **inputs)
    with pytest.raises(foveate.InputError, match="only be given with the name"):
        foveate.encode(model, foveate.PruMerge(), budget=5, **inputs)


def logits_of(model, **options):
    return torch.stack(model.generate(**{**OPTIONS, **options}, return_dict_in_generate=True, output_logits=True).logits)


def test_attaching_again_after_somebody_wrapped_forward():
    """accelerate puts hooks and mixed precision around ``forward``, and keeps what it found there."""
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    model, inputs = zoo.load(), zoo.batch()
    with torch.no_grad():
        full = model(**inputs).logits.shape[1]
        with foveate.PruMergePlus()(model):
            short = model(**inputs).logits.shape[1]
            add_hook_to_module(model, ModelHook())
            assert model(**inputs).logits.shape[1] == short
        assert model(**inputs).logits.shape[1] == full
        for _ in range(2):
            with foveate.PruMergePlus()(model):
                assert model(**inputs).logits.shape[1] == short
                add_hook_to_module(model, ModelHook())  # starts from what the first hook wrapped
                assert model(**inputs).logits.shape[1] == short
        remove_hook_from_module(model)
        assert model(**inputs).logits.shape[1] == full
        with foveate.PruMergePlus()(model):
            assert model(**inputs).logits.shape[1] == short


def test_a_turn_that_failed_can_be_repeated(model):
    inputs, cache = zoo.batch(rows=(0,)), new_cache(model)
    with foveate.PruMergePlus()(model):
        first = model.generate(**inputs, past_key_values=cache, **OPTIONS)
        ids = torch.cat([first, torch.tensor([[50, 51]])], 1)
        with pytest.raises(ValueError, match="mistyped"):
            model.generate(ids, past_key_values=cache, mistyped=1, **OPTIONS)
        later = logits_of(model, input_ids=ids, past_key_values=cache)
        anew = logits_of(model, input_ids=ids, pixel_values=inputs["pixel_values"])
    torch.testing.assert_close(later, anew, **CLOSE)


def test_a_second_turn_that_ends_with_a_picture(model):
    method, pixels = foveate.Spatial(budget=4, positions="original"), zoo.pictures(2)
    first, cache = torch.tensor([zoo.prompt(1, 2, 3, 1)]), new_cache(model)
    with method(model):
        said = model.generate(first, pixel_values=pixels[:1], past_key_values=cache, **OPTIONS)
        ids = torch.cat([said, torch.tensor([[50, 51] + [zoo.IMAGE] * zoo.TOKENS])], 1)
        later = logits_of(model, input_ids=ids, pixel_values=pixels[1:], past_key_values=cache)
        anew = logits_of(model, input_ids=ids, pixel_values=pixels)
        lookup = model.generate(ids, pixel_values=pixels, prompt_lookup_num_tokens=3, **OPTIONS)
        assert torch.equal(lookup, model.generate(ids, pixel_values=pixels, **OPTIONS))
    torch.testing.assert_close(later, anew, **CLOSE)


def test_given_positions_with_an_offset(model):
    """Rotary embeddings only know differences, so an offset changes nothing."""
    inputs = {"input_ids": torch.tensor([[1, 20, 21, 22] + [zoo.IMAGE] * zoo.TOKENS]), "pixel_values": zoo.pictures(1)}
    with foveate.Spatial(budget=4, positions="original")(model):
        plain = logits_of(model, **inputs)
        moved = logits_of(model, **inputs, position_ids=torch.arange(4 + zoo.TOKENS)[None] + 7)
    torch.testing.assert_close(plain, moved, atol=2e-3, rtol=2e-3)


class During(BaseStreamer):
    """Does something else with the same model while it generates."""

    def __init__(self, act, at=0):
        self.act, self.at, self.count = act, at, 0

    def put(self, _):
        if self.count == self.at:
            self.act()
        self.count += 1

    def end(self):
        pass


def test_direct_calls_while_another_generate_runs(model):
    inputs, lengths = zoo.batch(rows=(0,)), []
    with torch.no_grad(), foveate.PruMergePlus()(model):
        expected = model(**inputs).logits.shape[1]
        for at in (0, 2):
            model.generate(**inputs, streamer=During(lambda: lengths.append(model(**inputs).logits.shape[1]), at), **OPTIONS)
    assert lengths == [expected] * 2


def test_a_generate_inside_another(model):
    inputs = {"input_ids": torch.tensor([[1, 20, 21, 22] + [zoo.IMAGE] * zoo.TOKENS]), "pixel_values": zoo.pictures(1)}
    with foveate.Spatial(budget=4, positions="original")(model):
        alone = model.generate(**inputs, **OPTIONS)
        inner = []
        outer = model.generate(**inputs, streamer=During(lambda: inner.append(model.generate(**inputs, **OPTIONS)), 2), **OPTIONS)
    assert torch.equal(outer, alone)
    assert torch.equal(inner[0], alone)


def test_a_cache_copied_while_generate_runs(model):
    inputs, cache, copies = zoo.batch(rows=(0,)), new_cache(model), []
    with torch.no_grad(), foveate.PruMergePlus(positions="original")(model):
        model.generate(**inputs, past_key_values=cache, streamer=During(lambda: copies.append(copy.deepcopy(cache)), 1), **OPTIONS)
        by_hand = new_cache(model)
        model(**inputs, past_key_values=by_hand)
        token = torch.tensor([[33]])
        found, expected = (model(input_ids=token, past_key_values=c).logits for c in (copies[0], by_hand))
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("positions", ["compact", "original"])
def test_a_padded_text_cache_that_later_gets_pictures(model, positions):
    """transformers numbers a cache filled by hand by its columns; everything that follows must go on from there."""
    text = zoo.pad([[1, 20, 21, 22, 23], [1, 30]])
    later, pixels, token = [zoo.prompt(1, 2, 3, 5)[1:], zoo.prompt(1, 2, 3, 6)[1:]], zoo.pictures(2), torch.tensor([[33], [44]])

    def steps(rows):
        cache, mask = new_cache(model), text["attention_mask"][rows]
        ids = text["input_ids"][rows]
        if len(rows) == 1:
            ids, mask = ids[:, mask[0].bool()], mask[:, mask[0].bool()]
        model(input_ids=ids, attention_mask=mask, past_key_values=cache)
        mask = torch.cat([mask, torch.ones(len(rows), len(later[0]), dtype=torch.long)], 1)
        new = torch.tensor([later[row] for row in rows])
        first = model(input_ids=new, attention_mask=mask, pixel_values=pixels[rows], past_key_values=cache).logits[:, -1]
        mask = torch.cat([mask, torch.ones(len(rows), 1, dtype=torch.long)], 1)
        return first, model(input_ids=token[rows], attention_mask=mask, past_key_values=cache).logits[:, -1]

    with torch.no_grad(), foveate.PruMergePlus(positions=positions)(model):
        together = steps([0, 1])
        for row in (0, 1):
            for mine, alone in zip(together, steps([row]), strict=True):
                torch.testing.assert_close(mine[row], alone[0], **CLOSE)


def test_text_compiles_as_one_graph():
    model, text = zoo.load(), torch.tensor([[1, 20, 21, 22]])
    torch._dynamo.reset()  # what other tests compiled counts against the limit, beyond which this fails
    with torch.no_grad(), foveate.PruMergePlus()(model):
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(input_ids=text, use_cache=False).logits, model(input_ids=text, use_cache=False).logits)


def test_what_cannot_work_says_so():
    model, inputs = zoo.load(), zoo.batch(rows=(0,))
    with foveate.PruMergePlus()(model), pytest.raises(foveate.UnsupportedModelError, match="DataParallel"):
        model._replicate_for_data_parallel()
    length = inputs["input_ids"].shape[1]
    packed = {"input_ids": inputs["input_ids"].repeat(1, 2), "pixel_values": zoo.pictures(2), "use_cache": False}
    packed["position_ids"] = torch.arange(length).repeat(2)[None]
    with foveate.PruMergePlus(positions="original")(model), pytest.raises(foveate.InputError, match="packed prompts"):
        model(**packed)
    torch._dynamo.reset()  # what other tests compiled counts against the limit, beyond which nothing is compiled
    model.model.vision_tower.compile(backend="eager")
    model(**inputs)
    with foveate.PruMergePlus()(model), pytest.raises(foveate.UnsupportedModelError, match="compiled by itself"):
        model(**inputs)
