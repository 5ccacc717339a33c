"""Direct calls of the model: logits, labels, gradients, decoding by hand, Trainer, pipeline, PEFT, accelerate."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from PIL import Image
from transformers import DynamicCache, Trainer, TrainingArguments, pipeline

import foveate
from foveate.engine.install import installed_on

from .. import reference, zoo


@pytest.fixture(scope="module")
def model():
    return zoo.load()


def labels_of(inputs):
    labels = inputs["input_ids"].clone()
    labels[(labels == zoo.IMAGE) | (inputs["attention_mask"] == 0) | (labels == 1)] = -100
    return labels


@pytest.mark.parametrize("positions", ["compact", "original"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_equal_the_spliced_prompt(model, side, positions):
    inputs = zoo.batch(side)
    method = foveate.PruMergePlus(positions=positions)
    encoded = foveate.encode(model, method, **inputs)
    with torch.no_grad(), method(model) as session:
        logits = model(**inputs).logits
    for row in range(4):
        mine = [i for i, image in enumerate(session.report.images) if image.row == row]
        kept, embeds = [session.report.images[i].kept for i in mine], [encoded.embeds[i] for i in mine]
        spliced, places = reference.spliced_embeddings(model, inputs, row, kept, embeds, zoo.IMAGE)
        places = torch.arange(spliced.shape[1])[None] if positions == "compact" else places
        mask = reference.causal_mask(model, spliced.shape[1])
        hidden = model.get_decoder()(inputs_embeds=spliced, position_ids=places, attention_mask=mask, use_cache=False)
        expected = model.lm_head(hidden.last_hidden_state)[0]
        got = reference.row_end(logits, inputs, row, len(expected))
        torch.testing.assert_close(got, expected, atol=3e-4, rtol=3e-4)


def test_encode_gives_another_engine_all_it_needs(model):
    """Embeddings, ids, mask and positions from ``encode`` through the bare decoder equal the attached model."""
    for positions in ("compact", "original"):
        method, inputs = foveate.PruMergePlus(positions=positions), zoo.batch("left")
        encoded = foveate.encode(model, method, **inputs)
        ids = encoded.inputs["input_ids"]
        embeds = model.get_input_embeddings()(ids)
        embeds = embeds.masked_scatter((ids == zoo.IMAGE)[..., None], torch.cat(encoded.embeds))
        out = model.get_decoder()(
            inputs_embeds=embeds, attention_mask=encoded.inputs["attention_mask"], position_ids=encoded.inputs["position_ids"]
        )
        with torch.no_grad(), method(model) as session:
            expected = model(**inputs).logits
        real = encoded.inputs["attention_mask"].bool()
        torch.testing.assert_close(model.lm_head(out.last_hidden_state)[real], expected[real], atol=3e-4, rtol=3e-4)
        assert [len(e) for e in encoded.embeds] == session.report.after
        assert torch.equal(encoded.reduction.index, session.report.reduction.index)


def test_labels_follow_the_prompt(model):
    """The loss is the mean over text tokens of the spliced rows, whatever the padding."""
    losses = []
    with foveate.PruMergePlus()(model):
        for side in ("left", "right"):
            inputs = zoo.batch(side)
            out = model(**inputs, labels=labels_of(inputs))
            losses.append(out.loss)
        total = count = 0
        for row in range(4):
            inputs = zoo.batch(rows=(row,))
            labels = labels_of(inputs)
            out = model(**inputs, labels=labels)
            kept = labels[0, 1:][labels[0, 1:] != -100]
            total, count = total + out.loss * len(kept), count + len(kept)
    torch.testing.assert_close(losses[1], total / count, atol=1e-4, rtol=1e-4)
    # with left padding transformers also scores the first real token, which padding "predicts": it is <s> here, and has no label
    torch.testing.assert_close(losses[0], losses[1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "method", [foveate.PruMergePlus(), foveate.PruMergePlus.released(iqr_scope="image"), foveate.Pool(budget=9)]
)
def test_gradients_reach_the_encoder_and_equal_the_spliced_prompt(method):
    model = zoo.load()
    inputs = zoo.batch("right", rows=(1,))
    labels = labels_of(inputs)
    with method(model) as session:
        model(**inputs, labels=labels).loss.backward()
    weight = model.model.vision_tower.encoder.layers[0].mlp.fc1.weight
    got, projector = weight.grad.clone(), model.model.multi_modal_projector.linear_1.weight.grad.clone()
    model.zero_grad()
    # by hand: the encoder's own features, the merge matrix, the projector, the spliced prompt
    hidden = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[-2][:, 1:]
    merged = session.report.reduction.apply(hidden)
    valid = session.report.reduction.mask()
    embeds = [model.model.multi_modal_projector(merged[i][valid[i]]) for i in range(2)]
    kept = [image.kept for image in session.report.images]
    spliced, _ = reference.spliced_embeddings(model, inputs, 0, kept, embeds, zoo.IMAGE)
    logits = model.lm_head(model.get_decoder()(inputs_embeds=spliced, use_cache=False).last_hidden_state)[0]
    ids = inputs["input_ids"][0]
    targets = labels[0][(ids != zoo.IMAGE)]
    short = torch.full((len(logits),), -100)
    spots, at, run = [], 0, 0
    for i, token in enumerate(ids.tolist()):  # where the text tokens are in the spliced prompt
        if token != zoo.IMAGE:
            spots.append(at)
            at += 1
        elif i == 0 or ids[i - 1] != zoo.IMAGE:
            at += len(kept[run])
            run += 1
    short[torch.tensor(spots)] = targets
    torch.nn.functional.cross_entropy(logits[:-1], short[1:]).backward()
    torch.testing.assert_close(got, weight.grad, atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(projector, model.model.multi_modal_projector.linear_1.weight.grad, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("positions", ["compact", "original"])
@pytest.mark.parametrize("full_mask", [True, False, None], ids=["mask of the full prompt", "mask of the short prompt", "no mask"])
def test_decoding_by_hand_equals_generate(model, full_mask, positions):
    inputs = zoo.batch(rows=(1,))
    steps = 4
    with torch.no_grad(), foveate.PruMergePlus(positions=positions)(model) as session:
        expected = model.generate(
            **inputs,
            max_new_tokens=steps,
            min_new_tokens=steps,
            do_sample=False,
            suppress_tokens=[zoo.IMAGE],
            return_dict_in_generate=True,
            output_logits=True,
        )
        cache = DynamicCache(config=model.config.get_text_config())
        out = model(**inputs, past_key_values=cache, use_cache=True)
        logits, mask = [out.logits[:, -1]], inputs["attention_mask"]
        if full_mask is False:
            mask = torch.ones(1, out.logits.shape[1], dtype=torch.long)
        for token in expected.sequences[0, -steps:-1]:
            mask = torch.cat([mask, torch.ones(1, 1, dtype=torch.long)], 1)
            given = {} if full_mask is None else {"attention_mask": mask}
            out = model(input_ids=token.view(1, 1), past_key_values=cache, **given)
            logits.append(out.logits[:, -1])
    torch.testing.assert_close(torch.stack(logits), torch.stack(expected.logits), atol=3e-4, rtol=3e-4)
    assert cache.get_seq_length() == sum(session.report.after) + int((inputs["input_ids"] != zoo.IMAGE).sum()) + steps - 1


def test_an_image_only_at_the_second_call_of_a_conversation_by_hand(model):
    text, picture = torch.tensor([[1, 20, 21, 22]]), torch.tensor([zoo.prompt(1, 2, 3, 5)[1:]])
    with torch.no_grad(), foveate.PruMergePlus()(model):
        whole = model(input_ids=torch.cat([text, picture], 1), pixel_values=zoo.pictures(1)).logits
        cache = DynamicCache(config=model.config.get_text_config())
        model(input_ids=text, past_key_values=cache, use_cache=True)
        later = model(input_ids=picture, pixel_values=zoo.pictures(1), past_key_values=cache).logits
    torch.testing.assert_close(later, whole[:, 4:], atol=3e-4, rtol=3e-4)


def test_positional_arguments(model):
    inputs = zoo.batch(rows=(0,))
    with torch.no_grad(), foveate.PruMergePlus()(model):
        by_name = model(**inputs).logits
        by_place = model(inputs["input_ids"], inputs["pixel_values"], inputs["attention_mask"]).logits
    assert torch.equal(by_name, by_place)


class Rows(torch.utils.data.Dataset):
    """Samples as a collator leaves them: same length, so that the default one can stack them."""

    def __init__(self, number=4):
        self.rows = [zoo.prompt(1, 3, 6, seed) for seed in range(number)]
        self.pictures = zoo.pictures(number)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        ids = torch.tensor(self.rows[i])
        mask = torch.ones_like(ids)
        labels = torch.where(ids == zoo.IMAGE, -100, ids)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels, "pixel_values": self.pictures[i]}


def trainer(model, folder, steps=3):
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=2,
        report_to=[],
        use_cpu=True,
        learning_rate=1e-3,
        save_strategy="no",
        logging_steps=1,
        seed=0,
        dataloader_pin_memory=False,
        lr_scheduler_type="constant",
    )
    return Trainer(model=model, args=arguments, train_dataset=Rows(), eval_dataset=Rows())


def test_trainer(tmp_path):
    """Unchanged Trainer: fewer tokens, falling loss, saving and evaluating; with keep-all the weights come out identical."""
    plain, same, reduced = zoo.load(), zoo.load(), zoo.load()
    trainer(plain, tmp_path).train()
    with foveate.PruMergePlus(budget=1.0)(same):
        trainer(same, tmp_path).train()
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), same.parameters(), strict=True))
    with foveate.PruMergePlus()(reduced) as session:
        runner = trainer(reduced, tmp_path, steps=12)
        before = runner.evaluate()["eval_loss"]
        runner.train()
        assert runner.evaluate()["eval_loss"] < before
        assert sum(session.report.after) < sum(session.report.before)
        runner.save_model(str(tmp_path / "saved"))
    loaded = type(reduced).from_pretrained(tmp_path / "saved")
    assert all(torch.equal(a, b) for a, b in zip(reduced.parameters(), loaded.parameters(), strict=True))


def test_gradient_checkpointing_gives_the_same_gradients():
    model, inputs = zoo.load(), zoo.batch("right")
    model.train()
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        with foveate.PruMergePlus()(model):
            model(**inputs, labels=labels_of(inputs)).loss.backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_peft():
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    base, inputs = zoo.load(), zoo.batch()
    wrapped = get_peft_model(copy.deepcopy(base), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).eval()
    plain = wrapped.generate(**inputs, max_new_tokens=4, do_sample=False)
    with foveate.PruMergePlus(budget=1.0)(wrapped):
        assert torch.equal(plain, wrapped.generate(**inputs, max_new_tokens=4, do_sample=False))
    with foveate.PruMergePlus()(wrapped) as session:
        adapted = wrapped.generate(**inputs, max_new_tokens=4, do_sample=False)
        counts = session.report.after
        with wrapped.disable_adapter():
            without = wrapped.generate(**inputs, max_new_tokens=4, do_sample=False)
        wrapped.train()
        loss = wrapped(**inputs, labels=labels_of(inputs)).loss
        loss.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for n, p in wrapped.named_parameters() if "vision_tower" in n)
    with foveate.PruMergePlus()(base) as session:
        assert torch.equal(without, base.generate(**inputs, max_new_tokens=4, do_sample=False))
    merged = wrapped.eval().merge_and_unload()
    with foveate.PruMergePlus()(merged) as session:
        assert torch.equal(adapted, merged.generate(**inputs, max_new_tokens=4, do_sample=False))
        assert session.report.after == counts
    # attached first, wrapped in LoRA afterwards
    later = copy.deepcopy(base)
    handle = foveate.attach(later, "prumerge+")
    model = get_peft_model(later, LoraConfig(r=4, target_modules="all-linear")).eval()
    assert torch.equal(without, model.generate(**inputs, max_new_tokens=4, do_sample=False))
    handle.detach()


def test_device_map():
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(zoo.saved("llava", "llama"), device_map={"": "cpu"}).eval()
    inputs = zoo.batch()
    with foveate.PruMergePlus()(model), foveate.PruMergePlus()(zoo.load()) as other:
        assert torch.equal(
            model.generate(**inputs, max_new_tokens=3, do_sample=False),
            other.model.generate(**inputs, max_new_tokens=3, do_sample=False),
        )


def test_parts_on_disk(tmp_path):
    """Weights that accelerate brings in when a part runs: nothing is on a device in between."""
    from transformers import AutoModelForImageTextToText

    places = {"model.vision_tower": "disk", "model.multi_modal_projector": "cpu", "model.language_model": "disk", "lm_head": "cpu"}
    model = AutoModelForImageTextToText.from_pretrained(
        zoo.saved("llava", "llama"), device_map=places, offload_folder=str(tmp_path)
    ).eval()
    assert any(p.is_meta for p in model.model.vision_tower.parameters())
    inputs, options = zoo.batch(), dict(max_new_tokens=3, do_sample=False)
    with foveate.PruMergePlus()(model) as offloaded, foveate.PruMergePlus()(zoo.load()) as whole:
        assert torch.equal(model.generate(**inputs, **options), whole.model.generate(**inputs, **options))
        assert offloaded.report.after == whole.report.after


def test_copies_and_saving_of_an_attached_model(tmp_path):
    model, inputs = zoo.load(), zoo.batch()
    names = set(model.state_dict())
    with foveate.PruMergePlus()(model) as session:
        clone = copy.deepcopy(model)
        out = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        counts = session.report.after
        session.report = None
        assert torch.equal(out, clone.generate(**inputs, max_new_tokens=3, do_sample=False))
        assert session.report is None, "the copy has a session of its own"
        assert set(model.state_dict()) == names
        model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert "generate" not in loaded.__dict__
    with foveate.PruMergePlus()(loaded) as again:
        assert torch.equal(out, loaded.generate(**inputs, max_new_tokens=3, do_sample=False))
        assert again.report.after == counts


@pytest.mark.parametrize("method", [foveate.PruMergePlus(), foveate.Compose(foveate.PruMerge(), foveate.FastV(budget=0.5))])
def test_a_pickle_of_an_attached_model(method):
    """Processes that are started get models so."""
    model, inputs = zoo.load(), zoo.batch()
    with method(model) as session:
        twin = pickle.loads(pickle.dumps(model))  # noqa: S301
        again = pickle.loads(pickle.dumps(session))  # noqa: S301
        out, full = model.generate(**inputs, max_new_tokens=3, do_sample=False), session.report.after
    plain = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    for copied in (twin, again.model):
        assert torch.equal(out, copied.generate(**inputs, max_new_tokens=3, do_sample=False))
        assert installed_on(copied).sessions[-1].report.after == full
        assert torch.equal(copied(**inputs).logits[:, -1].argmax(-1), out[:, inputs["input_ids"].shape[1]])
        foveate.detach(copied)
        assert "generate" not in copied.__dict__
        assert torch.equal(plain, copied.generate(**inputs, max_new_tokens=3, do_sample=False))


def test_pipeline():
    """The image-text-to-text pipeline of transformers, unchanged, on the pocket model."""
    model, processor = foveate.load_pocket()
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    chat = [
        {
            "role": "user",
            "content": [
                {"type": "image", "image": Image.new("RGB", (200, 150), (200, 30, 30))},
                {"type": "text", "text": "what color is the circle ?"},
            ],
        }
    ]
    before = pipe(text=chat, max_new_tokens=4, return_full_text=False)
    with foveate.PruMergePlus(budget=20)(model) as session:
        after = pipe(text=chat, max_new_tokens=4, return_full_text=False)
        assert session.report.after == [20]
        inputs = processor.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        direct = model.generate(**inputs, max_new_tokens=4)[0, inputs["input_ids"].shape[1] :]
    assert after[0]["generated_text"].strip() == processor.decode(direct, skip_special_tokens=True).strip()
    plain = model.generate(**inputs, max_new_tokens=4)[0, inputs["input_ids"].shape[1] :]
    assert before[0]["generated_text"].strip() == processor.decode(plain, skip_special_tokens=True).strip()


def test_towers_that_hand_on_their_cls_token():
    """vision_feature_select_strategy="full": [CLS] is one more placeholder, and always stays."""
    model = zoo.build_llava("llama", strategy="full").eval()
    ids = torch.tensor([[1, 20, *[zoo.IMAGE] * (zoo.TOKENS + 1), 30, 31]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": zoo.pictures(1)}
    with torch.no_grad():
        full = model.get_image_features(inputs["pixel_values"]).pooler_output[0]
    encoded = foveate.encode(model, foveate.Spatial(budget=9), **inputs)
    assert len(encoded.embeds[0]) == 10
    torch.testing.assert_close(encoded.embeds[0][0], full[0])
    torch.testing.assert_close(encoded.embeds[0][1:], full[1:][encoded.reduction.index[0]])
    untouched = model(**inputs).logits
    with foveate.PruMergePlus(budget=1.0)(model):
        assert torch.equal(model(**inputs).logits, untouched)
