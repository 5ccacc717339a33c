"""Methods as JSON: saved, loaded, named for other processes, and read from texts of the command line."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

import foveate
from foveate.errors import FoveateError, InputError
from foveate.methods.base import Method
from foveate.methods.fields import read_field
from foveate.methods.registry import get, presets, registered
from foveate.methods.saved import dumped, named

from .. import trained_methods


def every_method():
    for name, cls in registered().items():
        for preset in ("", *presets(cls)):
            full = f"{name}:{preset}" if preset else name
            try:
                yield full, get(full)
            except InputError:
                yield full, get(full, budget=0.5)


def fields(method):
    return {field.name: getattr(method, field.name) for field in dataclasses.fields(method)}


@pytest.mark.parametrize(("name", "method"), [pytest.param(*pair, id=pair[0]) for pair in every_method() if not pair[1].trained()])
def test_every_method_and_preset_comes_back(tmp_path, name, method):
    changed = method if method.budget is None else method.with_budget(0.25)
    for one in (method, changed):
        one.save(tmp_path / "method.json")
        for found in (Method.load(tmp_path / "method.json"), named(one.name, None, dumped(one))):
            assert type(found) is type(one)
            assert fields(found) == fields(one)
            assert found.settings() == one.settings()


def test_compositions_come_back(tmp_path):
    inner = foveate.Compose(foveate.PruMergePlus.released(), foveate.FastV(layer=3, budget=0.25))
    both = foveate.Compose(inner, foveate.get("text-relevance", budget=9))
    both.save(tmp_path / "both.json")
    found = foveate.Method.load(tmp_path / "both.json")
    assert found.settings() == both.settings()
    assert [type(part) for part in found.methods] == [foveate.Compose, foveate.TextRelevanceCut]
    assert named("compose", 40, dumped(both)).before_decoder().budget == 40
    for wrong in (lambda: foveate.Compose(foveate.PruMerge(), budget=9), lambda: get("compose", budget=9)):
        with pytest.raises(InputError, match="composition has no field 'budget'"):
            wrong()


def test_trained_methods_name_their_folder(tmp_path):
    from .. import zoo

    method = trained_methods.Learnt(budget=4).fresh(3)
    with pytest.raises(InputError, match="save_pretrained first"):
        method.save(tmp_path / "learnt.json")
    method(zoo.load()).attach().detach()
    method.save_pretrained(tmp_path / "weights")
    stored = trained_methods.Learnt.from_pretrained(tmp_path / "weights")
    stored.save(tmp_path / "learnt.json")
    assert foveate.Method.load(tmp_path / "learnt.json").settings() == stored.settings()
    assert json.loads((tmp_path / "learnt.json").read_text())["fields"]["weights"] == str(tmp_path / "weights")


def test_what_a_search_found(tmp_path):
    plan = {"method": "g-search", "rates": [1.0, 0.5, 0.25]}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    assert foveate.Method.load(tmp_path / "plan.json").rates == (1.0, 0.5, 0.25)
    (tmp_path / "heads.json").write_text(json.dumps({"method": "yopo", "heads": [[True, False]]}))
    assert foveate.Method.load(tmp_path / "heads.json").heads == str(tmp_path / "heads.json")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("", "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ("[]", "expected"),
        ('{"method": 3}', "expected"),
        ('{"method": "prumerge", "fields": []}', "is no object"),
        ('{"method": "prumerge", "methods": []}', "is not made of methods"),
        ('{"method": "compose", "methods": {}}', "no list of methods"),
        ('{"method": "compose", "methods": []}', "Compose takes methods"),
        ('{"method": "compose", "methods": [3]}', "expected"),
        ('{"method": "prumerge", "budget": 144}', "nothing is called 'budget' here; expected"),
        ('{"method": "p-sigmoid", "rates": [1.0, 0.5]}', "nothing is called 'rates'"),
        ('{"method": "compose", "methods": [{"method": "fastv"}], "budget": 9}', "composition has no 'budget'"),
        ('{"method": "compose", "methods": [{"method": "fastv"}], "fields": {"budget": 9}}', "composition has no 'fields'"),
        ('{"method": "nothing"}', "unknown method 'nothing'"),
        ('{"method": "prumerge", "fields": {"strenght": 1}}', "no field 'strenght'"),
        ('{"method": "prumerge", "fields": {"k": "many"}}', "expected a whole number"),
    ],
)
def test_files_that_describe_no_method(tmp_path, content, match):
    (tmp_path / "method.json").write_text(content)
    with pytest.raises(InputError, match=match):
        Method.load(tmp_path / "method.json")


def test_numbers_of_numpy_are_written(tmp_path):
    method = foveate.PruMerge(k=np.int64(7), iqr_factor=np.float32(2), score_layer=np.int64(-2))
    method.save(tmp_path / "method.json")
    assert foveate.Method.load(tmp_path / "method.json") == foveate.PruMerge(k=7, iqr_factor=2.0, score_layer=-2)
    method = foveate.get("g-search", rates=(np.float64(1.0), np.float32(0.5)))
    assert json.loads(json.dumps(method.settings()))["rates"] == [1.0, 0.5]


def test_places(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        Method.load(tmp_path / "absent.json")
    with pytest.raises(FoveateError, match="cannot be written"):
        foveate.PruMerge().save(tmp_path / "absent" / "method.json")

    class Nameless(foveate.ProjectorReducer):
        pass

    with pytest.raises(InputError, match="Nameless is not registered"):
        Nameless().save(tmp_path / "method.json")


@pytest.mark.parametrize(
    ("method", "field", "text", "value"),
    [
        (foveate.PruMerge, "k", "16", 16),
        (foveate.PruMerge, "budget", "0.25", 0.25),
        (foveate.PruMerge, "budget", "none", None),
        (foveate.PruMerge, "merge", "False", False),
        (foveate.PruMerge, "positions", "original", "original"),
        (foveate.PyramidDrop, "layers", "1,2, 3", [1, 2, 3]),
        (foveate.GSearch, "rates", "[1, 0.5]", [1, 0.5]),
        (foveate.GSearch, "plan", "a,b.json", "a,b.json"),
        (foveate.GSearch, "plan", "none", None),
        (foveate.YOPO, "heads", "12", "12"),
        (foveate.PruMerge, "k", "many", "many"),
    ],
)
def test_fields_as_texts(method, field, text, value):
    found = read_field(method, field, text)
    assert found == value
    assert type(found) is type(value)


def test_a_class_without_a_name_of_its_own_is_not_its_parent():
    """Its parent's name would load another method, and stand in reports."""

    class Mine(foveate.PruMerge):
        pass

    assert (Mine().name, Mine().settings()["name"]) == ("Mine", "Mine")
    with pytest.raises(InputError, match="Mine is not registered"):
        dumped(Mine())
    assert foveate.PruMerge().name == "prumerge"


def test_a_head_mask_is_known_by_its_contents(tmp_path):
    found = []
    for mask in ([[True, False]], [[False, True]]):
        (tmp_path / "heads.json").write_text(json.dumps({"method": "yopo", "heads": mask}))
        found.append(foveate.YOPO(heads=str(tmp_path / "heads.json")))
    assert found[0].settings() != found[1].settings()
    assert found[0].described() == found[1].described(), "which name the file"
