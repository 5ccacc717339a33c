"""``foveate train``: methods with weights, and LoRA with any method attached."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import DEFAULT, POCKET, Config, Fields, Imports, err, method_of, out, parts_of, progress, resumable, sayer, starting

LORA = "lora"
EPILOG = (
    "Examples:  foveate train dyvte --out gates  |  foveate train lora --method prumerge --out adapter  |  "
    "foveate train fovea --model llava-hf/llava-1.5-7b-hf --data questions.jsonl --images photos --out scorer"
)


def train_command(
    what: Annotated[str, typer.Argument(metavar="METHOD", help="A method with weights; or lora, for LoRA with --method attached.")],
    out_: Annotated[Path, typer.Option("--out", help="Folder for the weights; the same command goes on with an interrupted run.")],
    method: Annotated[str | None, typer.Option(help=f"Of lora: the method that is attached; {DEFAULT} by default.")] = None,
    budget: Annotated[str | None, typer.Option(help="Visual tokens to keep, a count or a share.")] = None,
    fields: Fields = None,
    config: Config = None,
    imports: Imports = None,
    model: Annotated[str, typer.Option(help="Hub id, folder, pocket or pocket-qwen.")] = POCKET,
    data: Annotated[str | None, typer.Option(help="JSON or JSON lines in the format of LLaVA or TRL; pocket draws scenes.")] = None,
    images: Annotated[Path | None, typer.Option(help="Folder that paths of pictures are relative to.")] = None,
    eval_data: Annotated[Path | None, typer.Option(help="Data for validation; else a part of the data is held out.")] = None,
    train: Annotated[str | None, typer.Option(help="Some of module,projector,lora; by default what the method learns.")] = None,
    rank: Annotated[int, typer.Option(min=1, help="Of LoRA.")] = 16,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of the optimizer.")] = None,
    epochs: Annotated[float, typer.Option(min=0.001, help="How often the data are used, where no steps are given.")] = 1.0,
    batch: Annotated[int, typer.Option("--batch", "--batch-size", min=1, help="Conversations at a time in each process.")] = 8,
    accumulate: Annotated[int, typer.Option(min=1, help="Batches before each step.")] = 1,
    lr: Annotated[float, typer.Option(min=0, help="Learning rate of the method's weights.")] = 1e-3,
    lora_lr: Annotated[float, typer.Option(min=0, help="Learning rate of adapters and projector.")] = 2e-4,
    turns: Annotated[int, typer.Option(min=1, help="Questions about a drawn scene.")] = 4,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints, and looks at validation data.")] = 100,
    precision: Annotated[str, typer.Option(help="auto, fp32 or bf16.")] = "auto",
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="Compute activations anew: less memory.")] = False,
    report: Annotated[str, typer.Option(help="none, tensorboard or trackio; log.jsonl is always written.")] = "none",
    seed: Annotated[int, typer.Option(min=0, help="Of random weights, and of the order of the data.")] = 0,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="Conversations to use, at most; drawn scenes come again after so many, with other questions."),
    ] = None,
    remember: Annotated[
        float,
        typer.Option(min=0, help="Gigabytes of encoded pictures to keep for those that come again (LLaVA 1.5 and alike)."),
    ] = 0.0,
    checked: Annotated[int, typer.Option(min=1, help="Conversations for validation, at most.")] = 160,
    skip_broken: Annotated[bool, typer.Option("--skip-broken", help="Leave out entries that are broken.")] = False,
    tolerance: Annotated[float, typer.Option(min=0, max=1, help="Answers that a choice after training may lose.")] = 0.005,
) -> None:
    """Train the weights of a method, or LoRA adapters of a model with a method attached."""
    from ..errors import InputError

    with starting():
        from ..methods.trained import Trained
        from ..pocket import MODELS
        from ..training.run import train as run
        from ..training.settings import TrainSettings

    if what != LORA and method is not None:
        raise InputError(f"--method belongs to 'foveate train lora'; here the method is {what!r}")
    chosen = method_of(method if what == LORA else what, budget, fields, config)
    if what != LORA and not isinstance(chosen, Trained):
        raise InputError(f"{chosen.name} has no weights of its own. Use: foveate train lora --method {chosen.name}")
    parts = ("projector", "lora") if what == LORA else None
    if data is None and model not in MODELS:
        raise InputError("a model of your own is trained on data of your own: give --data, a file of conversations")
    settings = TrainSettings(
        model=model,
        data=data or POCKET,
        images=None if images is None else str(images),
        eval_data=None if eval_data is None else str(eval_data),
        train=parts if train is None else parts_of(train, "train", "module,projector,lora"),
        rank=rank,
        steps=steps,
        epochs=epochs,
        batch=batch,
        accumulate=accumulate,
        lr=lr,
        lora_lr=lora_lr,
        turns=turns,
        save_every=save_every,
        precision=precision,
        checkpointing=checkpointing,
        report=report,
        seed=seed,
        limit=limit,
        remember=remember,
        checked=checked,
        skip_broken=skip_broken,
        tolerance=tolerance,
    )
    resumable(out_)
    with progress("starting") as tell:
        summary = run(chosen, settings, out_, sayer(err), lambda done, total: tell("training", done, total))
    sayer(out)(f"{out_}: {summary['steps']} steps")
