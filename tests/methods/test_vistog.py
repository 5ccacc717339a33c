"""VisToG: tokens beside the patches of the encoder against a mask in one sequence, and the grouping against loops."""

import math
import pickle
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import foveate
from foveate.engine.model.anatomy import anatomy
from foveate.engine.vision.beside import check_joinable
from foveate.methods.base import ProjectorReducer
from foveate.methods.networks.grouping import Grouping, centres, chosen, divergence, empty_share
from foveate.methods.vistog import VisToG
from foveate.serving.plugin.settings import method_of
from foveate.tokens import keep_all

from .. import families, zoo
from ..engine.test_forward import labels_of

TOWERS = {
    "clip": lambda: zoo.load(decoder="llama-deep"),
    "clip, eager": lambda: zoo.load(decoder="llama-deep", attn="eager"),
    "siglip": lambda: zoo.tower("siglip"),
}


@pytest.fixture
def model():
    return zoo.load(decoder="llama-deep")


def random_weights(method, seed=5):
    """Weights of a bound method that are not the first ones, by which much is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in method.module.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) / weight.shape[-1] ** 0.5)
    return method


def bound(model, **fields):
    method = VisToG(**{"groups": 13, **fields}).fresh(3)
    foveate.encode(model, method, **zoo.batch())
    return random_weights(method)


class Asking(ProjectorReducer, name="asking", listed=False):
    """Keeps everything, and lets a test see its tokens."""

    joins_encoder = True

    def reduce(self, tokens):
        self.seen.append(tokens)
        return keep_all(tokens.features)


def asked(model):
    method = Asking()
    method.seen = []
    foveate.encode(model, method, **zoo.batch())
    (tokens,) = method.seen
    return tokens


# -- beside the patches


@pytest.mark.parametrize("tower", TOWERS)
def test_beside_the_patches_equals_a_mask_in_one_sequence(tower):
    """Through the encoder's own layers, with a mask by which nothing sees the tokens of the method."""
    model = TOWERS[tower]()
    vision, inputs = model.model.vision_tower, zoo.batch()
    tokens, number = asked(model), 7
    own = torch.randn(len(tokens.features), number, 48, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        states = vision.embeddings(inputs["pixel_values"])
        both = torch.cat([states, own], 1)
        both = vision.pre_layrnorm(both) if hasattr(vision, "pre_layrnorm") else both
        mask = torch.zeros(both.shape[1], both.shape[1])
        mask[:-number, -number:] = -math.inf
        for block in vision.encoder.layers[: len(vision.encoder.layers) - 1]:
            both = block(both, attention_mask=mask.expand(len(both), 1, -1, -1))
            both = both[0] if isinstance(both, tuple) else both
        torch.testing.assert_close(tokens.beside(own), both[:, -number:], atol=1e-5, rtol=1e-5)
        lead = states.shape[1] - zoo.TOKENS
        torch.testing.assert_close(tokens.features, both[:, lead:-number], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            tokens.beside.patches, vision.embeddings.patch_embedding(inputs["pixel_values"]).flatten(2).transpose(1, 2)
        )


def test_patches_are_what_they_are_without_it(model):
    """To the last bit, in every layer."""
    seen, handles = [], []
    for layer in model.model.vision_tower.encoder.layers:
        handles.append(layer.register_forward_hook(lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out)))
    model(**zoo.batch())
    without = list(seen)
    seen.clear()
    with bound(model)(model):
        seen.clear()
        model(**zoo.batch())
    assert len(seen) == len(without) == 5
    assert all(torch.equal(a, b) for a, b in zip(seen, without, strict=True))
    for handle in handles:
        handle.remove()


def test_tiles_see_their_own_patches():
    """Of tiles that the model lays side by side, tokens run beside the part that is no padding."""
    model, inputs = families.load("llava_next"), families.batch("llava_next")
    method = Asking()
    method.seen = []
    foveate.encode(model, method, **inputs)
    for tokens in method.seen:
        own = torch.randn(len(tokens.features), 3, tokens.features.shape[-1])
        together = tokens.beside(own)
        tap = tokens.beside.taps[0]
        assert tap.keys.shape[1] == tokens.number + 1
        assert together.shape == own.shape
    assert len({tokens.number for tokens in method.seen}) > 1


REFUSED = {
    "vipllava": "several encoder layers",
    "paligemma": "normed once more",
    "llava_onevision": "further layers",
    "qwen2_5_vl": "further layers",
    "mistral3": "further layers",
}


@pytest.mark.parametrize("family", REFUSED)
def test_models_that_tokens_cannot_join(family):
    model = families.load(family)
    with pytest.raises(foveate.UnsupportedModelError, match=REFUSED[family]):
        foveate.attach(model, VisToG(groups=3).fresh())
    with VisToG(groups=3, budget=1.0).fresh()(model):
        pass


def test_encoders_that_tokens_cannot_join():
    """Whose layers do more than attend and mix channels."""
    parts = anatomy(zoo.load())
    scaled = replace(parts, tower_kind=replace(parts.tower_kind, joined=None))
    with pytest.raises(foveate.UnsupportedModelError, match="the layers of clip_vision_model turn tokens by their places, or"):
        check_joinable(scaled, "vistog")
    check_joinable(parts, "vistog")


def test_pictures_are_encoded_once_more_only(model):
    calls = []
    handle = model.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    pictures, method = foveate.Pictures(model, **zoo.batch()), bound(model)
    calls.clear()
    for each in ("divprune", method, "prumerge+", method, method.with_budget(5)):
        found = pictures.reduce(each, **({"budget": 9} if each == "divprune" else {}))
    handle.remove()
    assert len(calls) == 3, "plain, beside the patches, with a further layer for prumerge+"
    assert torch.equal(torch.cat(found.embeds), torch.cat(foveate.encode(model, method.with_budget(5), **zoo.batch()).embeds))


def test_not_inside_vllm():
    with pytest.raises(foveate.InputError, match="runs tokens of its own through the vision encoder, which is vLLM's own"):
        method_of(SimpleNamespace(foveate={"method": "vistog", "budget": 64}))


# -- grouping


def grouping(channels=8, groups=5, seed=0):
    torch.manual_seed(seed)
    module = Grouping(groups, channels)
    for weight in module.parameters():
        nn.init.normal_(weight, std=0.5)
    return module


@pytest.mark.parametrize("assign", ["hard", "soft"])
def test_grouping_equals_loops(assign):
    """Cell by cell and group by group, as in GroupViT."""
    module, batch, cells = grouping(), 2, 12
    semantic, features = torch.randn(batch, 5, 8), torch.randn(batch, cells, 8)
    logits = module.logits(semantic, features)
    assigned = logits.softmax(1) if assign == "soft" else chosen(logits, noisy=False)
    made = module(semantic, features, assigned)
    for b in range(batch):
        keys = [module.key(module.norm_cells(cell)) for cell in features[b]]
        queries = [module.query(module.norm_groups(group)) for group in semantic[b]]
        share = torch.tensor([[float((q @ k).detach()) / math.sqrt(8) for k in keys] for q in queries])
        if assign == "soft":
            share = torch.stack([column.softmax(0) for column in share.T], 1)
        else:
            best = [max(range(5), key=lambda g, j=j: float(share[g, j])) for j in range(cells)]
            share = torch.tensor([[float(best[j] == g) for j in range(cells)] for g in range(5)])
        for g in range(5):
            total = sum(share[g, j] * module.value(features[b, j]) for j in range(cells))
            wanted = semantic[b, g] + module.out(total / (share[g].sum() + 1))
            wanted = wanted + module.mlp(module.norm_made(wanted))
            torch.testing.assert_close(made[b, g], wanted, atol=1e-5, rtol=1e-5)


def test_each_cell_is_in_one_group(model):
    method = bound(model)
    encoded = foveate.encode(model, method, **zoo.batch())
    reduction = encoded.reduction
    assert reduction.made.shape == (4, 13, 48)
    assert (reduction.attention > 0).sum(1).tolist() == [[1] * zoo.TOKENS] * 4
    sizes = (reduction.attention > 0).sum(-1)
    torch.testing.assert_close(reduction.attention.sum(-1), sizes / (sizes + 1))
    assert torch.equal(reduction.source_map(zoo.TOKENS), (reduction.attention > 0).long().argmax(1))
    assert [len(each) for each in encoded.embeds] == [13] * 4
    assert [len(each) for each in foveate.encode(model, method, **zoo.batch(rows=(3,))).embeds] == [13]


def test_an_empty_group_is_itself(model):
    module = grouping()
    semantic, features = torch.randn(1, 5, 8), torch.randn(1, 6, 8)
    assigned = torch.zeros(1, 5, 6)
    assigned[0, 2] = 1
    made = module(semantic, features, assigned)
    for g in (0, 1, 3, 4):
        alone = semantic[0, g] + module.out.bias
        torch.testing.assert_close(made[0, g], alone + module.mlp(module.norm_made(alone)))
    assert made.isfinite().all()
    assert empty_share(assigned) == pytest.approx(0.8)


def test_the_order_of_cells_does_not_matter():
    module = grouping()
    semantic, features, order = torch.randn(2, 5, 8), torch.randn(2, 12, 8), torch.randperm(12)
    one, other = (module.logits(semantic, each) for each in (features, features[:, order]))
    assert torch.equal(chosen(one, noisy=False)[..., order], chosen(other, noisy=False))
    made = module(semantic, features, chosen(one, noisy=False))
    torch.testing.assert_close(module(semantic, features[:, order], chosen(other, noisy=False)), made)


def test_first_outputs_are_the_semantic_tokens_as_the_encoder_made_them(model):
    method = VisToG(groups=13).fresh(3)
    encoded = foveate.encode(model, method, **zoo.batch())
    tokens = asked(model)
    with torch.no_grad():
        wanted = model.model.multi_modal_projector(tokens.beside(method.module.tokens.expand(4, -1, -1)))
    torch.testing.assert_close(torch.stack(encoded.embeds), wanted)
    assert len(torch.cat(encoded.embeds).unique(dim=0)) == 4 * 13, "of every picture others"


# -- training


def test_the_choice_in_training_passes_gradients_straight_through():
    """One group for each cell, drawn by Gumbel noise; the gradient is that of the softmax of the same noise."""
    logits, weight = torch.randn(2, 4, 6, requires_grad=True), torch.randn(2, 4, 6)
    torch.manual_seed(3)
    drawn = chosen(logits, noisy=True)
    (drawn * weight).sum().backward()
    assert (drawn.round() == F.one_hot(drawn.argmax(1), 4).mT).all()
    torch.manual_seed(3)
    noise = -torch.empty_like(logits).exponential_().log()
    again = logits.detach().clone().requires_grad_(True)
    soft = (again + noise).softmax(1)
    assert torch.equal(soft.argmax(1), drawn.argmax(1))
    (soft * weight).sum().backward()
    torch.testing.assert_close(logits.grad, again.grad)
    assert not torch.equal(chosen(logits, noisy=True).argmax(1), chosen(logits, noisy=True).argmax(1))


def test_divergence_from_equal_shares():
    equal = torch.full((2, 4, 6), 0.25)
    assert float(divergence(equal)) == pytest.approx(0, abs=1e-6)
    one = torch.zeros(2, 4, 6)
    one[:, 1] = 1
    assert float(divergence(one)) == pytest.approx(math.log(4))
    mean = torch.tensor([0.5, 0.3, 0.2])
    wanted = sum(p * math.log(p / (1 / 3)) for p in mean.tolist())
    assert float(divergence(mean[None, :, None].expand(2, -1, 5))) == pytest.approx(wanted)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("assign", ["hard", "soft"])
def test_gradients(model, assign, checkpointing):
    """They reach all of the module, and nothing of the frozen tower; a checkpointed decoder gives the same ones."""
    found = []
    for on in (False, checkpointing):
        model = zoo.load(decoder="llama-deep").requires_grad_(False)
        model.model.multi_modal_projector.requires_grad_(True)
        method = bound(model, assign=assign)
        session = foveate.attach(model, method, train=True)
        if on:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.train()
        inputs = zoo.batch()
        torch.manual_seed(0)
        loss, log = method.objective(model, {**inputs, "labels": labels_of(inputs)})
        loss.backward()
        assert 0 <= log["empty"] < 1
        assert log["uneven"] >= 0
        found.append({name: weight.grad.clone() for name, weight in method.module.named_parameters()})
        assert all(float(grad.abs().max()) > 0 for grad in found[-1].values())
        assert model.model.multi_modal_projector.linear_1.weight.grad is not None
        assert all(weight.grad is None for weight in model.model.vision_tower.parameters())
        session.detach()
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad)


def test_balance_is_part_of_the_loss(model):
    inputs = zoo.batch()
    batch, losses = {**inputs, "labels": labels_of(inputs)}, []
    for balance in (0.0, 1e4):
        method = bound(model, balance=balance)
        with torch.no_grad(), foveate.attach(model, method):
            loss, log = method.objective(model, batch)
            losses.append(loss.item())
    assert log["uneven"] > 0
    assert losses[1] - losses[0] == pytest.approx(1e4 * log["uneven"], rel=1e-3)
    assert method.module.heard is None


def test_steps_make_the_loss_smaller(model):
    inputs = zoo.batch()
    batch = {**inputs, "labels": labels_of(inputs)}
    method = VisToG(groups=13, balance=0.0).fresh(3)
    session = foveate.attach(model.requires_grad_(False), method, train=True)
    optimizer, losses = torch.optim.AdamW(session.parameters(), lr=1e-2), []
    for _ in range(12):
        loss, _ = method.objective(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    session.detach()
    assert losses[-1] < losses[0] - 0.05


def test_centres_equal_k_means_in_loops():
    points = torch.randn(40, 3, generator=torch.Generator().manual_seed(2)) + 1
    wanted = [points[round(39 * i / 3 - 0.49)] for i in range(4)]
    for _ in range(20):
        groups = [[] for _ in range(4)]
        for point in points:
            alike = [float(F.cosine_similarity(point, centre, dim=0)) for centre in wanted]
            groups[alike.index(max(alike))].append(point)
        wanted = [torch.stack(group).mean(0) if group else centre for group, centre in zip(groups, wanted, strict=True)]
    torch.testing.assert_close(centres(points, 4), torch.stack(wanted))
    same = torch.ones(6, 2)
    assert torch.equal(centres(same, 3), same[:3]), "empty clusters keep their centres"


def test_first_values_from_training_pictures(model):
    method = VisToG(groups=5).fresh(3)
    session = foveate.attach(model, method, train=True)
    inputs, taken = zoo.batch(), []

    def batches():
        for number in range(400):
            taken.append(number)
            yield {**inputs, "labels": labels_of(inputs)}

    before = method.module.tokens.detach().clone()
    method.initialise(model, batches())
    assert len(taken) == 50, "of 4 pictures each; 200 are enough"
    patches = model.model.vision_tower.embeddings.patch_embedding(inputs["pixel_values"]).flatten(2).transpose(1, 2).flatten(0, 1)
    assert not torch.equal(method.module.tokens, before)
    torch.testing.assert_close(method.module.tokens.detach(), centres(patches.detach().repeat(50, 1), 5), atol=1e-4, rtol=1e-4)
    assert method.module.tokens.requires_grad
    before = method.module.tokens.detach().clone()
    method.initialise(model, [])
    assert torch.equal(method.module.tokens, before)
    session.detach()


# -- counts, weights


def test_counts(model):
    method = bound(model)
    assert method.at_budget(7, zoo.TOKENS, 4).budget == 7
    with pytest.raises(foveate.InputError, match="vistog: 20 of 64 visual tokens cannot be had; the nearest it can do is 13"):
        method.at_budget(20, zoo.TOKENS, 4)
    with pytest.raises(foveate.InputError, match="budget=20 asks for 20 of 64 tokens, and it has 13 semantic tokens"):
        foveate.encode(model, method.with_budget(20), **zoo.batch())
    with pytest.raises(foveate.InputError, match="groups=0"):
        VisToG(groups=0)
    few = foveate.encode(model, method.with_budget(7), **zoo.batch()).report
    assert few.after == [7] * 4
    assert "vistog: 7 of its 13 semantic tokens, which were trained together" in few.notes
    assert "a reconstruction" in few.notes[0]
    whole = foveate.encode(model, bound(model, groups=64), **zoo.batch())
    assert whole.report.after == [zoo.TOKENS] * 4
    assert torch.equal(torch.cat(whole.embeds), torch.cat(foveate.encode(model, "full", **zoo.batch()).embeds))


def test_original_positions_put_the_outputs_in_the_order_of_their_cells(model):
    method = bound(model)
    compact, original = (
        foveate.encode(model, method.with_fields(positions=each), **zoo.batch()) for each in ("compact", "original")
    )
    for one, other in zip(compact.report.images, original.report.images, strict=True):
        assert sorted(one.kept) == other.kept
        assert one.kept != other.kept
    by = compact.reduction.index.argsort(1)
    torch.testing.assert_close(original.reduction.made, compact.reduction.made.gather(1, by[..., None].expand(-1, -1, 48)))


def test_saved_loaded_and_pickled(model, tmp_path):
    method = bound(model, assign="soft")
    wanted = torch.cat(foveate.encode(model, method, **zoo.batch()).embeds)
    method.save_pretrained(tmp_path / "vistog")
    loaded = foveate.get("vistog", weights=str(tmp_path / "vistog"))
    assert (loaded.groups, loaded.assign) == (13, "soft")
    for other in (loaded, pickle.loads(pickle.dumps(method))):  # noqa: S301
        assert torch.equal(torch.cat(foveate.encode(model, other, **zoo.batch()).embeds), wanted)
    with pytest.raises(foveate.InputError, match=r"groups=20, and .* was trained with 13"):
        VisToG(weights=str(tmp_path / "vistog"), groups=20)
