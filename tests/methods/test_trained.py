"""Methods with weights: made, loaded, checked against the model, saved, copied, and what their outputs may be."""

import copy
import json
import multiprocessing
import pickle
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import foveate
from foveate.methods.base import ProjectorReducer
from foveate.methods.tools.selection import anchors
from foveate.methods.trained import Trained
from foveate.tokens import Reduction

from .. import zoo
from ..trained_methods import Gate, Learnt


@pytest.fixture
def model():
    return zoo.load()


def tokens_of(model, method, **inputs):
    """What the decoder would get."""
    return torch.cat(foveate.encode(model, method, **(inputs or zoo.batch())).embeds)


@pytest.fixture
def folder(model, tmp_path):
    """Weights of ``Learnt`` in the space of the decoder, made for the model."""
    method = Learnt(space="decoder", budget=6).fresh(7)
    tokens_of(model, method)
    method.save_pretrained(tmp_path / "learnt-6", training={"steps": 3})
    return tmp_path / "learnt-6"


# -- weights are made, saved and loaded


def test_fresh_weights_are_a_function_of_their_seed(model):
    state = torch.get_rng_state()
    first, second, third = (tokens_of(model, Learnt().fresh(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.allclose(first, third)
    assert torch.equal(torch.get_rng_state(), state), "random numbers of the user are left alone"


def test_without_weights(model):
    """A method can be built and listed without them, and not used."""
    method = foveate.get("learnt")
    assert method.trained() == (method,)
    assert method.settings()["weights"] is None
    with pytest.raises(foveate.InputError, match="has to be trained and has no weights"):
        foveate.attach(model, method)
    with pytest.raises(foveate.InputError, match="has not happened"):
        _ = method.module
    assert not any(name.startswith("_foveate") for name in vars(model))
    assert "learnt" not in {info.name for info in foveate.methods()}


def test_saved_and_loaded(model, folder):
    wanted = tokens_of(model, Learnt(space="decoder", budget=6).fresh(7))
    for method in (
        Learnt.from_pretrained(folder),
        foveate.get("learnt", weights=str(folder), budget=6),  # its space belongs to the weights
        Learnt(weights=folder, budget=6, space="decoder"),
    ):
        assert torch.equal(tokens_of(model, method), wanted)
        assert method.space == "decoder"
    assert Learnt.from_pretrained(folder).budget == 6
    assert Learnt.from_pretrained(folder, budget=3).budget == 3
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors"}
    config = json.loads((folder / "config.json").read_text())
    assert (config["format"], config["method"], config["training"]) == (1, "learnt", {"steps": 3})
    assert (config["shape"]["features"], config["shape"]["width"], config["shape"]["grid"]) == (48, 64, [8, 8])
    assert config["fields"] == {"budget": 6, "positions": "compact", "temporal": None, "space": "decoder"}


def test_attach_and_the_hub(model, folder, monkeypatch):
    """An id of the Hub is downloaded once it is asked for; only the two files are."""
    asked = []

    def download(name, **options):
        asked.append((name, options))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with foveate.attach(model, "learnt", weights="someone/learnt@v2", budget=6) as session:
        model.generate(**zoo.batch(), max_new_tokens=1)
        assert session.report.after == [6] * 4
    assert asked == [("someone/learnt", {"revision": "v2", "allow_patterns": ["config.json", "model.safetensors"]})]
    assert Learnt.from_pretrained("someone/learnt", revision="v2").weights == "someone/learnt@v2"


def test_pushing(model, folder, monkeypatch):
    sent = {}

    class Api:
        def create_repo(self, name, private, exist_ok):
            sent.update(name=name, private=private)
            return f"https://hub/{name}"

        def upload_folder(self, repo_id, folder_path):
            from pathlib import Path

            sent["files"] = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    method = Learnt.from_pretrained(folder)
    tokens_of(model, method)
    assert method.push_to_hub("someone/learnt") == "https://hub/someone/learnt"
    assert (sent["name"], sent["private"]) == ("someone/learnt", True)
    assert sent["files"].keys() == {"config.json", "model.safetensors", "README.md"}
    assert sent["files"]["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert b'weights="someone/learnt"' in sent["files"]["README.md"]


def broken(folder, **changes):
    """The folder with changes to its config, or tensors."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def test_weights_that_are_refused(model, folder, tmp_path, monkeypatch):
    from safetensors.torch import load_file, save_file

    with pytest.raises(foveate.InputError, match="there is no folder"):
        Learnt(weights=str(tmp_path / "nowhere"))
    with pytest.raises(foveate.InputError, match="expected a folder, or an id"):
        Learnt(weights=3)
    with pytest.raises(foveate.InputError, match="holds no weights of a method"):
        Learnt(weights=str(tmp_path))
    with pytest.raises(foveate.InputError, match="weights of 'learnt', and this is 'gate'"):
        Gate(weights=str(folder))
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(foveate.InputError, match="broken or missing"):
        foveate.attach(model, Learnt.from_pretrained(folder))
    (folder / "model.safetensors").write_bytes(data)
    tensors = load_file(folder / "model.safetensors")
    tensors["queries"][3, 3] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(foveate.InputError, match="queries holds NaN"):
        foveate.attach(model, Learnt.from_pretrained(folder))
    (folder / "model.safetensors").write_bytes(data)
    broken(folder, format=2)
    with pytest.raises(foveate.InputError, match="Install a newer one"):
        Learnt(weights=str(folder))
    (folder / "config.json").write_text("{")
    with pytest.raises(foveate.InputError, match=r"config.json cannot be read \(JSONDecodeError"):
        Learnt(weights=str(folder))

    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(foveate.InputError, match="the Hub gives none either: no network"):
        Learnt(weights="someone/learnt")
    assert not any(name.startswith("_foveate") for name in vars(model))


def test_fields_that_belong_to_weights(model, tmp_path):
    method = Learnt().fresh()
    tokens_of(model, method)
    method.save_pretrained(tmp_path)
    with pytest.raises(foveate.InputError, match=r"space='decoder', and .* was trained with 'features'"):
        Learnt(weights=str(tmp_path), space="decoder")


def test_a_model_of_other_sizes(model, folder, tmp_path):
    """Weights say what they were trained for; those that depend on nothing that differs are taken."""
    other = zoo.load(decoder="llama-deep")  # other encoder layers, the same widths
    assert len(tokens_of(other, Learnt.from_pretrained(folder))) == 4 * 6
    gate = Gate().fresh()
    with gate(model):
        pass
    gate.save_pretrained(tmp_path / "gate")
    config = copy.deepcopy(model.config)
    config.text_config.num_hidden_layers = 3
    small = type(model)(config).eval()
    with pytest.raises(foveate.InputError, match=r"do not fit the model .* Trained for: .*'decoder_layers': 4"):
        foveate.attach(small, Gate(weights=str(tmp_path / "gate")))
    with pytest.raises(foveate.InputError, match="do not fit the model"):
        foveate.attach(small, gate)  # which is in memory


def test_another_model_of_the_same_sizes_is_told_apart(model, folder):
    """By samples of its weights, in any floating-point type; the warning stands in every report."""
    method = Learnt.from_pretrained(folder)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        same = zoo.load(dtype=dtype)
        with method(same) as session:
            same.generate(**zoo.batch(dtype=dtype), max_new_tokens=1)
            assert session.report.warnings == []
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        nn.init.normal_(parameter)
    with Learnt.from_pretrained(folder)(other) as session:
        other.generate(**zoo.batch(), max_new_tokens=1)
        assert "its weights were trained on another model" in session.report.warnings[0]
    assert (
        "trained on another model"
        in foveate.Pictures(other, **zoo.batch()).reduce(Learnt.from_pretrained(folder)).report.warnings[0]
    )


# -- settings, copies, processes


def test_settings_name_weights_by_digest(model, folder):
    """Without a path, and the same wherever the folder lies."""
    method = Learnt.from_pretrained(folder)
    before = method.settings()["weights"]
    tokens_of(model, method)
    assert method.settings()["weights"] == before
    assert before.startswith("learnt-6@")
    assert len(before) == len("learnt-6@") + 16
    assert str(folder.parent) not in json.dumps(method.settings())
    moved = folder.rename(folder.with_name("learnt-6-moved"))
    assert Learnt.from_pretrained(moved).settings()["weights"].partition("@")[2] == before.partition("@")[2]
    fresh = [Learnt().fresh(seed) for seed in (1, 1, 2)]
    for each in fresh:
        tokens_of(model, each)
    names = [each.settings()["weights"] for each in fresh]
    assert names[0] == names[1] != names[2]
    with torch.no_grad():
        fresh[0].module.queries[0, 0] += 1
    assert fresh[0].settings()["weights"] not in names


def test_other_budgets_share_the_weights(model):
    method = Learnt().fresh(4)
    small = method.with_budget(3)  # made before the model is known
    few, many = tokens_of(model, small), tokens_of(model, method)
    assert (len(few), len(many)) == (4 * 3, 4 * 8)
    assert method.module is small.module
    assert copy.copy(method).module is method.module
    assert method.with_fields(positions="original").module is method.module
    assert copy.deepcopy(method).module is not method.module if copy.deepcopy(method)._state.module else True
    assert torch.equal(tokens_of(model, copy.deepcopy(method)), many)
    chosen = method.at_budget(5, zoo.TOKENS, 4)
    assert (chosen.budget, len(tokens_of(model, chosen))) == (5, 4 * 5)


def reduced(method, inputs):
    """In a process of its own, as a worker of ``foveate batch``."""
    return tokens_of(zoo.load(), method, **inputs)


@pytest.mark.parametrize("source", ["memory", "folder", "unbound"])
def test_pickled_to_workers(model, folder, source):
    method = Learnt.from_pretrained(folder) if source == "folder" else Learnt().fresh(9)
    wanted = tokens_of(model, method)
    if source == "unbound":
        method = Learnt().fresh(9)
    data = pickle.dumps(method)
    assert (len(data) > 10_000) == (source == "memory"), "only weights that are in no file travel"
    assert torch.equal(tokens_of(model, pickle.loads(data)), wanted)  # noqa: S301
    assert pickle.loads(data).settings() == method.settings()  # noqa: S301
    if source == "memory":
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found = pool.apply(reduced, (method, zoo.batch()))
        torch.testing.assert_close(found, wanted)


def test_two_models_at_once(model):
    """A method on a second model of other sizes gets a module of its own sizes from its weights."""
    method, other = Learnt().fresh(1), zoo.load(decoder="qwen2")
    first = tokens_of(model, method)
    tokens_of(other, method)
    assert torch.equal(tokens_of(model, method), first)


# -- what may be made


@dataclass(kw_only=True)
class Loose(ProjectorReducer, name="loose", listed=False):
    """Makes what a test says."""

    def reduce(self, tokens):
        return self.answer(tokens)


def making(**changes):
    def answer(tokens):
        batch, number, channels = tokens.features.shape
        index = torch.tensor([[1, 5, 9]]).expand(batch, -1)
        fields = {"made": torch.ones(batch, 3, channels), "attention": torch.full((batch, 3, number), 1 / number), **changes}
        return Reduction(fields.pop("index", index), **{k: v(tokens) if callable(v) else v for k, v in fields.items()})

    method = Loose()
    method.answer = answer
    return method


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"made": lambda t: torch.ones(len(t.features), 2, 48)}, r"has to be of shape \(4, 3, 48\)"),
        ({"space": "decoder"}, r"has to be of shape \(4, 3, 64\)"),
        ({"weights": lambda t: torch.ones(len(t.features), 3, 64)}, "without weights and added"),
        ({"attention": lambda t: torch.ones(len(t.features), 3, 5)}, "attention of shape"),
        ({"index": torch.tensor([[1, 5, 5]] * 4)}, "two tokens at one cell"),
        ({"index": torch.tensor([[1, 5, 64]] * 4)}, "one that does not exist"),
    ],
)
def test_faults_of_methods_are_found(model, changes, message):
    with pytest.raises(foveate.FoveateError, match=message):
        foveate.encode(model, making(**changes), **zoo.batch())


def test_cells_out_of_order(model):
    """They are fine with compact positions, and cannot have original ones."""
    method = making(index=torch.tensor([[9, 1, 5]] * 4))
    assert foveate.encode(model, method, **zoo.batch()).report.images[0].kept == [9, 1, 5]
    method.positions = "original"
    with pytest.raises(foveate.InputError, match="Use positions='compact'"):
        foveate.encode(model, method, **zoo.batch())


def test_reports_tell_what_was_made(model, folder):
    encoded = foveate.encode(model, Learnt.from_pretrained(folder), **zoo.batch())
    image = encoded.report.images[0]
    assert image.made
    assert json.loads(encoded.report.to_json())["images"][0]["made"] is True
    assert not foveate.encode(model, "spatial", budget=6, **zoo.batch()).report.images[0].made
    assert image.kept == sorted(set(image.kept))
    assert encoded.reduction.attention.sum(-1).allclose(torch.ones(4, 6))
    nothing_told = foveate.encode(model, making(attention=None), **zoo.batch()).report.images[0]
    assert set(nothing_told.source) == {-1}


@given(st.integers(1, 3), st.integers(1, 6), st.integers(0, 4), st.integers(0, 2**31))
def test_anchors(batch, outputs, more, seed):
    """Against choosing one at a time."""
    attention = torch.rand(batch, outputs, outputs + more, generator=torch.Generator().manual_seed(seed)).mul(4).round() / 4
    for row, found in zip(attention.tolist(), anchors(attention).tolist(), strict=True):
        wanted, free = {}, set(range(outputs + more))
        for output in sorted(range(outputs), key=lambda m: (-max(row[m]), m)):
            wanted[output] = min(free, key=lambda cell: (-row[output][cell], cell))
            free.remove(wanted[output])
        assert found == [wanted[output] for output in range(outputs)]


def test_trained_leaves_defaults_to_the_class_it_is_mixed_into():
    assert (Gate().positions, Learnt().positions) == ("original", "compact")
    assert issubclass(Gate, Trained)


def test_weights_that_are_no_numbers_are_named(model):
    """As those of a training that has failed; the encoder is not to blame."""
    method = Learnt().fresh(1)
    with foveate.attach(model, method):
        next(method.module.parameters()).data.fill_(float("nan"))
        with pytest.raises(foveate.InputError, match="learnt: its weights hold NaN"):
            model.generate(**zoo.batch(), max_new_tokens=1)
