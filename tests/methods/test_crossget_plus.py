"""CrossGET's cross tokens: the arithmetic of the released code written out, gradients, and the first token of prompts."""

import math
import pickle

import pytest
import torch
from torch.nn import functional as F
from transformers import DynamicCache

import foveate
from foveate.methods.crossget_plus import CrossGETPlus
from foveate.methods.networks.cross_tokens import divergence, repeated

from .. import encoder_reference as slow
from .. import reference, zoo
from ..engine.test_forward import labels_of
from .test_inside_encoder import DEEP, deep, inputs_for, run  # noqa: F401


@pytest.fixture
def model():
    return zoo.load(decoder=DEEP)


def bound(model, scale=0.5, **fields):
    """With random offsets, or those of ``scale`` 0."""
    method = CrossGETPlus(**fields).fresh()
    with method(model):
        pass
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for offsets in method.module.parameters():
            offsets.copy_(scale * torch.randn(offsets.shape, generator=generator))
    return method


# -- the encoder


def written_out(tower, pixels, depth, plan, offsets, lead=1):
    """Features of one picture [lead + m + 1, C], cells and sizes: a copy of [CLS] comes last, in float64 and with loops."""
    states = tower.embeddings(pixels[None].double())
    states = (tower.pre_layrnorm(states) if hasattr(tower, "pre_layrnorm") else states)[0]
    states = torch.cat([states, states[:1] if lead else states.mean(0, keepdim=True)])
    heads, cells = tower.config.num_attention_heads, list(range(len(states) - lead - 1))
    owner, sizes = list(cells), [1] * len(cells)
    for number, block in enumerate(tower.encoder.layers[:depth]):
        states = torch.cat([states[:-1], states[-1:].detach() + offsets[number]])
        normed, width = block.layer_norm1(states), states.shape[1] // heads
        query, keys, values = (getattr(block.self_attn, f"{name}_proj")(normed) for name in "qkv")
        maps, outputs = [], []
        for h in range(heads):
            part = slice(h * width, (h + 1) * width)
            logits = query[:, part] @ keys[:, part].T / math.sqrt(width) + torch.tensor([1] * lead + sizes + [1]).double().log()
            maps.append(logits.softmax(-1))
            outputs.append(maps[-1] @ values[:, part])
        states = states + block.self_attn.out_proj(torch.cat(outputs, 1))
        if number in plan:
            attention = torch.stack(maps).mean(0)[:, lead:-1]
            importance = (attention[:-1].mean(0) + attention[-1]).tolist()
            inside = slow.Inside(query[:-1], keys[:-1], values[:-1], torch.stack(maps), heads, sizes, plan[number], lead)
            made = slow.crossget(inside, importance)
            merged = [sum(w * states[lead + i] for i, w in parts.items()) for parts in made.made_of]
            states = torch.cat([states[:lead], torch.stack(merged), states[-1:]])
            owner = [made.into[at] for at in owner]
            cells = [cells[at] for at in made.place]
            sizes = [owner.count(at) for at in range(len(cells))]
        states = states + block.mlp(block.layer_norm2(states))
    return states, cells, owner, sizes


@pytest.mark.parametrize("scale", [0.0, 0.5], ids=["no offsets", "offsets"])
@pytest.mark.parametrize("fields", [{}, {"budget": 21}, {"layers": (1, 3)}], ids=str)
def test_the_encoder_written_out(fields, scale):
    model, inputs = zoo.load(decoder=DEEP, dtype=torch.float64), inputs_for()
    inputs["pixel_values"] = inputs["pixel_values"].double()
    method = bound(model, scale, **fields)
    encoded, offsets = foveate.encode(model, method, **inputs), method.module.image.double()
    plan = method.plan(4, zoo.TOKENS)
    with torch.no_grad():
        for i, pixels in enumerate(inputs["pixel_values"]):
            states, cells, owner, sizes = written_out(model.model.vision_tower.double(), pixels, 4, plan, offsets)
            assert 1 + sum(sizes) + 1 == zoo.TOKENS + 2
            image = encoded.report.images[i]
            assert image.kept[:-1] == cells == sorted(cells)
            assert image.kept[-1] == max(set(range(zoo.TOKENS)) - set(cells)), "the copy stands where no patch does"
            assert image.source == owner
            torch.testing.assert_close(
                encoded.embeds[i], model.model.multi_modal_projector(states[1:][None])[0], atol=1e-5, rtol=1e-5
            )
            if "budget" in fields:
                assert image.after == 21


def test_without_cls_the_copy_is_of_the_mean_of_the_patches():
    model, inputs = zoo.tower("siglip").double(), inputs_for()
    method = bound(model)
    encoded = foveate.encode(model, method, input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"].double())
    assert any("no [CLS] token" in note and "begin as the mean of the patches" in note for note in encoded.report.notes)
    with torch.no_grad():
        plan, offsets = method.plan(4, zoo.TOKENS), method.module.image.double()
        for i, pixels in enumerate(inputs["pixel_values"]):
            states, cells, *_ = written_out(model.model.vision_tower, pixels, 4, plan, offsets, lead=0)
            assert encoded.report.images[i].kept[:-1] == cells
            wanted = model.model.multi_modal_projector(states[None])[0]
            torch.testing.assert_close(encoded.embeds[i], wanted, atol=1e-5, rtol=1e-5)
    model.float()


def test_counts_of_the_released_code(deep):  # noqa: F811
    """24 layers, 13 patches merge in each of 23: 277 patches and the copy; without it the same as before."""
    report = run(deep, CrossGETPlus()).report
    assert report.after == [278]
    assert [int(layer[0]) for layer in report.encoder_layers] == [576 - 13 * block for block in range(1, 24)]
    sizes = [report.images[0].source.count(output) for output in range(278)]
    assert sizes[-1] == 0
    assert 1 + sum(sizes) + 1 == 578
    assert run(deep, foveate.CrossGET()).report.after == [277]


def test_what_offsets_of_zero_change(model):
    """The copy counts in attention and comes last, so the plain method is another one; unattached, nothing is left."""
    inputs = zoo.batch()
    plain = foveate.encode(model, foveate.CrossGET(budget=20), **inputs)
    with_copy = foveate.encode(model, CrossGETPlus(budget=21), **inputs)
    assert [len(each) for each in with_copy.embeds] == [21] * 4
    assert not torch.allclose(torch.stack(plain.embeds), torch.stack(with_copy.embeds)[:, :-1])
    assert "crossget" not in str(model)


def test_fewer_than_can_be(model):
    with pytest.raises(foveate.InputError, match=r"leave 4 of 64 or more, and 3 were asked for.* One of its tokens is the copy"):
        foveate.encode(model, CrossGETPlus(budget=4), **zoo.batch())


# -- the decoder


def spliced(model, method, inputs, row):
    encoded = foveate.encode(model, method, **inputs)
    mine = [i for i, image in enumerate(encoded.report.images) if image.row == row]
    kept, embeds = [encoded.report.images[i].kept for i in mine], [encoded.embeds[i] for i in mine]
    return reference.spliced_embeddings(model, inputs, row, kept, embeds, zoo.IMAGE)[0]


def shifted(model, offsets, length):
    """Hooks by which the first token of a sequence changes before each layer, in calls of ``length`` tokens or more."""

    def hook(layer):
        def change(_, args, kwargs):
            hidden = args[0] if args else kwargs["hidden_states"]
            if hidden.shape[1] < length:
                return None
            hidden = torch.cat([hidden[:, :1].detach() + offsets[layer], hidden[:, 1:]], 1)
            return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

        return change

    return [
        layer.register_forward_pre_hook(hook(number), with_kwargs=True)
        for number, layer in enumerate(model.model.language_model.layers)
    ]


GREEDY = dict(max_new_tokens=4, min_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_logits=True)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("implementation", ["dynamic", "static"])
def test_the_first_token_of_prompts_with_pictures(model, side, implementation):
    """Prefill with offsets, then steps without, equal full passes with offsets on the first token; a row of text has none."""
    inputs, method = zoo.batch(side), bound(model)
    options = {} if implementation == "dynamic" else dict(cache_implementation="static", disable_compile=True)
    with method(model):
        out = model.generate(**inputs, suppress_tokens=[zoo.IMAGE], **GREEDY, **options)
    logits, answers = torch.stack(out.logits, 1), out.sequences[:, -4:].tolist()
    for row in range(4):
        embeddings = spliced(model, method, inputs, row)
        places = torch.arange(embeddings.shape[1])[None]
        handles = shifted(model, method.module.text, 2) if row != 2 else []
        expected = reference.run_spliced(model, embeddings, places, answers[row])
        for handle in handles:
            handle.remove()
        torch.testing.assert_close(logits[row], expected, atol=3e-4, rtol=3e-4)
        if row != 2:
            without = reference.run_spliced(model, embeddings, places, answers[row])
            assert not torch.allclose(without, expected, atol=1e-2)


def test_keys_of_a_later_turn_have_no_offset(model):
    """What a cache holds after prefill, a step and a further turn equals one long pass with the offset on the first token only."""
    inputs, method, more = zoo.batch(rows=(0,)), bound(model), torch.tensor([[20, 21, 22]])
    cache = DynamicCache(config=model.config.text_config)
    with method(model):
        model(**inputs, past_key_values=cache)
        mask = torch.ones(1, inputs["input_ids"].shape[1] + 3, dtype=torch.long)
        last = model(input_ids=more, attention_mask=mask, past_key_values=cache).logits[:, -1]
    embeddings = torch.cat([spliced(model, method, inputs, 0), model.get_input_embeddings()(more)], 1)
    handles, whole = shifted(model, method.module.text, 2), DynamicCache(config=model.config.text_config)
    wanted = model.model.language_model(inputs_embeds=embeddings, past_key_values=whole)
    for handle in handles:
        handle.remove()
    for ours, theirs in zip(cache.layers, whole.layers, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(ours.values, theirs.values, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(last, model.lm_head(wanted.last_hidden_state[:, -1]), atol=1e-4, rtol=1e-4)


def test_beams(model):
    """Copies of a row have the same first token."""
    inputs, method = zoo.batch(rows=(0, 2)), bound(model)
    with method(model):
        together = model.generate(**inputs, num_beams=3, max_new_tokens=3, suppress_tokens=[zoo.IMAGE])
        for row in (0, 1):
            alone = model.generate(**zoo.batch(rows=((0, 2)[row],)), num_beams=3, max_new_tokens=3, suppress_tokens=[zoo.IMAGE])
            assert torch.equal(together[row, -3:], alone[0, -3:])


def test_in_a_composition(model):
    """Cuts inside the decoder see the changed first token, and text keeps its place."""
    inputs, method = zoo.batch(), bound(model)
    outcome = []
    for each in (method, bound(model, 0.0)):
        with foveate.Compose(each, foveate.FastV(layer=2, budget=0.5))(model) as session:
            outcome.append(model.generate(**inputs, suppress_tokens=[zoo.IMAGE], **GREEDY))
            assert session.report.layers[0] == 4 * 14
    alone = zoo.batch(rows=(1,))
    with foveate.Compose(method, foveate.FastV(layer=2, budget=0.5))(model):
        single = model.generate(**alone, suppress_tokens=[zoo.IMAGE], **GREEDY)
    torch.testing.assert_close(torch.stack(outcome[0].logits, 1)[1], torch.stack(single.logits, 1)[0], atol=2e-4, rtol=2e-4)
    assert not torch.allclose(outcome[0].logits[0][0], outcome[1].logits[0][0], atol=1e-2)


def test_a_budget_of_everything_changes_nothing(model):
    inputs = zoo.batch()
    before = model(**inputs).logits
    for budget in (1.0, zoo.TOKENS):
        with bound(model, budget=budget)(model):
            assert torch.equal(model(**inputs).logits, before)


def test_where_the_decoder_runs_elsewhere(model):
    from foveate.serving.encoding import servable

    with pytest.raises(foveate.InputError, match="acts inside the language model"):
        servable(CrossGETPlus())
    encoded = foveate.encode(model, CrossGETPlus(), **zoo.batch())
    assert any("also acts inside the decoder" in warning for warning in encoded.report.warnings)


# -- training


def objective(model, method, inputs):
    torch.manual_seed(0)
    return method.objective(model, {**inputs, "labels": labels_of(inputs)})


@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["none", "reentrant", "not reentrant"])
def test_where_gradients_go(checkpointing):
    """The loss of the model reaches all offsets but those after the features; the divergence reaches all, and nothing else."""
    model = zoo.load(decoder=DEEP).requires_grad_(True)
    method = bound(model, 0.1, alignment=0.0)
    inputs = zoo.batch(rows=(0, 3))
    session = foveate.attach(model, method, train=True)
    if checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
        model.train()
    loss, log = objective(model, method, inputs)
    loss.backward()
    image, text = (offsets.grad.abs().amax(1) for offsets in (method.module.image, method.module.text))
    assert (image[:4] > 0).all()
    assert image[4] == 0, "the block after the features does not feed the decoder"
    assert (text > 0).all()
    assert log["apart"] > 0
    model.zero_grad()
    with torch.enable_grad(), method.module.listening() as passed:
        model(**inputs)
    method._apart(passed).backward()
    image, text = (offsets.grad.abs().amax(1) for offsets in (method.module.image, method.module.text))
    assert (image[1:] > 0).all()
    assert image[0] == 0, "of five layers that stand beside four the first has no partner"
    assert (text > 0).all()
    others = {name for name, weight in model.named_parameters() if weight.grad is not None and weight.grad.abs().max() > 0}
    assert others == {"foveate.crossget+.image", "foveate.crossget+.text"}
    session.detach()


def test_checkpointing_gives_the_same_gradients():
    found = []
    for on in (False, True):
        model = zoo.load(decoder=DEEP).requires_grad_(False)
        model.model.multi_modal_projector.requires_grad_(True)
        method = bound(model, 0.1, alignment=0.3)
        with foveate.attach(model, method, train=True):
            if on:
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
                model.train()
            objective(model, method, zoo.batch(rows=(0, 3)))[0].backward()
            found.append([weight.grad.clone() for weight in method.module.parameters()])
        assert all(weight.grad is None for weight in model.model.vision_tower.parameters())
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_gradients_of_the_encoder_written_out():
    """An offset counts by what it does in its own block and those after it, where the copy is not carried on."""
    model, inputs = zoo.load(decoder=DEEP, dtype=torch.float64).requires_grad_(False), inputs_for()
    inputs["pixel_values"] = inputs["pixel_values"].double()
    method, seen = bound(model), []
    weights = torch.randn(2, 14, 64, generator=torch.Generator().manual_seed(1)).double()
    with foveate.attach(model, method, train=True):
        handle = model.model.multi_modal_projector.register_forward_hook(lambda _, __, out: seen.append(out))
        model(**inputs)
        handle.remove()
        (seen[-1].view(2, 14, 64) * weights).sum().backward()
    offsets, found = method.module.image.detach().double().requires_grad_(True), method.module.image.grad
    plan, tower = method.plan(4, zoo.TOKENS), model.model.vision_tower.double()
    for pixels, weight in zip(inputs["pixel_values"], weights, strict=True):
        states, *_ = written_out(tower, pixels, 4, plan, offsets)
        (model.model.multi_modal_projector(states[1:][None])[0] * weight).sum().backward()
    torch.testing.assert_close(found.double(), offsets.grad, atol=1e-4, rtol=1e-4)
    assert (found[:4].abs().amax(1) > 0).all()


def test_gradients_of_the_decoder_by_hand(model):
    """With the offset put on the first token before each layer, and nothing of the layers before it in its gradient."""
    inputs, method = zoo.batch(rows=(0,)), bound(model.requires_grad_(False))
    embeddings = spliced(model, method, inputs, 0)
    with foveate.attach(model, method, train=True):
        model(**inputs).logits[:, -3:].square().mean().backward()
    found, offsets = method.module.text.grad, method.module.text.detach().clone().requires_grad_(True)
    handles = shifted(model, offsets, 2)
    model.lm_head(model.model.language_model(inputs_embeds=embeddings).last_hidden_state)[:, -3:].square().mean().backward()
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(found, offsets.grad, atol=1e-4, rtol=1e-4)
    assert (found.abs().amax(1) > 0).all()


def test_merging_is_the_same_while_it_is_trained(model):
    """The divergence has no part in it."""
    method, inputs = bound(model), zoo.batch(rows=(0, 3))
    wanted = foveate.encode(model, method, **inputs)
    with foveate.attach(model, method, train=True) as session:
        objective(model, method, inputs)[0].backward()
        assert [image.source for image in session.report.images] == [image.source for image in wanted.report.images]
        assert session.report.kept == wanted.report.kept


def test_divergence_in_loops():
    """Of each layer and row; the mean of both comes first in both divergences."""
    image, text = torch.randn(3, 2, 5), torch.randn(3, 2, 5)
    total = 0.0
    for layer in range(3):
        for row in range(2):
            p, q = image[layer, row].softmax(0).tolist(), text[layer, row].softmax(0).tolist()
            m = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
            one, other = (sum(c * math.log(c / d) for c, d in zip(m, each, strict=True)) for each in (p, q))
            total += (one + other) / 2
    assert float(divergence(image, text)) == pytest.approx(total / 6, rel=1e-5)
    far = torch.tensor([[[40.0, 0, 0]]]), torch.tensor([[[0.0, 40, 0]]])
    assert float(divergence(*far)) > math.log(2), "it is not bounded as Jensen and Shannon's is"
    assert F.kl_div(image.log_softmax(-1), image.softmax(-1), reduction="sum") == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize(("layers", "number"), [(24, 32), (24, 40), (6, 6), (24, 6), (5, 7)])
def test_layers_are_repeated_evenly(layers, number):
    found = repeated(torch.arange(layers)[:, None], number)[:, 0].tolist()
    wanted = [i for i in range(layers) for _ in range((i + 1) * number // layers - i * number // layers)]
    assert found == wanted
    assert len(found) == number


def test_several_pictures_in_a_conversation_are_not_trained_on(model):
    method = bound(model)
    with foveate.attach(model, method, train=True), pytest.raises(foveate.InputError, match="one picture each; here are 4"):
        objective(model, method, zoo.batch())
    text = {name: value[2:3] for name, value in zoo.batch().items() if name != "pixel_values"}
    with foveate.attach(model, method, train=True):
        assert objective(model, method, text)[1] == {}


def test_steps_make_the_loss_smaller(model):
    inputs = zoo.batch(rows=(0, 3))
    method = CrossGETPlus(alignment=0.1).fresh()
    session = foveate.attach(model.requires_grad_(False), method, train=True)
    optimizer, losses = torch.optim.AdamW(session.parameters(), lr=1e-2), []
    for _ in range(10):
        loss, _ = objective(model, method, inputs)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    session.detach()
    assert losses[-1] < losses[0] - 0.02


def test_saved_loaded_and_pickled(model, tmp_path):
    method = bound(model, budget=20)
    with method(model):
        wanted = model(**zoo.batch()).logits
    method.save_pretrained(tmp_path / "cross")
    for other in (foveate.get("crossget+", weights=str(tmp_path / "cross"), budget=20), pickle.loads(pickle.dumps(method))):  # noqa: S301
        with other(model):
            assert torch.equal(model(**zoo.batch()).logits, wanted)
    assert foveate.get("crossget").trained() == ()
