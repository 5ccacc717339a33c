"""Train a pocket model from scratch: ``python -m foveate.pocket.train --model qwen --output pocket-run``.

On a CPU with several cores, one process per core is fastest: ``torchrun --nproc-per-node 2 -m foveate.pocket.train``.
The phases: the encoder alone on small windows or pictures; encoder and decoder on windows or pictures of mixed size, for the first
model later with a check on how sharp the attention of [CLS] gets; then mostly whole or large pictures. Over the last steps the
learning rate falls to zero. Interrupted runs continue with the same command. Data is drawn anew for every batch.
"""

from __future__ import annotations

import json
import math
import time
from collections import defaultdict
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import set_seed
from rich.console import Console
from torch import Tensor
from torch.utils.data import DataLoader

from ..precision import has_bfloat16
from . import load_pocket
from .native.recipe import NATIVE
from .recipe import POCKET, Recipe

WARM_UP = 40
SLOWING = 1000


class Model(str, Enum):
    """The pocket models."""

    pocket = "pocket"
    qwen = "qwen"


RECIPES = {Model.pocket: POCKET, Model.qwen: NATIVE}


def learning_rate_factor(step: int, total: int, final: int) -> float:
    """Linear warm-up, constant, to two thirds over the 1000 steps before the last ``final`` ones, and to zero over these."""
    start = total - final
    if step >= start:
        return 2 / 3 * (total - step) / final
    return min(1.0, (step + 1) / WARM_UP, 1 - (step - start + SLOWING) / (3 * SLOWING))


def optimizers(trainee: Any, matrix_rate: float, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks and the projector, AdamW for everything else."""
    matrices = dict(trainee.body_matrices())
    chosen = {id(parameter) for parameter in matrices.values()}
    rest = [parameter for parameter in trainee.parameters() if id(parameter) not in chosen]
    return [
        torch.optim.Muon(list(matrices.values()), lr=matrix_rate, weight_decay=0.015),
        torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.98), weight_decay=0.01, foreach=True),
    ]


def phases_of(recipe: Recipe, steps: dict[str, int | None], scale: float) -> list[Any]:
    """The phases with the steps that were asked for.

    Raises
    ------
    typer.BadParameter : the recipe has no such phase.
    """
    for name, number in steps.items():
        if number is not None and name not in recipe.phases:
            raise typer.BadParameter(f"this model has no phase {name!r}; it has {', '.join(recipe.phases)}")
    asked = {name: number for name, number in steps.items() if number is not None}
    return [recipe.scaled(mix, asked.get(name, mix.steps), scale) for name, mix in recipe.phases.items()]


def train(
    model: Annotated[
        Model, typer.Option(help="pocket has 576 visual tokens; qwen takes pictures of any size, and clips.")
    ] = Model.pocket,
    output: Annotated[Path, typer.Option(help="Folder for checkpoints, the log and the finished model.")] = Path("pocket-run"),
    vision_steps: Annotated[int | None, typer.Option(help="Steps of the encoder alone.")] = None,
    joint_steps: Annotated[int | None, typer.Option(help="Steps on pictures of mixed size.")] = None,
    calm_steps: Annotated[
        int | None, typer.Option(help="The same, with the attention of [CLS] kept from getting too sharp (pocket).")
    ] = None,
    final_steps: Annotated[int | None, typer.Option(help="Steps mostly on whole or large pictures.")] = None,
    scale: Annotated[float, typer.Option(help="Factor on all batch sizes (a GPU wants 16 or more).")] = 1.0,
    matrix_rate: Annotated[float, typer.Option(help="Learning rate of Muon.")] = 0.012,
    rate: Annotated[float, typer.Option(help="Learning rate of AdamW.")] = 0.002,
    weights: Annotated[Path | None, typer.Option(help="Begin with the weights of this model instead of random ones.")] = None,
    seed: int = 0,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 100,
    stop_after: Annotated[int | None, typer.Option(help="Leave after this step, as if interrupted there.")] = None,
    loaders: Annotated[int, typer.Option(help="Processes that draw scenes ahead; 0 draws in the training process.")] = 0,
) -> None:
    """Train a pocket model, or continue an interrupted run in the same folder."""
    recipe = RECIPES[model]
    asked = {"vision": vision_steps, "joint": joint_steps, "calm": calm_steps, "final": final_steps}
    phases = phases_of(recipe, asked, scale)
    accelerator = Accelerator(
        mixed_precision="bf16" if has_bfloat16("cuda" if torch.cuda.is_available() else "cpu") else "no",
        cpu=not torch.cuda.is_available(),
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True, broadcast_buffers=False)],
    )
    if accelerator.device.type == "cpu":
        torch.set_num_threads(max(1, torch.get_num_threads() // accelerator.num_processes))
    console = Console(quiet=not accelerator.is_main_process, highlight=False)
    set_seed(seed)
    trainee = recipe.trainee(seed)
    if weights is not None:
        trainee.model.load_state_dict(load_pocket(weights)[0].state_dict())
    prepared, *optims = accelerator.prepare(trainee, *optimizers(trainee, matrix_rate, rate))
    batches = recipe.batches(phases, seed, accelerator.process_index)
    checkpoint, log_file = output / "checkpoint", output / "log.jsonl"
    first = 0
    if (checkpoint / "step.json").exists():
        accelerator.load_state(str(checkpoint))
        first = json.loads((checkpoint / "step.json").read_text())["step"]
        console.print(f"continuing at step {first}")
    output.mkdir(parents=True, exist_ok=True)
    logged: dict[str, list[Tensor]] = defaultdict(list)
    begun, total, final_phase = time.time(), len(batches), phases[-1].steps
    own = torch.Generator()  # an iterator draws a seed; from the global state, that would differ in a resumed run
    loader: Any = DataLoader(batches, batch_size=None, sampler=range(first, total), num_workers=loaders, generator=own)  # type: ignore[arg-type]
    for step, batch in enumerate(loader, first):
        factor = learning_rate_factor(step, total, final_phase)
        for optim, base in zip(optims, (matrix_rate, rate), strict=True):
            for group in optim.param_groups:
                group["lr"] = base * factor
        loss, log = prepared(batch.to(accelerator.device), **batches.options(step))
        accelerator.backward(loss)
        accelerator.clip_grad_norm_([p for g in optims[1].param_groups for p in g["params"]], 1.0)
        for optim in optims:
            optim.step()
            optim.zero_grad()
        for name, value in log.items():
            logged[f"{recipe.label(batch)}/{name}"].append(value)
        done = step + 1
        if done % 50 == 0 or done == total:
            means = {name: _mean(values) for name, values in sorted(logged.items())}
            seconds = (time.time() - begun) / (done - first)
            if accelerator.is_main_process:
                with log_file.open("a") as file:
                    file.write(json.dumps({"step": done, "seconds_per_step": round(seconds, 3), "rate": factor, **means}) + "\n")
            shown = " ".join(f"{k}={v}" for k, v in means.items() if k.partition("/")[0] in recipe.shown)
            console.print(f"step {done}/{total}, {seconds * (total - done) / 60:.0f} min left: {shown}")
            logged.clear()
        if done % save_every == 0 or done in (total, stop_after):
            accelerator.save_state(str(checkpoint))
            if accelerator.is_main_process:
                (checkpoint / "step.json").write_text(json.dumps({"step": done}))
                recipe.save(trainee, output / "model")
        if done == stop_after:
            return
    console.print(f"finished: {output / 'model'}")


def _mean(values: list[Tensor]) -> float | None:
    """Of the batches that had such a question: shares of none are not a number."""
    known = [value for value in map(float, values) if not math.isnan(value)]
    return round(sum(known) / len(known), 3) if known else None


if __name__ == "__main__":
    typer.run(train)
