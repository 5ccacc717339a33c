"""One training run: a method with weights, or LoRA with any method attached, from data to a folder that can be loaded."""

from __future__ import annotations

import dataclasses
import json
import math
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, default_collate
from transformers import PrinterCallback
from transformers.utils.import_utils import is_accelerate_available

from ..api import attach
from ..engine.session import Session
from ..errors import InputError, MissingExtraError
from ..fingerprint import digest
from ..jsonl import parsed
from ..loading import Loaded, load, own_device, part
from ..methods.base import Method
from ..methods.saved import code_of
from ..methods.trained import Trained
from ..places import ready_folder, user_path, write_text
from .batches import Collator
from .drawn import DrawnSamples
from .encoded import Memory
from .lora import adapted, checked_parts, save_adapter
from .prepared import Prepared, moved, prepares
from .settings import TrainSettings, number, processes
from .sources import Rows, Tell, datasets, read_rows
from .telling import Log, Step, Steps, Stopping
from .trainer import MethodTrainer, last_checkpoint

FIRST = 1500  # conversations that first values are taken from, at most: methods take what they need
RUN, CHECKPOINTS, ADAPTER = "run.json", "checkpoints", "adapter"


def train(method: Method, settings: TrainSettings, out: Path, tell: Tell = print, step: Step = lambda *_: None) -> dict[str, Any]:
    """Train, or go on with an interrupted run in the same folder.

    Parameters
    ----------
    method : with weights, which are trained from their own or from random ones. LoRA alone is trained with any method attached.
    settings : of the run.
    out : gets ``config.json`` and ``model.safetensors`` of the method, ``adapter/`` where there is one, ``log.jsonl``, and
        checkpoints while the run lasts. Where LoRA alone is trained it is the adapter itself.
    tell : prints a line.
    step : is told how many steps are done.

    Returns
    -------
    A summary, as it is saved with the weights.

    Raises
    ------
    InputError : data, model or settings are wrong, or the folder holds another run.
    MissingExtraError : accelerate or PEFT is not installed.
    """
    if not is_accelerate_available():
        raise MissingExtraError("accelerate", "train")
    own = method.learns if isinstance(method, Trained) else ("projector", "lora")
    learns = checked_parts(settings.train or own, isinstance(method, Trained))
    learner = method if isinstance(method, Trained) and "module" in learns else None
    out = ready_folder(out)
    rows = read_rows(method, learner, settings, tell)
    try:
        place = own_device(None)
        loaded = load(settings.model, dtype=settings.dtype(place), device=place)
        if learner is not None and learner.weights is None:
            method = learner = learner.fresh(settings.seed)
        about = _same_run(method, settings, learns, loaded, rows, out)
        data, held_out = datasets(method, learner, settings, rows, loaded, out, tell)
        return _train(method, learner, settings, learns, loaded, data, held_out, out, about, tell, step)
    finally:
        part()


def _train(
    method: Method,
    learner: Trained | None,
    settings: TrainSettings,
    learns: tuple[str, ...],
    loaded: Loaded,
    data: Dataset[Any],
    held_out: Dataset[Any],
    out: Path,
    about: dict[str, Any],
    tell: Tell,
    step: Step,
) -> dict[str, Any]:
    model = loaded.model.requires_grad_(False)
    if "lora" in learns and hasattr(model, "peft_config"):
        raise InputError(f"{loaded.name} has an adapter already. Merge it into its model, save that, and train on it.")
    if "lora" in learns:
        model = adapted(model, settings.rank, projector="projector" in learns, seed=settings.seed)
    with attach(model, method, train=learner is not None) as session:
        collate: Any = Collator(loaded)
        if learner is not None and prepares(learner):
            data = Prepared(learner, model, data, collate, out / "prepared-train", tell)
            held_out = Prepared(learner, model, held_out, collate, out / "prepared-validation", tell)
            collate = default_collate
        parts = session.parts()
        memory = Memory(parts, method.before_decoder(), settings.remember * 1e9) if settings.remember else None
        trainer = _trainer(session, learner, memory, model, collate, data, held_out, settings, out, tell, step)
        checkpoint = last_checkpoint(out / CHECKPOINTS)
        if learner is not None and learner.weights is None and checkpoint is None:
            begin = islice(DataLoader(data, settings.batch, collate_fn=collate), math.ceil(FIRST / settings.batch))
            learner.initialise(model, (moved(batch, model.device) for batch in begin))
        if checkpoint is not None:
            tell(f"going on from {checkpoint}")
        stopping = next(each for each in trainer.callback_handler.callbacks if isinstance(each, Stopping))
        with stopping.listening():
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        if stopping.asked:
            raise KeyboardInterrupt
        losses = {
            name: value for line in trainer.state.log_history for name, value in line.items() if name in ("loss", "eval_loss")
        }
        summary = {**about, "steps": trainer.state.global_step, "best_step": trainer.state.best_global_step, **losses}
        if learner is not None:
            batches = [moved(batch, model.device) for batch in DataLoader(held_out, settings.batch, collate_fn=collate)]
            model.eval()
            learner.module.eval()
            learner = learner.with_fields(**learner.calibrate(model, batches, settings.tolerance))
        if trainer.args.should_save:
            _save(learner, model, loaded.name, out, summary, learns)
    return summary


def _save(learner: Trained | None, model: Any, base: str, out: Path, summary: dict[str, Any], learns: tuple[str, ...]) -> None:
    if learner is not None:
        learner.save_pretrained(out, training={**summary, "adapter": "lora" in learns})
        write_text(out / "README.md", learner.card(out.name))
    if "lora" in learns:
        base = str(user_path(base).absolute()) if user_path(base).is_dir() else base
        save_adapter(model, out if learner is None else out / ADAPTER, base)


def _same_run(
    method: Method,
    settings: TrainSettings,
    learns: tuple[str, ...],
    loaded: Loaded,
    rows: Rows | None,
    out: Path,
) -> dict[str, Any]:
    """What the run is, for the weights and for a run that goes on.

    Raises
    ------
    InputError : another run is in the folder.
    """
    ignored = ("report", "images", "eval_data", "skip_broken", "remember")  # of what follows from them, the data have a digest
    contents = [[row.messages, [(str(path), path.stat().st_size) for path in row.pictures]] for each in rows or () for row in each]
    about: dict[str, Any] = {
        "method": method.settings(),
        "settings": {name: value for name, value in dataclasses.asdict(settings).items() if name not in ignored},
        "trains": list(learns),
        "code": code_of(method),
        "weights": loaded.weights,
        "data": digest(json.dumps(contents)),
        "processes": processes(),
    }
    about = json.loads(json.dumps(about))
    path = out / RUN
    if path.exists():
        try:
            earlier = parsed(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{path} cannot be read. Choose another folder, or remove this one.") from error
        changed = [name for name in about if earlier.get(name) != about[name]]
        if changed:
            raise InputError(
                f"{out} holds another run: its {', '.join(changed)} differ. Choose another --out, or remove {path.name} and "
                f"{CHECKPOINTS} there to begin anew."
            )
    elif number() == 0:
        write_text(path, json.dumps(about, indent=1) + "\n")
    return about


def _trainer(
    session: Session,
    learner: Trained | None,
    memory: Memory | None,
    model: Any,
    collate: Any,
    data: Any,
    held_out: Any,
    settings: TrainSettings,
    out: Path,
    tell: Tell,
    step: Step,
) -> MethodTrainer:
    """A Trainer, with checkpoints in ``out``."""
    evaluates = len(held_out) > 0
    shuffled = not isinstance(data, DrawnSamples)  # which are drawn at random already
    arguments = settings.arguments(out / CHECKPOINTS, len(data), shuffled=shuffled, evaluates=evaluates)
    own = set() if learner is None else {id(parameter) for parameter in learner.module.parameters()}
    learnt = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [each for each in learnt if id(each) in own], "lr": settings.lr},
        {"params": [each for each in learnt if id(each) not in own], "lr": settings.lora_lr},
    ]
    made = MethodTrainer(
        session,
        learner,
        memory,
        model=model,
        args=arguments,
        data_collator=collate,
        train_dataset=data,
        eval_dataset=held_out if evaluates else None,
        optimizers=(torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.0), None),
        callbacks=[Log(out / "log.jsonl", tell), Steps(step), Stopping()],
    )
    made.remove_callback(PrinterCallback)
    return made
