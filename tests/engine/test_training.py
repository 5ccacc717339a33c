"""Training the weights of a method: gradients, the model it is registered on, checkpoints, conversations."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import DynamicCache

import foveate
from foveate.methods.compose import Compose

from .. import reference, zoo
from ..trained_methods import Gate, Learnt, Mixer
from .test_forward import labels_of


@pytest.fixture
def model():
    return zoo.load()


def loss_of(model, inputs):
    return model(**inputs, labels=labels_of(inputs)).loss


@pytest.mark.parametrize("space", ["features", "decoder"])
def test_steps_make_the_loss_smaller(model, space):
    """Gradients reach the module through forward, and nothing of the model changes."""
    inputs, before = zoo.batch(), {name: value.clone() for name, value in model.state_dict().items()}
    session = foveate.attach(model, Learnt(space=space).fresh(), train=True)
    optimizer = torch.optim.AdamW(session.parameters(), lr=3e-3)
    losses, names = [], set()
    for _ in range(12):
        loss = loss_of(model, inputs)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
        names.add(session.method.settings()["weights"])
    assert losses[-1] < losses[0] - 0.05
    assert len(names) == 12, "no cache survives a step"
    trained = session.method.settings()["weights"]
    assert trained.startswith("training:")
    session.detach()
    assert session.method.settings()["weights"].startswith("memory@")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with session.method(model), torch.no_grad():
        assert float(loss_of(model, inputs)) < losses[0] - 0.05


def test_gradients_equal_those_of_a_loop_by_hand(model):
    """The method's outputs put into the prompt by hand, and the same loss."""
    inputs = zoo.batch(rows=(0,))
    session = foveate.attach(model, Learnt().fresh(), train=True)
    loss_of(model, inputs).backward()
    found = {name: value.grad.clone() for name, value in session.method.module.named_parameters()}
    session.detach()
    module = session.method.module.requires_grad_(True)
    module.zero_grad()
    features = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[-2][:, 1:]
    made, attention = module(features, 8)
    order = torch.tensor(reference_anchors(attention[0])).argsort()
    visual = model.model.multi_modal_projector(made[:, order])[0]
    ids, labels = inputs["input_ids"][0], labels_of(inputs)[0]
    place = int((ids == zoo.IMAGE).nonzero()[0])
    embeddings = model.get_input_embeddings()(ids[ids != zoo.IMAGE])
    embeddings = torch.cat([embeddings[:place], visual, embeddings[place:]])[None]
    words = labels[ids != zoo.IMAGE]
    short = torch.cat([words[:place], torch.full((8,), -100), words[place:]])[None]
    model(inputs_embeds=embeddings, labels=short).loss.backward()
    for name, value in module.named_parameters():
        torch.testing.assert_close(found[name], value.grad, atol=1e-5, rtol=1e-3)


def reference_anchors(attention):
    free, found = set(range(attention.shape[1])), {}
    for output in sorted(range(len(attention)), key=lambda m: -float(attention[m].max())):
        found[output] = max(free, key=lambda cell: float(attention[output][cell]))
        free.remove(found[output])
    return [found[output] for output in range(len(attention))]


def test_the_submodule(model):
    """Optimizers and wrappers find it; checkpoints of the model do not hold it, and are loaded without a word."""
    before = set(model.state_dict())

    def around():
        hooks = len(model._state_dict_hooks), len(model._load_state_dict_post_hooks)
        return sorted(model.__dict__), sorted(model._modules), hooks

    attributes = around()
    session = foveate.attach(model, Learnt().fresh(), train=True)
    named = {name for name, _ in model.named_parameters() if name.startswith("foveate.")}
    assert named == {f"foveate.learnt.{name}" for name, _ in session.method.module.named_parameters()}
    assert set(model.state_dict()) == before
    assert model.load_state_dict(model.state_dict(), strict=True).missing_keys == []
    wrapped = torch.nn.Sequential(model)
    assert not any("foveate" in name for name in wrapped.state_dict())
    wrapped.load_state_dict(wrapped.state_dict(), strict=True)
    model.train()
    assert session.method.module.training
    model.eval()
    assert not session.method.module.training
    with pytest.raises(foveate.InputError, match="attached to this model already"):
        foveate.attach(model, Gate().fresh(), train=True)
    session.detach()
    assert around() == attributes
    assert not any(parameter.requires_grad for parameter in session.method.module.parameters())


def test_saved_without_the_submodule(model, tmp_path):
    with foveate.attach(model, Learnt().fresh(), train=True):
        model.save_pretrained(tmp_path)
    again, told = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not told["unexpected_keys"]
    assert not told["missing_keys"]
    assert set(again.state_dict()) == set(model.state_dict())


def test_nothing_to_train(model):
    before = sorted(model.__dict__)
    with pytest.raises(foveate.InputError, match="'prumerge' has nothing to train"):
        foveate.attach(model, "prumerge", train=True)
    with pytest.raises(foveate.InputError, match="has no weights"):
        foveate.attach(model, "learnt", train=True)
    model.foveate = 3
    with pytest.raises(foveate.InputError, match="has a part called 'foveate' already"):
        foveate.attach(model, Learnt().fresh(), train=True)
    del model.foveate
    assert sorted(model.__dict__) == before
    session = foveate.attach(model, "prumerge")
    assert [*session.parameters()] == []
    with pytest.raises(foveate.InputError, match="has no weights that could be"):
        session.save_weights("nowhere")
    session.detach()


def test_behind_peft(model):
    """PEFT freezes what is there; what is attached afterwards is trained beside the adapter."""
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=r".*language_model.*q_proj"))
    session = foveate.attach(adapted, Learnt().fresh(), train=True)
    loss_of(adapted, zoo.batch()).backward()
    grads = {name for name, value in adapted.named_parameters() if value.grad is not None and value.grad.abs().sum() > 0}
    assert any("lora_B" in name for name in grads)
    assert any("foveate.learnt" in name for name in grads)
    assert all("lora" in name or "foveate" in name for name in grads)
    assert not any("foveate" in name for name in adapted.state_dict())
    session.detach()


def test_two_trained_parts(model, tmp_path):
    """Each is saved into a folder of its own, and read again in the middle of training."""
    method = Compose(Learnt().fresh(1), Gate().fresh(2))
    session = foveate.attach(model, method, train=True)
    assert {name.split(".")[1] for name, _ in model.named_parameters() if name.startswith("foveate.")} == {"learnt", "gate"}
    session.save_weights(tmp_path, training={"steps": 0})
    assert {path.name for path in tmp_path.iterdir()} == {"learnt", "gate"}
    start = [value.clone() for value in session.parameters()]
    with torch.no_grad():
        for value in session.parameters():
            value.add_(1)
    session.load_weights(tmp_path)
    assert all(torch.equal(*pair) for pair in zip(start, session.parameters(), strict=True))
    assert all(value.requires_grad for value in session.parameters())
    session.detach()
    again = Compose(Learnt.from_pretrained(tmp_path / "learnt"), Gate.from_pretrained(tmp_path / "gate"))
    with method(model):
        wanted = model(**zoo.batch()).logits
    with again(model) as session:
        assert torch.equal(model(**zoo.batch()).logits, wanted)
    with pytest.raises(foveate.InputError, match=r"there is no folder .*gate/learnt"):
        session.load_weights(tmp_path / "gate")
    fields = method.settings()["methods"]
    assert [each["weights"].partition("@")[0] for each in fields] == ["memory", "memory"]


# -- inside the decoder


def test_gradients_inside_the_decoder(model):
    """Of a method that mixes tokens there: as in a decoder whose last two layers are run on the mixtures by hand."""
    inputs = zoo.batch(rows=(0,))
    session = foveate.attach(model, Mixer().fresh(5), train=True)
    model(**inputs).logits[0, -5:].square().sum().backward()
    found = {name: value.grad.clone() for name, value in session.method.module.named_parameters()}
    early = model.model.language_model.layers[0].mlp.up_proj.weight.grad.clone()
    session.detach()
    module, ids = session.method.module.requires_grad_(True), inputs["input_ids"]
    module.zero_grad()
    model.zero_grad()
    visual = (ids[0] == zoo.IMAGE).nonzero().flatten()
    columns = torch.tensor([c for c in range(ids.shape[1]) if c not in visual[2:].tolist()])

    def mixed(hidden):
        mix = module(hidden[0, visual]).softmax(0).T
        rows = hidden[0].index_copy(0, visual[:2], mix @ hidden[0, visual])
        return rows[columns][None]

    def by_hand(number):
        def before(_, args, kwargs):
            hidden = args[0] if args else kwargs["hidden_states"]
            rotary = tuple(part[:, columns] for part in kwargs["position_embeddings"])
            kwargs = {**kwargs, "position_embeddings": rotary, "position_ids": None, "attention_mask": None}
            return (mixed(hidden) if number == 2 else hidden, *args[1:]), kwargs

        return before

    layers = model.model.language_model.layers
    handles = [layers[number].register_forward_pre_hook(by_hand(number), with_kwargs=True) for number in (2, 3)]
    features = model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output[0]
    embeddings = model.get_input_embeddings()(ids).masked_scatter((ids == zoo.IMAGE)[..., None], features)
    out = model.model.language_model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
    model.lm_head(out)[0, -5:].square().sum().backward()
    for handle in handles:
        handle.remove()
    for name, value in module.named_parameters():
        torch.testing.assert_close(found[name], value.grad, atol=1e-5, rtol=1e-3)
    assert found["weight"].abs().max() > 1e-3
    torch.testing.assert_close(early, layers[0].mlp.up_proj.weight.grad, atol=1e-4, rtol=1e-3)
    model.zero_grad()


def test_others_do_not_learn_there(model, monkeypatch):
    heard = reference.overheard(Gate, monkeypatch)
    with Gate().fresh()(model):
        loss_of(model, zoo.batch()).backward()
    assert not heard[0][0].hidden.requires_grad
    model.zero_grad()


def test_checkpointing_is_refused_where_cuts_learn():
    model = zoo.load().train()
    model.gradient_checkpointing_enable()
    with Mixer().fresh()(model), pytest.raises(foveate.UnsupportedModelError, match="gradient checkpointing"):
        loss_of(model, zoo.batch())


def test_a_gate_reads_the_text_of_the_prompt(model, monkeypatch):
    """All text after the first picture up to the last token of the prompt: special tokens too, no padding, no picture."""
    heard = reference.overheard(Gate, monkeypatch)
    inputs = zoo.batch("left")
    with Gate().fresh()(model):
        model.generate(**inputs, max_new_tokens=1)
    tokens = heard[0][0]
    for row, ids in enumerate(inputs["input_ids"].tolist()):
        pictures = [column for column, token in enumerate(ids) if token == zoo.IMAGE]
        after = [c for c in range(len(ids)) if pictures and c > pictures[0] and ids[c] != zoo.IMAGE]
        assert tokens.prompt_text[row].nonzero().flatten().tolist() == after
        assert set(tokens.question[row].nonzero().flatten().tolist()) <= set(after)


def test_nobody_is_asked_about_prompts_without_visual_tokens(model, monkeypatch):
    heard = reference.overheard(Gate, monkeypatch)
    method = Gate().fresh()
    with method(model) as session:
        with torch.no_grad():
            for gate in method.module:
                gate.weight.zero_()
                gate.weight[1] = torch.linspace(-1, 1, gate.weight.shape[1])  # leave where this is positive
            method.module[0].weight.copy_(method.module[0].weight.abs() * 0)
        model.generate(**zoo.batch(), max_new_tokens=1)
        for tokens, _ in heard[1:]:
            assert tokens.visual.any()
        assert len(session.report.layers) == 4


# -- conversations


def test_a_conversation_behind_a_gate(monkeypatch):
    """A second turn on the cache, against the whole conversation in an unmodified model, masked."""
    model, plain = zoo.load(dtype=torch.float64), zoo.load(attn="eager", dtype=torch.float64)
    heard = reference.overheard(Gate, monkeypatch)
    first = zoo.batch(rows=(0,), dtype=torch.float64)
    options = dict(max_new_tokens=3, min_new_tokens=3, do_sample=False, suppress_tokens=[zoo.IMAGE], return_dict_in_generate=True)
    with Gate().fresh(8)(model):
        cache = DynamicCache(config=model.config.get_text_config())
        out = model.generate(**first, **options, past_key_values=cache)
        asked = len(heard)
        cuts = {layer: cut.left for layer, cut in reference.cuts_of_row(heard, 0, 0).items()}
        ids = torch.cat([out.sequences, torch.tensor([zoo.prompt(0, 7, 0, seed=9)])], 1)
        turn = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), **options, past_key_values=cache, output_logits=True
        )
    assert len(heard) == asked, "a turn without pictures asks no gate"
    width = first["input_ids"].shape[1]
    assert any(len(left) < width for left in cuts.values())
    embeddings = model.get_input_embeddings()(ids)
    features = model.get_image_features(first["pixel_values"], return_dict=True).pooler_output[0]
    embeddings = embeddings.masked_scatter((ids == zoo.IMAGE)[..., None], features)
    later = range(width, ids.shape[1])
    left = {layer: [*kept, *later] for layer, kept in cuts.items()}
    wanted = reference.Masked(plain, left, ids.shape[1], False).logits(embeddings, turn.sequences[0, -3:].tolist())
    torch.testing.assert_close(torch.stack(turn.logits, 1)[0], wanted.float(), atol=1e-5, rtol=1e-5)


def test_a_conversation_behind_learnt_tokens(model):
    """Against starting anew with the whole conversation."""
    first = zoo.batch(rows=(0,))
    options = dict(max_new_tokens=3, min_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_logits=True)
    with Learnt().fresh()(model):
        cache = DynamicCache(config=model.config.get_text_config())
        out = model.generate(**first, **options, past_key_values=cache)
        ids = torch.cat([out.sequences, torch.tensor([zoo.prompt(0, 7, 0, seed=9)])], 1)
        turn = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options, past_key_values=cache)
        fresh = model.generate(input_ids=ids, pixel_values=first["pixel_values"], **options)
    torch.testing.assert_close(torch.stack(turn.logits), torch.stack(fresh.logits), atol=3e-4, rtol=3e-4)
    with Learnt().fresh(1)(model), pytest.raises(foveate.CacheError):
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options, past_key_values=cache)
