"""Train the pocket model from scratch: ``python -m foveate.pocket.train --output pocket-run``.

On a CPU with several cores, one process per core is fastest: ``torchrun --nproc-per-node 2 -m foveate.pocket.train``.
The phases: the encoder alone on small windows; encoder and decoder on windows of mixed size, later with a check on how sharp the
attention of [CLS] gets; then mostly whole pictures. Over the last steps the learning rate falls to zero. Interrupted runs continue
with the same command. Data is drawn anew for every batch.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import set_seed
from rich.console import Console
from torch.utils.data import DataLoader

from ..precision import has_bfloat16
from .batches import Mix, PocketBatches
from .build import build_model, build_processor
from .objectives import PocketTrainee

PHASES = (
    Mix(2000, {8: 0.25, 12: 0.3, 16: 0.3, 24: 0.15}, {8: 40, 12: 20, 16: 12, 24: 4}, language=False),
    Mix(1700, {8: 0.3, 12: 0.3, 16: 0.3, 24: 0.1}, {8: 14, 12: 8, 16: 5, 24: 3}),
    Mix(1300, {8: 0.3, 12: 0.3, 16: 0.3, 24: 0.1}, {8: 14, 12: 8, 16: 5, 24: 3}, calm=True),
    Mix(3500, {12: 0.05, 16: 0.1, 24: 0.85}, {12: 8, 16: 5, 24: 3}, calm=True),
)
WARM_UP = 40
SLOWING = 1000


def learning_rate_factor(step: int, total: int, final: int) -> float:
    """Linear warm-up, constant, to two thirds over the 1000 steps before the last ``final`` ones, and to zero over these."""
    start = total - final
    if step >= start:
        return 2 / 3 * (total - step) / final
    return min(1.0, (step + 1) / WARM_UP, 1 - (step - start + SLOWING) / (3 * SLOWING))


def optimizers(trainee: PocketTrainee, matrix_rate: float, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks and the projector, AdamW for everything else."""
    matrices = dict(trainee.body_matrices())
    chosen = {id(parameter) for parameter in matrices.values()}
    rest = [parameter for parameter in trainee.parameters() if id(parameter) not in chosen]
    return [
        torch.optim.Muon(list(matrices.values()), lr=matrix_rate, weight_decay=0.015),
        torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.98), weight_decay=0.01, foreach=True),
    ]


def save_model(trainee: PocketTrainee, folder: Path) -> None:
    """Write the trained model (bfloat16 safetensors) and its processor in Hugging Face format."""
    model = build_model()
    model.load_state_dict(trainee.model.state_dict())
    model.bfloat16().save_pretrained(folder)
    build_processor().save_pretrained(folder)


def train(
    output: Annotated[Path, typer.Option(help="Folder for checkpoints, the log and the finished model.")] = Path("pocket-run"),
    vision_steps: Annotated[int, typer.Option(help="Steps of the encoder alone.")] = PHASES[0].steps,
    joint_steps: Annotated[int, typer.Option(help="Steps on windows of mixed size.")] = PHASES[1].steps,
    calm_steps: Annotated[int, typer.Option(help="The same, with the attention of [CLS] kept from getting too sharp.")] = PHASES[
        2
    ].steps,
    final_steps: Annotated[int, typer.Option(help="Steps mostly on whole pictures.")] = PHASES[3].steps,
    scale: Annotated[float, typer.Option(help="Factor on all batch sizes (a GPU wants 16 or more).")] = 1.0,
    matrix_rate: Annotated[float, typer.Option(help="Learning rate of Muon.")] = 0.012,
    rate: Annotated[float, typer.Option(help="Learning rate of AdamW.")] = 0.002,
    seed: int = 0,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 100,
    stop_after: Annotated[int | None, typer.Option(help="Leave after this step, as if interrupted there.")] = None,
    loaders: Annotated[int, typer.Option(help="Processes that draw scenes ahead; 0 draws in the training process.")] = 0,
) -> None:
    """Train the pocket model, or continue an interrupted run in the same folder."""
    accelerator = Accelerator(
        mixed_precision="bf16" if has_bfloat16("cuda" if torch.cuda.is_available() else "cpu") else "no",
        cpu=not torch.cuda.is_available(),
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True, broadcast_buffers=False)],
    )
    if accelerator.device.type == "cpu":
        torch.set_num_threads(max(1, torch.get_num_threads() // accelerator.num_processes))
    console = Console(quiet=not accelerator.is_main_process, highlight=False)
    set_seed(seed)
    phases = [
        replace(mix, steps=steps, sizes={side: max(1, round(size * scale)) for side, size in mix.sizes.items()})
        for mix, steps in zip(PHASES, (vision_steps, joint_steps, calm_steps, final_steps), strict=True)
    ]
    trainee = PocketTrainee(build_model(seed))
    model, *optims = accelerator.prepare(trainee, *optimizers(trainee, matrix_rate, rate))
    batches = PocketBatches(phases, seed, accelerator.process_index)
    checkpoint, log_file = output / "checkpoint", output / "log.jsonl"
    first = 0
    if (checkpoint / "step.json").exists():
        accelerator.load_state(str(checkpoint))
        first = json.loads((checkpoint / "step.json").read_text())["step"]
        console.print(f"continuing at step {first}")
    output.mkdir(parents=True, exist_ok=True)
    base_rates = (matrix_rate, rate)
    logged: dict[str, list[float]] = defaultdict(list)
    begun, total = time.time(), len(batches)
    own = torch.Generator()  # an iterator draws a seed; from the global state, that would differ in a resumed run
    loader = DataLoader(batches, batch_size=None, sampler=range(first, total), num_workers=loaders, generator=own)
    for step, batch in enumerate(loader, first):
        factor = learning_rate_factor(step, total, final_steps)
        for optim, base in zip(optims, base_rates, strict=True):
            for group in optim.param_groups:
                group["lr"] = base * factor
        phase = batches.phase(step)
        loss, log = model(batch.to(accelerator.device), language=phase.language, calm=phase.calm)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_([p for g in optims[1].param_groups for p in g["params"]], 1.0)
        for optim in optims:
            optim.step()
            optim.zero_grad()
        side = batch.pixels.shape[-1] // 8
        for name, value in log.items():
            logged[f"{side}/{name}"].append(float(value))
        done = step + 1
        if done % 50 == 0 or done == total:
            means = {name: round(sum(values) / len(values), 3) for name, values in sorted(logged.items())}
            seconds = (time.time() - begun) / (done - first)
            if accelerator.is_main_process:
                with log_file.open("a") as file:
                    file.write(json.dumps({"step": done, "seconds_per_step": round(seconds, 3), "rate": factor, **means}) + "\n")
            shown = " ".join(f"{k}={v}" for k, v in means.items() if k.startswith(f"{max(phases[-1].weights)}/"))
            console.print(f"step {done}/{total}, {seconds * (total - done) / 60:.0f} min left: {shown}")
            logged.clear()
        if done % save_every == 0 or done in (total, stop_after):
            accelerator.save_state(str(checkpoint))
            if accelerator.is_main_process:
                (checkpoint / "step.json").write_text(json.dumps({"step": done}))
                save_model(trainee, output / "model")
        if done == stop_after:
            return
    console.print(f"finished: {output / 'model'}")


if __name__ == "__main__":
    typer.run(train)
