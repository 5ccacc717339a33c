"""A method with weights in somebody's own loop: transformers' Trainer, and TRL's trainers for SFT and GRPO."""

from __future__ import annotations

import shutil
from random import Random

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

import foveate
from foveate.errors import InputError
from foveate.loading import load
from foveate.pocket.questions import ask
from foveate.pocket.scenes import draw_scene
from foveate.pocket.vocabulary import EOS
from foveate.training import callback
from foveate.training.batches import Collator
from foveate.training.callbacks import MethodCallback
from foveate.training.drawn import DrawnSamples

from ..trained_methods import Learnt
from .steps import RATE, SGD

SETTINGS = dict(remove_unused_columns=False, dataloader_pin_memory=False, **SGD)


def by_hand(model, batches: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The weights of the method after steps of SGD; everything else stays."""
    model.requires_grad_(False)
    method = Learnt().fresh(1)
    with foveate.attach(model, method, train=True) as session:
        for batch in batches:
            model(**batch).loss.backward()
            with torch.no_grad():
                for weight in session.parameters():
                    weight -= RATE * weight.grad
                    weight.grad = None
        return {name: value.clone() for name, value in method.module.state_dict().items()}


@pytest.fixture(scope="module")
def loaded():
    return load("pocket")


def trainer(loaded, folder, method, steps: int, **changes) -> Trainer:
    return Trainer(
        model=loaded.model.requires_grad_(False),
        args=TrainingArguments(
            str(folder), max_steps=steps, save_steps=2, train_sampling_strategy="sequential", **{**SETTINGS, **changes}
        ),
        data_collator=Collator(loaded),
        train_dataset=DrawnSamples(16, 0, 1),
        callbacks=[callback(method)],
    )


def test_a_stock_trainer(loaded, tmp_path):
    method = Learnt().fresh(1)
    made = trainer(loaded, tmp_path, method, 2)
    made.train()
    data, collate = DrawnSamples(16, 0, 1), Collator(loaded)
    wanted = by_hand(loaded.model, [collate([data[0], data[1]]), collate([data[2], data[3]])])
    saved = load_file(tmp_path / "foveate" / "model.safetensors")
    for name, value in wanted.items():
        torch.testing.assert_close(method.module.state_dict()[name], value, atol=1e-6, rtol=1e-4)
        assert torch.equal(saved[name], method.module.state_dict()[name])
    assert torch.equal(load_file(tmp_path / "checkpoint-2" / "foveate" / "model.safetensors")["queries"], saved["queries"])
    foveate.attach(loaded.model, "prumerge").detach()  # nothing is attached any more
    assert not any(name.startswith("foveate") for name, _ in loaded.model.named_parameters())


@pytest.mark.parametrize("adapted", [False, True])
def test_a_run_that_goes_on_has_the_weights_that_it_had(tmp_path, adapted):
    """Also inside PEFT, whose checkpoints hold the adapter alone."""
    from peft import LoraConfig, get_peft_model

    def begun():
        found = load("pocket")
        if adapted:
            torch.manual_seed(0)
            model = get_peft_model(found.model, LoraConfig(r=2, target_modules=r".*language_model.*\.(q|v)_proj"))
            object.__setattr__(found, "model", model)
        return found

    def run(folder, steps: int, resume: bool) -> dict[str, torch.Tensor]:
        method, found = Learnt().fresh(1), begun()
        made = trainer(found, folder, method, steps)
        made.train(resume_from_checkpoint=resume)
        return {name: value.clone() for name, value in method.module.state_dict().items()}

    whole = run(tmp_path / "whole", 4, False)
    run(tmp_path / "parts", 2, False)
    parts = run(tmp_path / "parts", 4, True)
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, atol=1e-7, rtol=1e-6)
    shutil.rmtree(tmp_path / "parts" / "checkpoint-4" / "foveate")
    with pytest.raises(InputError, match="holds no weights of learnt"):
        run(tmp_path / "parts", 6, True)


def test_a_method_without_weights(loaded, tmp_path):
    """It is attached while the Trainer trains, and saves nothing."""
    runner = trainer(loaded, tmp_path, foveate.PruMergePlus(budget=40, merge=False), 1)
    loaded.model.lm_head.requires_grad_(True)
    mine = next(each for each in runner.callback_handler.callbacks if isinstance(each, MethodCallback))
    session = mine.session
    runner.train()
    assert session.report.after == [40, 40]
    assert mine.session is None
    assert not (tmp_path / "foveate").exists()


# -- TRL


@pytest.fixture(scope="module")
def rows():
    found = []
    for seed in (1, 2):
        scene = draw_scene(Random(seed))
        question = ask(scene, Random(seed), 1)[0]
        parts = [{"type": "image"}, {"type": "text", "text": question.text}]
        answer = [{"type": "text", "text": question.answer}]
        messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]
        found.append({"images": [Image.fromarray(scene.image)], "messages": messages})
    return found


def test_sft_trains_the_method(tmp_path, rows):
    """The same steps as by hand, over the labels of answers."""
    datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl")
    loaded, method = load("pocket"), Learnt().fresh(1)
    made = trl.SFTTrainer(
        model=loaded.model.requires_grad_(False),
        args=trl.SFTConfig(
            str(tmp_path),
            max_steps=2,
            max_length=None,
            assistant_only_loss=True,
            gradient_checkpointing=False,
            save_strategy="no",
            **SETTINGS,
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=loaded.processor,
        callbacks=[callback(method)],
    )
    made.train()
    template = loaded.processor.chat_template
    assert "generation" in template
    inputs = loaded.processor.apply_chat_template(
        [[*_filled(row)] for row in rows],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        return_assistant_tokens_mask=True,
        processor_kwargs={"padding": True, "padding_side": "right"},
    )
    labels = inputs["input_ids"].masked_fill(inputs.pop("assistant_masks") == 0, -100)
    fresh = load("pocket").model
    wanted = by_hand(fresh, [{**inputs, "labels": labels}] * 2)
    for name, value in wanted.items():
        torch.testing.assert_close(method.module.state_dict()[name], value, atol=2e-5, rtol=1e-3)


def _filled(row):
    image = iter(row["images"])
    for message in row["messages"]:
        parts = [{**part, "image": next(image)} if part["type"] == "image" else part for part in message["content"]]
        yield {**message, "content": parts}


def test_grpo_trains_the_method(tmp_path, rows):
    """Rewards reach the weights of the method, and nothing else changes."""
    datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl")
    loaded, method = load("pocket"), Learnt().fresh(1)
    model = loaded.model.requires_grad_(False)
    model.generation_config.update(eos_token_id=EOS)
    model.lm_head.weight.data.mul_(0.3)  # less sure of itself, so that completions of a prompt differ
    before = {name: value.clone() for name, value in model.state_dict().items()}
    prompts = [{"image": row["images"][0], "prompt": [{**row["messages"][0], "content": _text(row)}]} for row in rows]
    seen = callback(method)
    made = trl.GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: [float(number) for number in range(len(completions))],
        args=trl.GRPOConfig(
            str(tmp_path),
            max_steps=1,
            num_generations=2,
            max_completion_length=4,
            beta=0.0,
            gradient_checkpointing=False,
            save_strategy="no",
            **{**SETTINGS, "per_device_train_batch_size": 4},
        ),
        train_dataset=datasets.Dataset.from_list(prompts),
        processing_class=loaded.processor,
        callbacks=[seen],
    )
    begun = {name: value.clone() for name, value in method.module.state_dict().items()}
    made.train()
    assert not any(torch.equal(value, begun[name]) for name, value in method.module.state_dict().items())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def _text(row) -> str:
    return row["messages"][0]["content"][-1]["text"]
