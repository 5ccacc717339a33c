"""How a training run is set up: its settings, and the Trainer's arguments that follow from them."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from ..errors import InputError
from ..loading import POCKET
from ..precision import has_bfloat16

REPORTS = ("none", "tensorboard", "trackio")
PRECISIONS = ("auto", "fp32", "bf16")
ENOUGH = 40  # steps of warm-up


@dataclass(frozen=True)
class TrainSettings:
    """What is trained, on what, and how.

    Attributes
    ----------
    model : Hub id, folder, or "pocket".
    data : file of conversations (``read_conversations``), or "pocket", which draws scenes.
    images : folder of the pictures; None = that of the file.
    eval_data : file of conversations for validation; None = some of ``data`` are held out.
    train : some of "module", "projector" and "lora"; None = what the method learns.
    rank : of LoRA.
    steps : of the optimizer; None = ``epochs`` times the data, of "pocket" 1000.
    batch, accumulate : conversations at a time in each process, and how many times before a step.
    lr, lora_lr : learning rates of the method's weights, and of adapters and projector; they fall to 0 along a cosine.
    turns : questions about a drawn scene.
    save_every : steps between checkpoints, and looks at validation data.
    precision : "auto", "fp32" or "bf16"; "auto" takes bfloat16 where the machine multiplies it in hardware.
    tolerance : share of the answers that what is chosen after training may lose.
    limit : how many conversations are used, at most; of drawn scenes, after how many they come again, with other questions.
    remember : gigabytes of encoded pictures that are kept in memory, for when they come again.
    checked : how many are used for validation, at most.
    """

    model: str = POCKET
    data: str = POCKET
    images: str | None = None
    eval_data: str | None = None
    train: tuple[str, ...] | None = None
    rank: int = 16
    steps: int | None = None
    epochs: float = 1.0
    batch: int = 8
    accumulate: int = 1
    lr: float = 1e-3
    lora_lr: float = 2e-4
    turns: int = 4
    save_every: int = 100
    precision: str = "auto"
    checkpointing: bool = False
    report: str = "none"
    seed: int = 0
    limit: int | None = None
    remember: float = 0.0
    checked: int = 160
    skip_broken: bool = False
    tolerance: float = 0.005

    def __post_init__(self) -> None:
        for name, known in (("precision", PRECISIONS), ("report", REPORTS)):
            if getattr(self, name) not in known:
                raise InputError(f"{name}={getattr(self, name)!r}; expected {', '.join(known[:-1])} or {known[-1]}")
        if self.report != "none" and importlib.util.find_spec(self.report) is None:
            raise InputError(f"{self.report} is not installed, and the run shall report to it. Run: pip install {self.report}")

    def dtype(self, device: str | None) -> str:
        """Of the frozen weights of the model: bfloat16 on a GPU where that is fast."""
        on_gpu = torch.cuda.is_available() and device != "cpu"
        return "bfloat16" if on_gpu and self.precision != "fp32" and has_bfloat16("cuda") else "float32"

    def arguments(self, folder: Path, rows: int, *, shuffled: bool, evaluates: bool) -> TrainingArguments:
        """Arguments of a Trainer.

        Parameters
        ----------
        folder : for checkpoints.
        rows : of the data.
        shuffled : whether the order of the data is drawn at random.
        evaluates : whether there are validation data.
        """
        on_gpu = torch.cuda.is_available()
        steps = self.steps or math.ceil(self.epochs * rows / (self.batch * self.accumulate * processes()))
        options: dict[str, Any] = {}
        if self.checkpointing:
            options |= {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
        return TrainingArguments(
            output_dir=str(folder),
            max_steps=steps,
            per_device_train_batch_size=self.batch,
            per_device_eval_batch_size=self.batch,
            gradient_accumulation_steps=self.accumulate,
            lr_scheduler_type="cosine",
            warmup_steps=min(ENOUGH, steps // 5),
            bf16=self.precision == "bf16" or (self.precision == "auto" and has_bfloat16("cuda" if on_gpu else "cpu")),
            use_cpu=not on_gpu,
            seed=self.seed,
            train_sampling_strategy="random" if shuffled else "sequential",
            logging_steps=min(20, self.save_every),
            eval_strategy="steps" if evaluates else "no",
            eval_steps=self.save_every,
            save_steps=self.save_every,
            save_total_limit=2,
            load_best_model_at_end=evaluates,
            metric_for_best_model="eval_loss" if evaluates else None,
            prediction_loss_only=True,
            remove_unused_columns=False,
            label_names=["labels"],
            dataloader_pin_memory=on_gpu,
            dataloader_num_workers=4 if on_gpu else 0,
            ddp_find_unused_parameters=False,
            disable_tqdm=True,
            report_to=[] if self.report == "none" else [self.report],
            **options,
        )


def processes() -> int:
    """How many processes train together."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def number() -> int:
    """Which of them this is, from 0 on; the first one writes files and tells."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def wait_for_all() -> None:
    """Go on when all processes have come here."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
