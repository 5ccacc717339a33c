"""The settings that a tuning tries."""

from __future__ import annotations

import pytest

import foveate
from foveate.engine.model.anatomy import anatomy
from foveate.methods.registry import registered
from foveate.tuning.space import COARSE, FINE, SHARES, space_of, usual

from .. import zoo


@pytest.fixture(scope="module")
def pocket():
    model, _ = foveate.load_pocket()
    return anatomy(model)


@pytest.mark.parametrize("name", sorted(registered()))
def test_every_method_says_what_to_try(name):
    """From many tokens to few, as far as that is known; what cannot be built says why in our own words."""
    for ladder in registered()[name].to_tune(SHARES, 8):
        counts, built = [], 0
        for fields in ladder:
            try:
                found = foveate.get(name, **fields).layer_tokens(576, 8)
            except foveate.InputError:
                continue
            built += 1
            counts += [] if found is None else [sum(found)]
        assert counts == sorted(counts, reverse=True)
        assert built or name in ("quecc",)


def test_the_usual_ones_on_the_pocket_model(pocket):
    space = space_of(pocket, usual(True, False))
    kinds = {setting.kind for setting in space.first}
    assert {
        "fovea/0",
        "fovea/1",
        "fovea:pocket/0",
        "dyvte:pocket/0",
        "prumerge/0",
        "fastv/0",
        "fastv/1",
        "fovea/0+fastv/1",
    } <= kinds
    assert "pixelprune" in space.impossible
    assert len({setting.label for setting in space.first}) == len(space.first)
    for settings in space.further.values():
        assert all(setting.method.budget in FINE for setting in settings)
    thresholds = [setting for setting in space.first if setting.kind == "prumerge/0"]
    assert [setting.method.iqr_factor for setting in thresholds] == [0.5, 1.0, 1.5, 2.5]
    budgets = [setting.method.budget for setting in space.first if setting.kind == "fovea/0"]
    assert budgets == sorted(COARSE, reverse=True)
    both = next(setting for setting in space.first if setting.kind == "fovea/0+fastv/1")
    assert both.label == "fovea 60 % alpha=0.3 + fastv 40 % layer=3"
    with both.method(pocket.model):
        pass


def test_only_what_was_named_is_tried(pocket):
    """In both places together, too."""
    for names, both in ((["divprune", "pyramiddrop"], {"divprune/0+pyramiddrop/0"}), (["divprune"], set()), (["fastv"], set())):
        space = space_of(pocket, names)
        kinds = {setting.kind for setting in space.first}
        assert {kind for kind in kinds if "+" in kind} == both
        assert {part.partition("/")[0] for kind in kinds for part in kind.split("+")} == set(names)


def test_a_model_without_cls_gets_others():
    model, _ = foveate.load_pocket("qwen")
    space = space_of(anatomy(model), usual(False, True))
    kinds = {setting.kind.partition("/")[0] for setting in space.first}
    assert {"evs", "vidcom2", "pixelprune", "fewer-frames"} <= kinds


def test_names_files_and_what_is_impossible(pocket, tmp_path):
    foveate.get("spatial", budget=31).save(tmp_path / "mine.json")
    space = space_of(pocket, [str(tmp_path / "mine.json")])
    assert [setting.method.budget for setting in space.first] == [31]
    with pytest.raises(foveate.InputError, match=r"none of the methods can act on this model \(quecc: "):
        space_of(pocket, ["quecc"])
    with pytest.raises(foveate.InputError, match="unknown method"):
        space_of(pocket, ["nothing"])
    weights = space_of(pocket, ["quecc:pocket"])
    assert weights.first


def test_cuts_that_a_short_decoder_does_not_have():
    space = space_of(anatomy(zoo.load()), ["fastv", "spatial"])
    layers = anatomy(zoo.load()).decoder_layers
    assert all(0 < setting.method.layer < layers for setting in space.first if setting.kind.startswith("fastv"))
