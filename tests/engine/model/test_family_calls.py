"""Ways of calling models of every family with a method attached: forward, decoding by hand, further turns, training."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import foveate
from foveate.families import FAMILIES

from ... import families
from ...family_prompts import IMAGE, INDICATORS, VIDEO

NEW = 3
GREEDY = dict(max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, suppress_tokens=[IMAGE, VIDEO, *INDICATORS])
GREEDY |= dict(return_dict_in_generate=True, output_logits=True)
TYPES = ("token_type_ids", "mm_token_type_ids")
MROPE = tuple(family for family, row in FAMILIES.items() if row.mrope)
CASES = [
    (family, name) for family in FAMILIES for name in ("prumerge+", "fastv") if name != "fastv" or family not in families.UNCUT
]


def method_of(name: str, family: str) -> foveate.Method:
    return foveate.PruMergePlus() if name == "prumerge+" else foveate.FastV(budget=0.5, layer=3)


def longer(inputs: dict[str, Tensor], words: Tensor) -> dict[str, Tensor]:
    """The prompts with further words behind them; pictures are left out."""
    found = {"input_ids": torch.cat([inputs["input_ids"], words], 1)}
    found["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(words)], 1)
    for name in TYPES:
        if name in inputs:
            found[name] = torch.cat([inputs[name], torch.zeros_like(words).to(inputs[name])], 1)
    return found


def pictures(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask", *TYPES)}


@torch.no_grad()
@pytest.mark.parametrize(("family", "name"), [case for case in CASES if case[1] != "fastv" or case[0] not in MROPE])
def test_decoding_by_hand_equals_generate(family, name):
    """A forward over the prompt, then one for each token with the mask of the full prompt.

    On a cache that is not shortened, transformers numbers such tokens itself, and fails at it with M-RoPE. It then counts padding,
    too, and its rounding may turn the ranks of attention: rows are alone there.
    """
    model = families.load(family)
    rows = [None] if name == "prumerge+" else [(row,) for row in families.row_numbers(family)]
    for inputs in (families.batch(family, rows=some) for some in rows):
        _decode(model, inputs, method_of(name, family))


def _decode(model: torch.nn.Module, inputs: dict[str, Tensor], method: foveate.Method) -> None:
    with method(model) as session:
        generated = model.generate(**inputs, **GREEDY)
        after = session.report.after
        tokens = generated.sequences[:, -NEW:]
        output = model(**inputs, use_cache=True)
        assert session.report.after == after
        found, mask = [output.logits[:, -1]], inputs["attention_mask"]
        for step in range(NEW - 1):
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            more = {"token_type_ids": torch.zeros_like(tokens[:, :1])} if "token_type_ids" in inputs else {}
            output = model(
                input_ids=tokens[:, step : step + 1], attention_mask=mask, past_key_values=output.past_key_values, **more
            )
            found.append(output.logits[:, -1])
    torch.testing.assert_close(torch.stack(found, 1), torch.stack(generated.logits, 1), atol=3e-4, rtol=3e-4)


@pytest.mark.parametrize("name", ["prumerge+", None])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "paligemma"])  # its prompts see all of themselves
def test_a_second_turn_on_the_cache_equals_one_long_prompt(family, name):
    """The first turn says three tokens, the second goes on behind them; without a method, it is transformers that must hold."""
    model, inputs = families.load(family), families.batch(family)
    words = torch.randint(20, 120, (len(inputs["input_ids"]), 4), generator=torch.Generator().manual_seed(1))

    def turns() -> tuple[Tensor, Tensor]:
        first = model.generate(**inputs, **GREEDY)
        said = first.sequences[:, inputs["input_ids"].shape[1] :]
        second = longer(longer(inputs, said), words)
        on_cache = model.generate(**second, past_key_values=first.past_key_values, **GREEDY)
        once = model.generate(**second, **pictures(inputs), **GREEDY)
        return torch.stack(on_cache.logits, 1), torch.stack(once.logits, 1)

    if name is None:
        found, wanted = turns()
    else:
        with method_of(name, family)(model):
            found, wanted = turns()
    torch.testing.assert_close(found, wanted, atol=3e-4, rtol=3e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_gradients_are_those_of_the_rows(family):
    """Mean loss of a batch = mean over the taught tokens of its rows alone; the projector or the decoder learns."""
    model = families.load(family)
    inputs = families.batch(family)
    labels = inputs["input_ids"].clone()
    labels[:, :-3] = -100
    with foveate.PruMergePlus()(model):
        loss = model(**inputs, labels=labels).loss
        alone = []
        for row in families.row_numbers(family):
            one = families.batch(family, rows=(row,))
            mine = one["input_ids"].clone()
            mine[:, :-3] = -100
            alone.append(model(**one, labels=mine).loss.item())
        weight = next(families.decoder_of(model).layers[0].parameters())
        loss.backward()
    assert loss.item() == pytest.approx(sum(alone) / len(alone), rel=1e-4)
    assert weight.grad is not None
    assert torch.isfinite(weight.grad).all()
    assert weight.grad.abs().sum() > 0
    model.zero_grad(set_to_none=True)


@pytest.mark.parametrize(("family", "name"), CASES)
def test_t7_eager_attention_keeps_the_same_tokens(family, name):
    model, inputs = families.load(family), families.batch(family)
    found = []
    try:
        for attention in ("sdpa", "eager"):
            model.set_attn_implementation(attention)
            with method_of(name, family)(model) as session:
                logits = torch.stack(model.generate(**inputs, **GREEDY).logits, 1)
                stages = [[stage.kept for stage in image.stages] for image in session.report.images]
                found.append((session.report.kept, stages, logits))
    finally:
        model.set_attn_implementation("sdpa")
    assert found[0][:2] == found[1][:2]
    torch.testing.assert_close(found[0][2], found[1][2], atol=3e-4, rtol=3e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_t8_static_caches(family):
    model, inputs = families.load(family), families.batch(family)
    with foveate.PruMergePlus()(model):
        dynamic = torch.stack(model.generate(**inputs, **GREEDY).logits, 1)
        static = model.generate(**inputs, **GREEDY, cache_implementation="static", disable_compile=True)
    torch.testing.assert_close(torch.stack(static.logits, 1), dynamic, atol=3e-4, rtol=3e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_broken_pictures_are_refused(family):
    model, inputs = families.load(family), families.batch(family)
    for name in ("pixel_values", "pixel_values_videos"):
        if name in inputs:
            broken = inputs[name].clone()
            broken.view(-1)[7] = float("nan")
            with foveate.PruMergePlus()(model), pytest.raises(foveate.InputError, match="NaN or infinite"):
                model.generate(**{**inputs, name: broken}, max_new_tokens=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_that_do_not_fit_their_pictures(family):
    model, inputs = families.load(family), families.batch(family, rows=(0,))
    place = (inputs["input_ids"][0] == IMAGE).nonzero()[0]
    changed = inputs["input_ids"].clone()
    changed[0, place] = 50
    with foveate.PruMergePlus()(model), pytest.raises(foveate.InputError, match="image placeholders"):
        model.generate(**{**inputs, "input_ids": changed}, max_new_tokens=1)
