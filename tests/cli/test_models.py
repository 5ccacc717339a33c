"""The table of models: what it says is what the engine does, and what is refused is refused with its reason."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

import foveate
from foveate.engine.model.anatomy import anatomy
from foveate.families import FAMILIES, REFUSED

from .. import families
from ..engine.model.test_families import INSIDE_ENCODER, MROPE
from .test_main import invoke


def test_a_row_for_each_family():
    found = {info.model_type: info for info in foveate.models()}
    assert list(found) == list(FAMILIES)
    assert len(found) >= 26
    assert {kind for kind, info in found.items() if info.in_encoder} == set(INSIDE_ENCODER)
    assert {kind for kind, info in found.items() if info.positions == "(t, h, w)"} == set(MROPE)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_row_says(family):
    """Against the small model: its encoder, and the inputs of its prompts."""
    info = next(info for info in foveate.models() if info.model_type == family)
    parts, inputs = anatomy(families.load(family)), families.batch(family)
    assert info.images == ("pixel_values" in inputs)
    assert info.videos == ("pixel_values_videos" in inputs or family in families.ONE_PLACEHOLDER)
    width = parts.model.base_model.config.get_text_config().hidden_size
    encoded = foveate.encode(families.load(family), foveate.PruMerge(), **inputs)
    assert all(embeds.shape[1] == width for embeds in encoded.embeds)
    without = any("no [CLS] token" in note for note in encoded.report.notes)
    assert info.reads_cls != without
    assert (parts.projector is not None) == (info.merging == "before the projector")


@pytest.mark.parametrize("kind", REFUSED)
def test_others_are_refused_with_the_reason(kind, monkeypatch):
    assert kind in CONFIG_MAPPING_NAMES
    assert kind not in FAMILIES
    model = families.load("llava")
    monkeypatch.setattr(model, "config", SimpleNamespace(model_type=kind))
    with pytest.raises(foveate.UnsupportedModelError) as caught:
        anatomy(model)
    assert REFUSED[kind] in str(caught.value)


def test_the_command(capsys, monkeypatch):
    code, out, _ = invoke(capsys, monkeypatch, "models")
    assert code == 0
    assert all(kind in out for kind in (*FAMILIES, *REFUSED))
    code, out, _ = invoke(capsys, monkeypatch, "models", "--json")
    document = json.loads(out)
    assert [row["model_type"] for row in document["supported"]] == list(FAMILIES)
    assert document["refused"] == REFUSED
    assert all(AutoConfig.for_model(row["model_type"]).model_type == row["model_type"] for row in document["supported"])
