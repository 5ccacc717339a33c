"""Fine-tune the pocket model with a method attached: ``python -m foveate.training.lora --method prumerge --out adapter``.

LLaVA's LoRA stage in small: low-rank adapters on all linear layers of the decoder, the projector trained in full, everything
else frozen. The data are conversations of several turns about drawn scenes, and only answers are taught. The method shortens the
prompt of every step, as ``foveate.attach`` does for any Trainer. Interrupted runs continue with the same command; the adapter that
is written is the one whose loss on validation scenes was lowest.
"""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils.import_utils import is_accelerate_available

from ..api import attach
from ..errors import MissingExtraError
from ..pocket import NAME, load_pocket
from ..pocket.batches import IGNORE, normalise
from ..pocket.questions import PocketQuestion, ask
from ..pocket.scenes import GRID, draw_scene
from ..pocket.vocabulary import BOS, EOS, IMAGE, PAD, TOKEN_ID, encode
from ..precision import has_bfloat16

LAYERS = r".*language_model\.layers\.\d+\..*_proj"
RANK = 32
BATCH = 8  # conversations per step
RATE = 1e-3
SAVE_EVERY = 100  # steps between checkpoints, and looks at validation scenes
TURNS = 4  # questions of a training conversation, at most
CHECKED = 160  # validation scenes, with one question each


def conversation(questions: list[PocketQuestion]) -> dict[str, Tensor]:
    """Several turns as the chat template writes them: ``input_ids`` and ``labels`` [S]; only answers are taught."""
    ids, labels = [BOS], [IGNORE]
    for number, question in enumerate(questions):
        asked = [TOKEN_ID["user:"], *[IMAGE] * (0 if number else GRID * GRID), *encode(question.text + " assistant:")]
        answer = [*encode(question.answer), EOS]
        ids += asked + answer
        labels += [IGNORE] * len(asked) + answer
    return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}


class Conversations(Dataset[dict[str, Tensor]]):
    """Conversation ``index`` is a function of (split, seed, index); test scenes are of another split and other random streams."""

    def __init__(self, number: int, seed: int, turns: int, split: str = "train") -> None:
        self.number, self.seed, self.turns, self.split = number, seed, turns, split

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        random = Random(f"finetune/{self.split}/{self.seed}/{index}")
        questions: list[PocketQuestion] = []
        while not questions:
            scene = draw_scene(random, split=self.split)
            questions = ask(scene, random, self.turns)
        return {**conversation(questions), "pixel_values": normalise([scene.image])[0]}


def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A batch, padded on the right: ``input_ids``, ``attention_mask`` and ``labels`` [B, S], ``pixel_values`` [B, 3, H, W]."""

    def padded(name: str, value: int) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence([row[name] for row in rows], batch_first=True, padding_value=value)

    ids = padded("input_ids", PAD)
    pixels = torch.stack([row["pixel_values"] for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != PAD).long(), "labels": padded("labels", IGNORE), "pixel_values": pixels}


def adapted(seed: int = 0) -> Any:
    """The pocket model inside PEFT, with adapters that change nothing yet.

    Raises
    ------
    MissingExtraError : PEFT is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise MissingExtraError("peft", "peft") from error
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=LAYERS, modules_to_save=["multi_modal_projector"])
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return get_peft_model(load_pocket()[0], config)


class _Telling(TrainerCallback):
    """Losses on stderr; stdout stays empty."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        shown = {name: value for name, value in (logs or {}).items() if name in ("loss", "eval_loss")}
        for name, value in shown.items():
            what = "loss" if name == "loss" else "loss on validation scenes"
            self.console.print(f"step {state.global_step}/{state.max_steps}: {what} {value:.4f}")


def trainer(model: Any, folder: Path, steps: int, seed: int) -> Trainer:
    """A stock Trainer; checkpoints are in ``folder``.

    Raises
    ------
    MissingExtraError : accelerate, which the Trainer needs, is not installed.
    """
    if not is_accelerate_available():
        raise MissingExtraError("accelerate", "train")
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=BATCH,
        learning_rate=RATE,
        lr_scheduler_type="cosine",
        warmup_steps=min(40, steps // 5),
        bf16=has_bfloat16("cuda" if torch.cuda.is_available() else "cpu"),
        use_cpu=not torch.cuda.is_available(),
        seed=seed,
        train_sampling_strategy="sequential",  # every conversation is drawn at random already
        logging_steps=20,
        eval_strategy="steps",
        eval_steps=SAVE_EVERY,
        eval_on_start=True,
        save_steps=SAVE_EVERY,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        prediction_loss_only=True,
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=False,
        disable_tqdm=True,
        report_to=[],
    )
    made = Trainer(
        model=model,
        args=arguments,
        data_collator=collate,
        train_dataset=Conversations(steps * BATCH, seed, TURNS),
        eval_dataset=Conversations(CHECKED, 0, 1, "validation"),
        callbacks=[_Telling()],
    )
    made.remove_callback(PrinterCallback)
    return made


def save_adapter(model: Any, folder: Path) -> None:
    """Write the adapter (bfloat16 safetensors) in PEFT format; its base is named "pocket", and no path is in it."""
    weights = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    model.peft_config["default"].base_model_name_or_path = NAME
    model.save_pretrained(folder, state_dict=weights, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's form of a model card, not filled in


def finetune(
    method: Annotated[str, typer.Option(help="Name of the method, as listed by 'foveate methods'.")] = "prumerge",
    steps: Annotated[int, typer.Option(min=1, help="Steps of 8 conversations.")] = 1500,
    out: Annotated[Path, typer.Option(help="Folder for the adapter, with checkpoints in it.")] = Path("pocket-run/adapter"),
    seed: int = 0,
) -> None:
    """Fine-tune the pocket model with a method attached, or continue an interrupted run in the same folder."""
    model, checkpoints = adapted(seed), out / "checkpoints"
    with attach(model, method):
        runner = trainer(model, checkpoints, steps, seed)
        runner.train(resume_from_checkpoint=get_last_checkpoint(checkpoints) if checkpoints.is_dir() else None)
    save_adapter(model, out)


if __name__ == "__main__":
    typer.run(finetune)
