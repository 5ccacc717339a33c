"""Training runs: what is trained, that they go on bit by bit, in several processes, and what they refuse."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import foveate
from foveate.answering import ask
from foveate.chat import make_inputs
from foveate.errors import InputError, MissingExtraError
from foveate.images import open_picture
from foveate.loading import load
from foveate.training import settings as training_settings
from foveate.training.run import train
from foveate.training.settings import TrainSettings

from ..trained_methods import Learnt

ROOT = Path(__file__).parents[2]
SMALL = dict(batch=2, steps=4, save_every=2, turns=2, checked=2, lr=0.01)
METHODS = str(Path(__file__).parents[1] / "trained_methods.py")


def command(*arguments: str, out: Path) -> list[str]:
    options = ["--steps", "6", "--batch", "2", "--save-every", "2", "--turns", "2", "--checked", "2", "--lr", "0.01"]
    given = ["train", arguments[0], "--import", METHODS, *arguments[1:], *options, "--out", str(out)]
    return [sys.executable, "-m", "foveate", *given]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_a_method_is_trained_saved_and_loaded(tmp_path):
    told: list[str] = []
    summary = train(Learnt(), TrainSettings(**SMALL), tmp_path, told.append)
    assert summary["steps"] == 4
    assert {"loss", "eval_loss", "data", "weights"} <= summary.keys()
    assert any(line.startswith("step 4/4: loss on validation data") for line in told)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log if "loss" in line] == [2, 4]
    assert (tmp_path / "README.md").read_text().startswith("---\nlibrary_name: foveate")
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["training"]["steps"] == 4
    assert not config["training"]["adapter"]
    # only the method has changed, and what was saved is what was trained
    model = load("pocket").model
    fresh = Learnt().fresh()
    with foveate.attach(model, fresh, train=True):
        begun = {name: value.clone() for name, value in fresh.module.state_dict().items()}
    saved = weights(tmp_path)
    assert saved.keys() == begun.keys()
    assert not any(torch.equal(saved[name], begun[name]) for name in saved)
    with foveate.attach(model, "learnt", weights=str(tmp_path)) as session:
        assert all(torch.equal(value, saved[name]) for name, value in session.method.module.state_dict().items())


def test_steps_are_those_of_a_loop_by_hand(tmp_path):
    """AdamW with the trainer's schedule, over the same batches."""
    from foveate.training.batches import Collator
    from foveate.training.drawn import DrawnSamples

    train(Learnt(), TrainSettings(**{**SMALL, "save_every": 4, "precision": "fp32"}), tmp_path, lambda _: None)
    loaded, method = load("pocket"), Learnt().fresh()
    data, collate = DrawnSamples(8, 0, 2), Collator(loaded)
    loaded.model.requires_grad_(False)
    with foveate.attach(loaded.model, method, train=True) as session:
        optimizer = torch.optim.AdamW(session.parameters(), 0.01, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / 4)))
        for step in range(4):
            loss = loaded.model(**collate([data[2 * step], data[2 * step + 1]])).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(session.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        made = {name: value.clone() for name, value in method.module.state_dict().items()}
    for name, value in weights(tmp_path).items():
        torch.testing.assert_close(value, made[name], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("how", ["killed", "interrupted"])
def test_an_interrupted_run_ends_as_one_that_was_not(tmp_path, how):
    """Killed by its pid after its first checkpoint, or ended by Ctrl-C; the same command goes on, bit by bit."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    subprocess.run(command("learnt", out=whole), env=environment(), check=True, timeout=300, capture_output=True)
    running = subprocess.Popen(
        command("learnt", out=parts),
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # where the tests run in the background
    )
    marks = parts / "checkpoints" / "checkpoint-2" / "complete.json"
    end = time.monotonic() + 200
    while not marks.exists():
        assert running.poll() is None, running.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.02)
    running.send_signal(signal.SIGKILL if how == "killed" else signal.SIGINT)
    code = running.wait(timeout=100)
    err = running.stderr.read()
    assert code == (-signal.SIGKILL if how == "killed" else 130), err
    if how == "interrupted":
        assert "the same command goes on from there" in err
    assert not (parts / "config.json").exists(), "nothing is half-done"
    again = subprocess.run(command("learnt", out=parts), env=environment(), timeout=300, capture_output=True, text=True, check=True)
    assert "going on from" in again.stderr
    one, other = weights(whole), weights(parts)
    assert all(torch.equal(one[name], other[name]) for name in one)
    if how == "interrupted":  # between two lines of the log, the second of which is then about fewer steps
        return
    lines = [[json.loads(line) for line in (place / "log.jsonl").read_text().splitlines()] for place in (whole, parts)]
    losses = [[(line["step"], line["loss"]) for line in each if "loss" in line] for each in lines]
    assert losses[0] == losses[1]


def test_a_checkpoint_that_was_being_written_does_not_count(tmp_path):
    from foveate.training.trainer import COMPLETE, last_checkpoint

    for step in (2, 10, 12):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / COMPLETE).write_text("{}")
    (tmp_path / "checkpoint-12" / COMPLETE).unlink()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    assert not (tmp_path / "checkpoint-12").exists()
    assert last_checkpoint(tmp_path / "none") is None


def test_two_processes_are_one_with_the_batches_of_both(tmp_path):
    """On the CPU by torchrun: two processes take the steps of one that accumulates two batches."""
    alone, both = tmp_path / "alone", tmp_path / "both"
    train(Learnt(), TrainSettings(**{**SMALL, "accumulate": 2, "steps": 6}), alone, lambda _: None)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29541", "-m"]
    done = subprocess.run(
        [*launch, *command("learnt", out=both)[2:]], env=environment(), timeout=300, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one, other = weights(alone), weights(both)
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], atol=2e-4, rtol=1e-2)
    assert done.stderr.count("step 6/6: loss on") == 1, "one process tells"


def test_another_run_in_the_same_folder_is_refused(tmp_path, monkeypatch):
    train(Learnt(), TrainSettings(**SMALL), tmp_path, lambda _: None)
    for method, changed in ((Learnt(budget=4), "method"), (Learnt(), "settings")):
        settings = TrainSettings(**{**SMALL, **({"seed": 3} if changed == "settings" else {})})
        with pytest.raises(InputError, match=f"holds another run: its .*{changed} differ"):
            train(method, settings, tmp_path, lambda _: None)
    monkeypatch.setattr("foveate.training.run.code_of", lambda _: "another")
    with pytest.raises(InputError, match="its code differ"):
        train(Learnt(), TrainSettings(**SMALL), tmp_path, lambda _: None)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(InputError, match=r"run.json cannot be read"):
        train(Learnt(), TrainSettings(**SMALL), tmp_path, lambda _: None)


@pytest.fixture
def files(tmp_path):
    for number in range(4):
        Image.new("RGB", (192, 192), (60 * number, 90, 200)).save(tmp_path / f"{number}.png")
    entries = [
        {"image": f"{number % 4}.png", "question": "what color is the star ?", "answer": ("red", "blue")[number % 2]}
        for number in range(24)
    ]
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(json.dumps(entry) for entry in entries))
    return path


def test_data_of_ones_own(tmp_path, files):
    """Every twentieth conversation is held out; one epoch is all others once."""
    told: list[str] = []
    settings = TrainSettings(data=str(files), batch=2, save_every=5, lr=0.01)
    summary = train(Learnt(), settings, tmp_path / "out", told.append)
    assert summary["steps"] == 11
    assert "eval_loss" in summary
    with files.open("a") as file:
        file.write("\n{")
    with pytest.raises(InputError, match="line 25 of"):
        train(Learnt(), settings, tmp_path / "broken", told.append)
    assert not (tmp_path / "broken" / "run.json").exists()
    skipping = TrainSettings(data=str(files), batch=2, save_every=5, lr=0.01, skip_broken=True, limit=4, steps=1)
    train(Learnt(), skipping, tmp_path / "skipped", told.append)
    assert any("1 of 25 entries" in line for line in told)


def test_the_model_answers_where_data_have_no_answers(tmp_path, files, monkeypatch):
    monkeypatch.setattr(Learnt, "needs_answers", False)
    lines = [json.loads(line) for line in files.read_text().splitlines()[:4]]
    for line in lines:
        del line["answer"]
    files.write_text("\n".join(json.dumps(line) for line in lines))
    told: list[str] = []
    train(Learnt(), TrainSettings(data=str(files), batch=2, steps=1), tmp_path / "out", told.append)
    assert any("answers 4 questions with all visual tokens" in line for line in told)
    answers = [json.loads(line) for line in (tmp_path / "out" / "answers-a.0.jsonl").read_text().splitlines()]
    loaded = load("pocket")
    for line, given in zip(lines, answers, strict=True):
        image = open_picture(files.parent / line["image"]).image
        inputs, _ = make_inputs(loaded.processor, loaded.model, image, line["question"])
        assert given["answer"] == ask(loaded.model, loaded.processor, inputs, None, new_tokens=8).text


def test_a_loss_that_is_no_number_ends_the_run(tmp_path, monkeypatch):
    """With the checkpoints that there are, and no weights that look like those of a whole run."""
    steps, objective = [], Learnt.objective

    def breaks(self, model, batch):
        loss, told = objective(self, model, batch)
        steps.extend([loss] if self.module.training else [])
        return (loss * float("nan") if len(steps) == 3 else loss), told

    monkeypatch.setattr(Learnt, "objective", breaks)
    with pytest.raises(InputError, match=r"the loss is nan in step 3"):
        train(Learnt(), TrainSettings(**SMALL), tmp_path, lambda _: None)
    assert (tmp_path / "checkpoints" / "checkpoint-2" / "complete.json").exists()
    assert not (tmp_path / "config.json").exists()


def test_a_model_with_an_adapter_gets_no_second_one(tmp_path):
    with pytest.raises(InputError, match=r"pocket\+prumerge has an adapter already"):
        train(foveate.PruMerge(), TrainSettings(**SMALL, model="pocket+prumerge"), tmp_path, lambda _: None)


def test_what_is_frozen_is_in_evaluation_mode(tmp_path, monkeypatch):
    """The method is in training mode, the model is not; while validation data are looked at neither is."""
    seen, objective = [], Learnt.objective

    def noted(self, model, batch):
        seen.append((self.module.training, model.model.language_model.training))
        return objective(self, model, batch)

    monkeypatch.setattr(Learnt, "objective", noted)
    train(Learnt(), TrainSettings(**SMALL), tmp_path, lambda _: None)
    assert seen == [(True, False), (True, False), (False, False)] * 2


def test_lora_with_a_method_attached(tmp_path):
    """Adapters and projector change, the adapter loads by its folder, and prompts were short."""
    told: list[str] = []
    train(foveate.PruMerge(), TrainSettings(**SMALL, rank=4), tmp_path, told.append)
    state = load_file(tmp_path / "adapter_model.safetensors")
    assert all(("language_model.layers" in name and "lora_" in name) or "multi_modal_projector" in name for name in state)
    assert len([name for name in state if "lora_" in name]) == 2 * 7 * 6
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "pocket"
    assert load(str(tmp_path)).model.peft_config["default"].r == 4


@pytest.mark.parametrize("method", ["fovea", "dyvte:pocket"])
def test_lora_beside_weights_that_stay(tmp_path, method):
    """A method that can have weights, with and without some, is attached and not trained."""
    chosen = foveate.get(method)
    train(chosen, TrainSettings(**{**SMALL, "steps": 2}, rank=2, train=("projector", "lora")), tmp_path, lambda _: None)
    assert (tmp_path / "adapter_model.safetensors").exists()
    assert not (tmp_path / "model.safetensors").exists()
    with pytest.raises(InputError, match="has to be trained and has no weights"):
        train(Learnt(), TrainSettings(**SMALL, train=("lora",)), tmp_path / "x", lambda _: None)


def test_a_method_with_lora(tmp_path):
    train(Learnt(), TrainSettings(**SMALL, train=("module", "projector", "lora"), rank=2), tmp_path, lambda _: None)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["training"]["adapter"]
    model = load(str(tmp_path / "adapter")).model
    with foveate.attach(model, "learnt", weights=str(tmp_path)) as session:
        assert session.method.warnings == []
    with foveate.attach(load("pocket").model, "learnt", weights=str(tmp_path)) as session:
        assert any("adapter" in warning for warning in session.method.warnings)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"precision": "fp8"}, "precision='fp8'; expected auto, fp32 or bf16"),
        ({"report": "paper"}, "report='paper'"),
        ({"train": ("module", "projector")}, "the projector is saved in an adapter"),
        ({"train": ("modul",)}, "expected some of module, projector, lora"),
        ({"data": "/no/such/file.json"}, "cannot be read"),
    ],
)
def test_settings_that_cannot_be(tmp_path, changed, message):
    with pytest.raises(InputError, match=message):
        train(Learnt(), TrainSettings(**{**SMALL, **changed}), tmp_path, lambda _: None)
    assert not (tmp_path / "run.json").exists()


def test_what_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setattr(training_settings.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install trackio"):
        TrainSettings(report="trackio")
    monkeypatch.setattr("foveate.training.run.is_accelerate_available", lambda: False)
    with pytest.raises(MissingExtraError, match=r"foveate\[train\]"):
        train(Learnt(), TrainSettings(**SMALL), tmp_path, lambda _: None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prumerge"], "prumerge has no weights of its own. Use: foveate train lora --method prumerge"),
        (["learnt", "--method", "prumerge"], "--method belongs to 'foveate train lora'"),
        (["learnt", "--model", "someone/model"], "give --data"),
    ],
)
def test_the_command_line(tmp_path, arguments, message, capsys, monkeypatch):
    from foveate.cli import run

    monkeypatch.setattr(sys, "argv", ["foveate", "train", *arguments, "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as error:
        run()
    assert error.value.code == 2
    assert message in capsys.readouterr().err.replace("\n", " ")
