"""LoRA with a method attached: what is trained, going on, the adapter that is shipped, and loading adapters."""

from __future__ import annotations

import json
import sys
from random import Random

import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file

import foveate
from foveate.errors import InputError, MissingExtraError
from foveate.lab.studies import tuned
from foveate.lab.testset import SEED
from foveate.loading import load
from foveate.pocket import ADAPTERS, WEIGHTS
from foveate.pocket.scenes import draw_scene
from foveate.training.batches import Collator
from foveate.training.drawn import DrawnSamples
from foveate.training.lora import adapted
from foveate.training.run import train
from foveate.training.settings import TrainSettings

SMALL = TrainSettings(batch=2, turns=3, checked=2, save_every=2, steps=4, rank=4, lora_lr=1e-3, seed=5)


def adapter(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


# -- training


def test_steps_lower_the_loss_and_change_adapters_only():
    """Two conversations over and over, on shortened prompts."""
    loaded = load("pocket")
    batch = Collator(loaded)([DrawnSamples(2, 0, 3)[index] for index in range(2)])
    model = adapted(loaded.model, 8)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], 2e-3)
    losses = []
    with foveate.attach(model, "prumerge") as session:
        for _ in range(20):
            loss = model(**batch).loss
            losses.append(loss.item())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert max(session.report.after) < 150
    assert losses[-1] < 0.5 * losses[0]
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    own = {name for name in before if "lora_" in name or "modules_to_save" in name}
    assert changed == own
    assert len([name for name in own if "lora_" in name]) == 2 * 7 * 6  # all linear layers of the decoder
    assert all("language_model.layers" in name or "multi_modal_projector" in name for name in own)


def test_adapters_begin_as_nothing():
    plain, loaded = load("pocket"), load("pocket")
    batch = Collator(plain)([DrawnSamples(2, 0, 3)[0]])
    with torch.no_grad():
        torch.testing.assert_close(plain.model(**batch).logits, adapted(loaded.model, 4)(**batch).logits)


class Stopped(Exception):
    pass


def test_an_interrupted_run_ends_as_one_that_was_not(monkeypatch, tmp_path):
    told: list[str] = []
    train(foveate.PruMerge(), SMALL, tmp_path / "whole", told.append)
    seen, original = [], DrawnSamples.__getitem__

    def breaks(self, index):
        seen.extend([index] if self.split == "train" else [])
        if len(seen) > 6:  # the fourth batch is drawn while the third waits: two steps are done, and saved
            raise Stopped
        return original(self, index)

    monkeypatch.setattr(DrawnSamples, "__getitem__", breaks)
    with pytest.raises(Stopped):
        train(foveate.PruMerge(), SMALL, tmp_path / "parts", told.append)
    assert [path.name for path in (tmp_path / "parts" / "checkpoints").iterdir()] == ["checkpoint-2"]
    monkeypatch.setattr(DrawnSamples, "__getitem__", original)
    train(foveate.PruMerge(), SMALL, tmp_path / "parts", told.append)
    whole, parts = (adapter(tmp_path / name) for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    # what is written is the best of the checkpoints
    state = json.loads((tmp_path / "parts" / "checkpoints" / "checkpoint-4" / "trainer_state.json").read_text())
    best = adapter(tmp_path / "parts" / "checkpoints" / f"checkpoint-{state['best_global_step']}")
    assert all(torch.equal(parts[name], tensor.bfloat16()) for name, tensor in best.items())


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
        ("pocket+nonsense", None, r"no model 'pocket\+nonsense'. Shipped are pocket, .*pocket\+prumerge"),
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
    for call in (lambda: adapted(foveate.load_pocket()[0], 4), lambda: load("pocket+prumerge")):
        with pytest.raises(MissingExtraError, match=r"peft is not installed. Install it with: pip install 'foveate\[peft\]'"):
            call()
