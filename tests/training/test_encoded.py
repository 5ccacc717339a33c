"""Pictures that come again: a memory changes what a step costs, and nothing of what it computes."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

import foveate
from foveate.errors import InputError, UnsupportedModelError
from foveate.loading import load
from foveate.methods.trained import Trained
from foveate.training.batches import Collator
from foveate.training.drawn import DrawnSamples
from foveate.training.encoded import Memory
from foveate.training.lora import adapted
from foveate.training.run import train
from foveate.training.settings import TrainSettings

from .. import families
from ..trained_methods import Learnt

ROOM = 1e9
METHODS = {
    "prumerge+": {"budget": 36},  # reads a layer, and [CLS]
    "pyramiddrop": {},  # nothing before the decoder
    "vispruner": {"budget": 36},
    "fovea": {"budget": 36},  # reads projected features
    "visionselector": {"budget": 36},  # the same, and trains with a method of its own attached
    "quecc": {"stride": 4, "heads": 4},  # reads the question, and four layers
    "vistog": {},  # runs beside the patches
    "setok": {"threshold": 2.4e-4},
    "setok-mean": {"threshold": 2.4e-4, "positions": "original"},
}


@pytest.fixture(scope="module")
def pocket():
    return load("pocket")


class Counted:
    """How many pictures the encoder has seen."""

    def __init__(self, model) -> None:
        self.pictures = 0
        model.model.vision_tower.register_forward_pre_hook(self._seen, with_kwargs=True)

    def _seen(self, _, args, kwargs) -> None:
        self.pictures += len(args[0] if args else kwargs["pixel_values"])


def batches(loaded, single: bool):
    """Two of eight questions each; the second one has two pictures of the first."""
    collate, drawn = Collator(loaded), DrawnSamples(64, 0, 4, single=single)
    rows = [drawn[number] for number in (range(24) if single else range(6))]
    return [collate(rows[:8]), collate(rows[4:12])] if single else [collate(rows[:4]), collate(rows[2:6])]


@pytest.mark.parametrize("name", METHODS)
def test_losses_and_gradients_are_those_without_a_memory(name):
    loaded = load("pocket")
    counted = Counted(loaded.model)
    method = foveate.get(name, **METHODS[name])
    learns = isinstance(method, Trained) and name != "fovea"
    method = method.fresh(0) if learns else method
    model = adapted(loaded.model.requires_grad_(False), 4)
    with foveate.attach(model, method, train=learns) as session:
        memory = Memory(session.parts(), method.before_decoder(), ROOM)
        found = []
        for remember in (False, True):
            counted.pictures = 0
            for batch in batches(loaded, method.before_decoder().reads_question):
                torch.manual_seed(0)
                model.zero_grad()
                loss = method.objective(model, memory.inputs(batch) if remember else batch)[0] if learns else None
                loss = model(**(memory.inputs(batch) if remember else batch)).loss if loss is None else loss
                loss.backward()
            named = {key: value.grad.clone() for key, value in model.named_parameters() if value.grad is not None}
            found.append((loss.detach(), named, counted.pictures))
    (plain, wanted, every), (mine, got, few) = found
    assert torch.allclose(mine, plain, rtol=1e-6, atol=0)
    assert got.keys() == wanted.keys()
    assert any("multi_modal_projector" in key for key in got)  # which has to work anew
    for key, gradient in wanted.items():
        torch.testing.assert_close(got[key], gradient, rtol=1e-4, atol=1e-6)
    different = 3 if method.before_decoder().reads_question else 6
    assert (every, few) == (16 if different == 3 else 8, different)


def test_what_has_no_room_is_encoded_each_time(pocket):
    counted = Counted(pocket.model)
    with foveate.attach(pocket.model, "pool", budget=36) as session:
        memory = Memory(session.parts(), session.method.before_decoder(), 1e6)  # of 0.3 MB each
        for _ in range(2):
            memory.inputs(batches(pocket, single=False)[0])
        assert (counted.pictures, len(memory.pictures)) == (4 + 1, 3)
        assert memory.size <= 1e6
        text = {"input_ids": torch.ones(1, 3, dtype=torch.long)}
        assert memory.inputs(text) is text


def test_pictures_are_kept_without_dropout(pocket):
    tower = pocket.model.model.vision_tower
    with foveate.attach(pocket.model, "pool", budget=36) as session:
        memory = Memory(session.parts(), session.method.before_decoder(), ROOM)
        seen = []
        handle = tower.register_forward_pre_hook(lambda module, _: seen.append(module.training))
        tower.train()
        memory.inputs(batches(pocket, single=False)[0])
        assert (seen, tower.training) == ([False], True)
        handle.remove()
        tower.eval()


def test_who_has_no_use_for_it(pocket):
    with (
        foveate.attach(pocket.model, "crossget", budget=64) as session,
        pytest.raises(InputError, match="inside the vision encoder"),
    ):
        Memory(session.parts(), session.method.before_decoder(), ROOM)
    with (
        foveate.attach(families.load("qwen2_vl"), "pool", budget=4) as session,
        pytest.raises(UnsupportedModelError, match="one grid"),
    ):
        Memory(session.parts(), session.method.before_decoder(), ROOM)


def test_a_run_with_a_memory_ends_as_one_without(tmp_path):
    ends = []
    for remember in (0.0, 0.01):
        settings = TrainSettings(
            batch=2, steps=4, save_every=2, turns=2, checked=2, lr=0.01, limit=3, remember=remember, precision="fp32"
        )
        train(Learnt(), settings, tmp_path / str(remember), lambda _: None)
        ends.append(load_file(tmp_path / str(remember) / "model.safetensors"))
    assert all(torch.allclose(ends[0][name], ends[1][name], atol=1e-6) for name in ends[0])


def test_drawn_scenes_come_again_with_other_questions():
    drawn, whole = DrawnSamples(9, 0, 4, scenes=4), DrawnSamples(4, 0, 4)
    for number in range(4):
        assert drawn[number].messages == whole[number].messages
    assert list(drawn[1].images[0].getdata()) == list(drawn[5].images[0].getdata())
    assert drawn[1].messages != drawn[5].messages
    # a sample depends on its number alone, so that a run that goes on sees what an unbroken one does
    fresh = DrawnSamples(9, 0, 4, scenes=4)
    assert fresh[8].messages == drawn[8].messages
    assert list(fresh[8].images[0].getdata()) == list(drawn[0].images[0].getdata())
