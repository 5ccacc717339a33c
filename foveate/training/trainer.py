"""A stock Trainer whose loss is that of a method, and whose checkpoints hold what is trained and nothing else."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..engine.model.anatomy import innermost
from ..engine.session import Session
from ..errors import InputError
from ..methods.trained import Trained
from .encoded import Memory

COMPLETE = "complete.json"  # written last into a checkpoint, so that one of a killed run is told from others
METHOD = "foveate"  # folder of the method's weights in a checkpoint


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint of a run; those that were being written when the run was killed are removed."""
    found = []
    for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        if (path / COMPLETE).is_file():
            found.append(path)
        else:
            shutil.rmtree(path, ignore_errors=True)
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


class MethodTrainer(Trainer):
    """Trains the weights of an attached method, and adapters of the model if there are any.

    Parameters
    ----------
    session : the attached method.
    learner : the method, where its weights are trained; None = adapters alone are.
    memory : of encoded pictures; None = they are encoded each time.
    **options : of the Trainer.
    """

    def __init__(self, session: Session, learner: Trained | None, memory: Memory | None = None, **options: Any) -> None:
        self.session, self.part, self.memory = session, learner, memory
        self.adapted = hasattr(options["model"], "peft_config")
        self._told: dict[str, list[float]] = defaultdict(list)
        super().__init__(**options)
        self.model_accepts_loss_kwargs = False  # losses are means over a batch

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The objective of the method; of a method without weights the loss of the model."""
        # not through the wrapper of several processes: an objective may run the model more than once, or not at all with gradients
        bare, training = self.accelerator.unwrap_model(model), model.training
        if not self.adapted:
            innermost(bare).eval()  # what is frozen has no dropout
            if self.part is not None:
                self.part.module.train(training)
        if self.memory is not None:
            inputs = self.memory.inputs(inputs)
        told: dict[str, float] = {}
        if self.part is None:
            loss = bare(**inputs).loss
        else:
            self.part.progress = self.state.global_step / max(1, self.state.max_steps)
            loss, told = self.part.objective(bare, inputs)
        for name, value in told.items():
            self._told[name].append(float(value))
        return (loss, None) if return_outputs else loss

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """A step of the Trainer; gradients of several processes are averaged here."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not bool(torch.isfinite(loss)):
            raise InputError(
                f"the loss is {float(loss)} in step {self.state.global_step + 1}. Try a smaller learning rate; the checkpoints "
                "so far are kept."
            )
        if self.accelerator.num_processes > 1 and self.accelerator.sync_gradients:
            for parameter in self._trained():
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                parameter.grad.copy_(self.accelerator.reduce(parameter.grad, "mean"))
        return loss

    def _trained(self) -> Iterator[nn.Parameter]:
        model: Any = self.model
        return (parameter for parameter in model.parameters() if parameter.requires_grad)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The loss alone. An objective may need gradients for it, so they are not switched off."""
        told = {name: list(values) for name, values in self._told.items()}
        with self.compute_loss_context_manager():
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
        self._told = defaultdict(list, told)
        return loss.detach(), None, None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The Trainer's log, with the means of what the objective told since the last one."""
        if "loss" in logs:
            logs = {**logs, **{name: sum(values) / len(values) for name, values in self._told.items() if values}}
            self._told.clear()
        super().log(logs, start_time)

    # -- checkpoints

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        if self.adapted:
            super()._save(str(folder), state_dict)
        if self.part is not None:
            self.session.save_weights(folder / METHOD)

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        folder = Path(str(self.args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            (folder / COMPLETE).write_text(json.dumps({"step": self.state.global_step}) + "\n")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.adapted:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.part is not None:
            self.session.load_weights(Path(resume_from_checkpoint) / METHOD)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        if best is not None:
            self._load_from_checkpoint(best, self.model)
