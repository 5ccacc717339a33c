"""Llama 4, whose forward projects the encoded pictures that it is handed: what only this family has."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import AutoModelForImageTextToText

import foveate
from foveate.engine.model.anatomy import anatomy
from foveate.engine.vision.encoding import encode

from ... import families
from ... import family_reference as by_hand
from .test_families import GREEDY, NEW, generate, row_kept

FAMILY = "llama4"


def tapped(inputs: dict[str, Tensor]):
    return encode(anatomy(families.load(FAMILY)), ("last",), {"pixel_values": inputs["pixel_values"]}, project=True)


@torch.no_grad()
def test_cls_stands_after_the_patches():
    """Queries and keys of the last layer, against what its projections return: [CLS] is last there, and first here."""
    model, inputs, seen = families.load(FAMILY), families.batch(FAMILY), []
    attention = model.vision_model.model.layers[-1].self_attn
    handles = [part.register_forward_hook(lambda _, __, out: seen.append(out)) for part in (attention.q_proj, attention.k_proj)]
    tap = tapped(inputs).taps["last"]
    for handle in handles:
        handle.remove()
    queries, keys = seen
    assert torch.equal(tap.query, queries[:, -1])
    assert torch.equal(tap.keys[:, 0], keys[:, -1])
    assert torch.equal(tap.patch_keys, keys[:, :-1])
    assert (queries[:, -1] - queries[:, 0]).abs().max() > 0.1
    assert foveate.models()[list(families.FAMILIES).index(FAMILY)].reads_cls


@torch.no_grad()
def test_a_token_is_a_block_of_patches():
    """Each patch changes one token of the encoder's own adapter: the one whose mean it is counted in."""
    model, inputs = families.load(FAMILY), families.batch(FAMILY, rows=(0,))
    encoded, adapter = tapped(inputs), model.vision_model.vision_adapter
    patches = torch.randn(1, 36, 48)
    whole = adapter(patches)
    for place in range(36):
        one = torch.zeros(3, 36, 1)
        one[0, place] = 1
        (counted,) = encoded.arrangement.cells(one)[:, 0].nonzero().flatten().tolist()
        changed = (adapter(patches + one[:1]) - whole).abs().sum(-1)[0]
        assert changed.nonzero().flatten().tolist() == [counted]


def test_a_prompt_in_pieces():
    """Transformers slices encoded pictures as it slices the prompt; the unmodified Llama 4 cannot read its prompt so."""
    model, inputs = families.load(FAMILY), families.batch(FAMILY)
    for budget in (1.0, 5):
        with foveate.DivPrune(budget=budget)(model):
            _, logits = generate(FAMILY, inputs)
            _, pieces = generate(FAMILY, inputs, prefill_chunk_size=7)
        torch.testing.assert_close(pieces, logits, atol=3e-4, rtol=3e-4)


def test_several_sequences_of_a_prompt():
    """The pictures of a prompt go with each of its sequences."""
    model, inputs = families.load(FAMILY), families.batch(FAMILY)
    with foveate.DivPrune(budget=5)(model):
        _, logits = generate(FAMILY, inputs)
        each = model.generate(**inputs, **{**GREEDY, "do_sample": True, "top_k": 1}, num_return_sequences=2)
    first = torch.stack(each.logits, 1)[:, 0].unflatten(0, (-1, 2))
    for number in range(2):
        torch.testing.assert_close(first[:, number], logits[:, 0], atol=3e-4, rtol=3e-4)


def test_queries_that_are_scaled_by_their_place():
    """Layers without rotary embeddings scale queries by their columns: those of the short prompt, as worked out by hand."""
    model, inputs = families.load(FAMILY), families.batch(FAMILY, rows=(1,))
    layers = [layer.self_attn for layer in families.decoder_of(model).layers if not layer.self_attn.use_rope]
    plain = generate(FAMILY, inputs)[1]
    try:
        for attention in layers:
            attention.floor_scale = 6
        assert (generate(FAMILY, inputs)[1] - plain).abs().max() > 0.01
        encoded = foveate.encode(model, foveate.DivPrune(budget=4), **inputs)
        with foveate.DivPrune(budget=4)(model) as session:
            sequences, logits = generate(FAMILY, inputs)
        kept = row_kept(session.report, 0)
        spliced = by_hand.splice(FAMILY, model, inputs, kept, torch.cat(encoded.embeds), compact=True)
        wanted = by_hand.logits(model, spliced, sequences[0, -NEW:].tolist())
    finally:
        for attention in layers:
            attention.floor_scale = 8192
    torch.testing.assert_close(logits[0], wanted, atol=3e-4, rtol=3e-4)


@pytest.mark.skipif(Version(transformers.__version__).release[:2] != (5, 24), reason="works by itself in other versions")
def test_the_forward_that_fails_by_itself_in_transformers_5_24():
    """It reads a field of its language model's output that this does not have: with a method attached, it is there."""
    model = AutoModelForImageTextToText.from_pretrained(families.saved(FAMILY), attn_implementation="sdpa").eval()
    inputs = families.batch(FAMILY)
    own = model.generate
    with pytest.raises(AttributeError, match="image_outputs"):
        own(**inputs, **GREEDY)
    with foveate.DivPrune(budget=1.0)(model):
        wanted = generate(FAMILY, inputs)[1]
        for call in (model.generate, own):  # the second one encodes pictures past us
            assert torch.equal(torch.stack(call(**inputs, **GREEDY).logits, 1), wanted)
    with pytest.raises(AttributeError, match="image_outputs"):
        own(**inputs, **GREEDY)


def test_a_copy_with_a_method_attached():
    model, inputs = families.load(FAMILY), families.batch(FAMILY)
    with foveate.DivPrune(budget=5)(model):
        wanted = generate(FAMILY, inputs)[1]
        twin = copy.deepcopy(model)
    assert torch.equal(torch.stack(twin.generate(**inputs, **GREEDY).logits, 1), wanted)
