"""TRL's trainers with a method attached: losses and steps equal those of a loop by hand, over spliced prompts."""

from __future__ import annotations

import copy
from random import Random

import pytest
import torch
from PIL import Image
from torch.nn.functional import cross_entropy

import foveate
from foveate.pocket.questions import ask
from foveate.pocket.scenes import draw_scene
from foveate.pocket.vocabulary import EOS, TOKEN_ID

from .steps import RATE, SGD

datasets, trl, peft = (pytest.importorskip(name) for name in ("datasets", "trl", "peft"))

STEPS, KEPT = 2, 48
IMAGE = TOKEN_ID["<image>"]
# Mistakes in what is kept show in the loss of the second step, mistakes in gradients, too
SETTINGS = dict(max_steps=STEPS, save_strategy="no", gradient_checkpointing=False, **SGD)


def method() -> foveate.Method:
    return foveate.PruMergePlus(budget=KEPT, merge=False)


def turn(role: str, text: str, *, picture: bool = False) -> dict[str, object]:
    return {"role": role, "content": [{"type": "image"}] * picture + [{"type": "text", "text": text}]}


@pytest.fixture(scope="module")
def rows():
    """Two conversations about a picture each, of different lengths."""
    found = []
    for seed, turns in ((1, 1), (2, 3)):
        scene, messages = draw_scene(Random(seed)), []
        for number, question in enumerate(ask(scene, Random(seed), turns)):
            messages += [turn("user", question.text, picture=number == 0), turn("assistant", question.answer)]
        found.append({"images": [Image.fromarray(scene.image)], "messages": messages})
    return found


def spliced_logits(model, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [T', V] of one row without padding whose picture lost tokens, and which of its columns are left."""
    ids = inputs["input_ids"][0]
    with torch.no_grad():
        kept = foveate.encode(model, method(), input_ids=ids[None], pixel_values=inputs["pixel_values"]).report.images[0].kept
    assert len(kept) == KEPT
    features = model.model.get_image_features(inputs["pixel_values"]).pooler_output[0]
    embeddings = model.get_input_embeddings()(ids).masked_scatter((ids == IMAGE)[:, None], features)
    stays = ids != IMAGE
    stays[(ids == IMAGE).nonzero()[kept, 0]] = True
    hidden = model.get_decoder()(inputs_embeds=embeddings[stays][None], use_cache=False).last_hidden_state
    return model.lm_head(hidden)[0], stays.nonzero()[:, 0]


def by_hand(model, processor, rows, *, answers_only: bool) -> list[float]:
    """Losses of the steps, over labels of text that a token before them predicts; TRL counts placeholders, too."""
    optimizer, losses = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], RATE), []
    for _ in range(STEPS):
        total, number = 0.0, 0
        for row in rows:
            text = processor.apply_chat_template(row["messages"])
            inputs = processor(images=row["images"], text=text, return_tensors="pt", add_special_tokens=False)
            ids, answer, taught = inputs["input_ids"][0], False, []
            for token in ids.tolist():
                taught.append(answer or (not answers_only and token != IMAGE))
                answer = (answer or token == TOKEN_ID["assistant:"]) and token != EOS
            logits, columns = spliced_logits(model, inputs)
            labels = ids.masked_fill(~torch.tensor(taught), -100)[columns]
            total = total + cross_entropy(logits[:-1], labels[1:], reduction="sum")
            number += sum(taught[1:]) + (0 if answers_only else int((ids == IMAGE).sum()))
        loss = total / number
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    ("order", "lora", "answers_only"),
    [("before", False, False), ("after", False, True), ("before", True, True), ("after", True, False)],
)
def test_sft(tmp_path, rows, order, lora, answers_only):
    model, processor = foveate.load_pocket()
    plain = copy.deepcopy(model)
    adapters = peft.LoraConfig(target_modules=r".*language_model.*\.(q|v)_proj") if lora else None
    handle = foveate.attach(model, method()) if order == "before" else None
    torch.manual_seed(0)
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(str(tmp_path), max_length=None, assistant_only_loss=answers_only, **SETTINGS),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=processor,
        peft_config=adapters,
    )
    handle = handle or foveate.attach(model, method())
    wrapped = peft.get_peft_model(plain, adapters) if lora else plain
    if lora:
        plain.load_state_dict(trainer.model.get_base_model().state_dict())
    plain.eval()
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert handle.report.after == [KEPT] * 2
    assert any("placeholders" in warning for warning in handle.report.warnings) != answers_only
    assert losses == pytest.approx(by_hand(plain, processor, rows, answers_only=answers_only), abs=2e-4)
    for name, value in trainer.model.state_dict().items():
        torch.testing.assert_close(value, wrapped.state_dict()[name], atol=1e-5, rtol=1e-4)


def spoken(model, inputs: dict[str, torch.Tensor], number: int) -> torch.Tensor:
    """Log-probabilities [number] of the last tokens of one row."""
    logits, columns = spliced_logits(model, inputs)
    given = inputs["input_ids"][0, columns][1:]
    return logits[:-1].log_softmax(-1).gather(-1, given[:, None])[-number:, 0]


def policy_losses(model, calls: list[dict[str, torch.Tensor]], beta: float, clip: float = 0.2) -> list[float]:
    """GRPO's losses of steps over the same completions (arXiv 2402.03300, equations 3 and 4); the first model is the reference."""
    optimizer, losses, old = torch.optim.SGD(model.parameters(), RATE), [], None
    for call in calls:
        rows, now = range(len(call["prompt_ids"])), []
        for row in rows:
            asked, said = (call[f"{part}_ids"][row][call[f"{part}_mask"][row].bool()] for part in ("prompt", "completion"))
            inputs = {"input_ids": torch.cat([asked, said])[None], "pixel_values": call["pixel_values"][row : row + 1]}
            now.append(spoken(model, inputs, len(said)))
        old = [each.detach() for each in now] if old is None else old
        means = []
        for row in rows:
            ratio, gain = (now[row] - old[row]).exp(), call["advantages"][row]
            gained = torch.min(ratio * gain, ratio.clamp(1 - clip, 1 + clip) * gain)
            means.append(-(gained - beta * (1 / ratio + ratio.log() - 1)).mean())
        loss = torch.stack(means).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(("order", "beta"), [("before", 0.0), ("after", 0.5)])
def test_grpo(tmp_path, rows, order, beta):
    """Prompts are padded on the left and completions on the right; the model that answers is the one that is trained."""
    model, processor = foveate.load_pocket()
    model.generation_config.update(eos_token_id=EOS)
    model.lm_head.weight.data.mul_(0.3)  # less sure of itself, so that completions of a prompt differ
    plain, calls = copy.deepcopy(model).eval(), []
    prompts = [{"image": row["images"][0], "prompt": [{**row["messages"][-2], "content": text_of(row)}]} for row in rows]
    handle = foveate.attach(model, method()) if order == "before" else None
    trainer = trl.GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: [float(number) for number in range(len(completions))],
        args=trl.GRPOConfig(
            str(tmp_path),
            num_generations=2,
            num_iterations=STEPS,
            max_completion_length=4,
            loss_type="grpo",
            beta=beta,
            use_bias_correction_kl=False,  # as in the paper
            temperature=1.0,
            shuffle_dataset=False,
            **{**SETTINGS, "per_device_train_batch_size": 4},
        ),
        train_dataset=datasets.Dataset.from_list(prompts),
        processing_class=processor,
    )
    handle = handle or foveate.attach(model, method())
    if beta:  # a model of its own, from the folder of the first
        trainer.ref_model.load_state_dict(model.state_dict())
        foveate.attach(trainer.ref_model, method())
    told, compute = [], trainer._compute_loss

    def recorded(model, inputs):
        calls.append({name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)})
        loss = compute(model, inputs)
        told.append(loss.item())
        return loss

    trainer._compute_loss = recorded
    trainer.train()
    assert set(handle.report.after) == {KEPT}
    assert len(calls) == STEPS
    assert len({tuple(row) for row in calls[0]["prompt_mask"].tolist()}) > 1, "prompts have different lengths"
    assert torch.equal(calls[0]["completion_ids"].sort(0).values, calls[1]["completion_ids"].sort(0).values)
    assert abs(told[1]) > 1e-3, "the first step changes what the second one finds"
    assert told == pytest.approx(policy_losses(plain, calls, beta), abs=1e-4)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, plain.state_dict()[name], atol=1e-5, rtol=1e-4)


def text_of(row) -> str:
    return row["messages"][-2]["content"][-1]["text"]
