"""Fine-tuning with a method attached: its data, its Trainer, the adapter that is shipped, and loading adapters."""

from __future__ import annotations

import json
import sys
from random import Random

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file

import foveate
from foveate.errors import InputError, MissingExtraError
from foveate.lab.studies import tuned
from foveate.lab.testset import SEED
from foveate.loading import load
from foveate.pocket import ADAPTERS, WEIGHTS
from foveate.pocket.questions import PocketQuestion
from foveate.pocket.scenes import draw_scene
from foveate.training import lora as finetune


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """One core, and steps that take a part of a second."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for name, value in {"BATCH": 2, "TURNS": 3, "CHECKED": 2, "SAVE_EVERY": 2}.items():
        monkeypatch.setattr(finetune, name, value)
    yield
    torch.set_num_threads(threads)


def adapter(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


# -- training


def test_conversations_are_what_the_chat_template_writes():
    processor = foveate.load_pocket()[1]
    asked = [
        PocketQuestion("count", "how many red objects are there ?", "3"),
        PocketQuestion("where", "where is the red star ?", "top left"),
    ]
    messages = []
    for number, question in enumerate(asked):
        shown = [] if number else [{"type": "image"}]
        messages.append({"role": "user", "content": [*shown, {"type": "text", "text": question.text}]})
        messages.append({"role": "assistant", "content": question.answer})
    picture, text = Image.fromarray(draw_scene(Random(0)).image), processor.apply_chat_template(messages)
    made = finetune.conversation(asked)
    assert torch.equal(made["input_ids"], processor(images=[picture], text=text, return_tensors="pt")["input_ids"][0])
    taught = made["labels"] != -100
    assert torch.equal(made["labels"][taught], made["input_ids"][taught])
    assert processor.decode(made["input_ids"][taught]) == "3 </s> top left </s>"


def test_data_is_a_function_of_its_seed_and_of_its_own_streams():
    one, again = (finetune.Conversations(3, 0, 3)[1] for _ in range(2))
    assert all(torch.equal(one[name], again[name]) for name in one)
    others = [
        finetune.Conversations(3, 0, 3)[2],
        finetune.Conversations(3, 1, 3)[1],
        finetune.Conversations(3, 0, 3, "validation")[1],
    ]
    assert all(not torch.equal(one["pixel_values"], other["pixel_values"]) for other in others)
    batch = finetune.collate([one, others[0]])
    assert batch["attention_mask"].sum(1).tolist() == [len(one["input_ids"]), len(others[0]["input_ids"])]
    assert batch["labels"][batch["attention_mask"] == 0].eq(-100).all()


def test_steps_lower_the_loss_and_change_adapters_only(monkeypatch, tmp_path):
    """Two conversations over and over, on shortened prompts."""
    rows = finetune.collate([finetune.Conversations(2, 0, 3)[index] for index in range(2)])
    original = finetune.Conversations.__getitem__
    monkeypatch.setattr(finetune.Conversations, "__getitem__", lambda self, index: original(self, index % 2))
    monkeypatch.setattr(finetune, "SAVE_EVERY", 20)
    model = finetune.adapted()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with foveate.attach(model, "prumerge") as session:
        with torch.no_grad():
            first = float(model(**rows).loss)
        finetune.trainer(model, tmp_path, 20, 0).train()
        with torch.no_grad():
            last = float(model.eval()(**rows).loss)
        assert max(session.report.after) < 150
    assert last < 0.5 * first
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    own = {name for name in before if "lora_" in name or "modules_to_save" in name}
    assert changed == own
    assert len([name for name in own if "lora_" in name]) == 2 * 7 * 6  # all linear layers of the decoder
    assert all("language_model.layers" in name or "multi_modal_projector" in name for name in own)


class Stopped(Exception):
    pass


def test_an_interrupted_run_ends_as_one_that_was_not(monkeypatch, tmp_path, capsys):
    finetune.finetune("prumerge", 4, tmp_path / "whole", 5)
    seen, limit, original = [], 6, finetune.Conversations.__getitem__

    def breaks(self, index):
        seen.extend([index] if self.split == "train" else [])
        if len(seen) > limit:  # the fourth batch is drawn while the third waits: two steps are done, and saved
            raise Stopped
        return original(self, index)

    monkeypatch.setattr(finetune.Conversations, "__getitem__", breaks)
    with pytest.raises(Stopped):
        finetune.finetune("prumerge", 4, tmp_path / "parts", 5)
    assert [path.name for path in (tmp_path / "parts" / "checkpoints").iterdir()] == ["checkpoint-2"]
    first = seen[:4]
    seen.clear()
    finetune.finetune("prumerge", 4, tmp_path / "parts", 5)
    assert sorted(first + seen) == [*range(8)]  # the first two steps were not done again
    whole, parts = (
        load_file(tmp_path / name / "checkpoints" / "checkpoint-4" / "adapter_model.safetensors") for name in ("whole", "parts")
    )
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    new = get_peft_model_state_dict(finetune.adapted(5), save_embedding_layers=False)
    assert new.keys() == whole.keys()
    assert not any(torch.equal(whole[name], tensor) for name, tensor in new.items())
    out, err = capsys.readouterr()
    assert out == ""
    assert "step 4/4: loss on validation scenes" in err
    # what is written is the best of the checkpoints, and loads
    saved = adapter(tmp_path / "parts")
    state = json.loads((tmp_path / "parts" / "checkpoints" / "checkpoint-4" / "trainer_state.json").read_text())
    best = adapter(tmp_path / "parts" / "checkpoints" / f"checkpoint-{state['best_global_step']}")
    assert all(torch.equal(saved[name], tensor.bfloat16()) for name, tensor in best.items())
    assert len(load(str(tmp_path / "parts")).model.peft_config) == 1


# -- adapters


def test_the_shipped_adapter_answers_better_on_few_tokens():
    found, scores = tuned.results("pocket+prumerge", "prumerge", 14, SEED)
    free, better = found["prumerge"]
    assert len(free.right) > 200
    assert free.tokens == better.tokens  # the encoder is as it was
    assert 60 < free.tokens < 110
    assert better.right.mean() > free.right.mean() + 0.02
    *_, shown = tuned.table(found, scores, 14).columns[2].cells
    gain = better.right.mean() - free.right.mean()
    assert shown.startswith(f"{100 * free.right.mean():.1f} -> {100 * better.right.mean():.1f}  {100 * gain:+.1f} [")
    assert load("pocket+prumerge").weights == load(str(ADAPTERS / "prumerge")).weights


def test_the_shipped_adapter_is_small_and_names_no_place():
    folder = ADAPTERS / "prumerge"
    assert {path.name for path in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "pocket"
    assert "/" not in json.dumps(config)
    assert (folder / "adapter_model.safetensors").stat().st_size < 2_000_000


@pytest.mark.parametrize("base", ["pocket", str(WEIGHTS)])
def test_adapters_of_ones_own(tmp_path, base):
    """Its base is the pocket model by name, or any folder; what it answers is what the adapted model answered."""
    model, processor = foveate.load_pocket()
    model = get_peft_model(model, LoraConfig(r=2, target_modules=r".*language_model.*\.3\..*_proj", init_lora_weights=False)).eval()
    model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    picture = Image.fromarray(draw_scene(Random(3)).image)
    inputs = processor(images=[picture], text="<s> user: <image> what color is the star ? assistant:", return_tensors="pt")
    loaded = load(str(tmp_path), dtype="float32")
    with torch.no_grad(), foveate.get("prumerge")(model), foveate.get("prumerge")(loaded.model):
        logits = [each(**inputs).logits for each in (model, loaded.model)]
    torch.testing.assert_close(*logits)
    plain = load("pocket")
    assert loaded.weights != plain.weights
    with torch.no_grad(), foveate.get("prumerge")(plain.model):
        assert not torch.allclose(plain.model(**inputs).logits, logits[0], atol=0.1)


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("pocket+nonsense", None, r"no model 'pocket\+nonsense'. Shipped are pocket, pocket\+prumerge"),
        (None, {"peft_type": "LORA"}, "does not name its model"),
        (None, {"peft_type": "LORA", "base_model_name_or_path": "/no/such/model"}, "there is no folder"),
        (None, "{", "cannot be loaded"),
    ],
)
def test_adapters_that_cannot_be_loaded(tmp_path, name, config, message):
    if config is not None:
        (tmp_path / "adapter_config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    with pytest.raises(InputError, match=message):
        load(name or str(tmp_path))


def test_without_peft(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    for call in (finetune.adapted, lambda: load("pocket+prumerge")):
        with pytest.raises(MissingExtraError, match=r"peft is not installed. Install it with: pip install 'foveate\[peft\]'"):
            call()
