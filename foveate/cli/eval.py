"""``foveate eval``: methods on benchmarks through lmms-eval, with what each row costs."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from ..errors import MissingExtraError
from ..places import write_text
from .common import (
    DEFAULT,
    Configs,
    Fields,
    Imports,
    PlanFile,
    err,
    first_process,
    methods_of,
    out,
    parts_of,
    resumable,
    sayer,
    starting,
    wide,
)
from .document import JsonFile, ready_json, telling

EPILOG = (
    "Examples:  foveate eval --limit 100  |  foveate eval --model llava-hf/llava-1.5-7b-hf --tasks pope,mme --budget 144  |  "
    "accelerate launch --num_processes 4 -m foveate eval --tasks textvqa_val --methods prumerge,prumerge+"
)
HEADS = ("method", "visual tokens", "LLM prefill, GFLOPs", "s per question")


def eval_command(
    tasks: Annotated[str, typer.Option(help="Tasks and groups of lmms-eval, and ours (--list), separated by commas.")] = "pocket",
    model: Annotated[str, typer.Option(help="Hub id or folder, of an adapter (PEFT) too; the pocket model by default.")] = "pocket",
    methods: Annotated[
        str | None, typer.Option("--methods", "--method", help="Names or name:preset, separated by commas. Default: prumerge+.")
    ] = None,
    budget: Annotated[
        str | None, typer.Option(help="Visual tokens to keep: a count (144) or a share (0.25). Default: the methods' own rules.")
    ] = None,
    fields: Fields = None,
    config: Configs = None,
    plan: PlanFile = None,
    imports: Imports = None,
    baselines: Annotated[bool, typer.Option("--baselines/--no-baselines", help="random, spatial and resize at equal cost.")] = True,
    data: Annotated[Path | None, typer.Option(help="Folder with released files of benchmarks, instead of the Hub.")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", "--batch", min=1, help="Questions per batch.")] = 1,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first questions of each task.")] = None,
    frames: Annotated[int, typer.Option(min=1, help="Frames of a video.")] = 8,
    cache: Annotated[Path | None, typer.Option(help="Folder of answers; an interrupted run goes on from there.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Such as bfloat16. Default: as saved.")] = None,
    device: Annotated[str | None, typer.Option(help="Such as cpu or cuda:0.")] = None,
    attention: Annotated[
        str | None, typer.Option("--attention", "--attn", help="Implementation of attention, such as sdpa.")
    ] = None,
    save: Annotated[Path | None, typer.Option(help="Folder for evaluation.md and evaluation.json.")] = None,
    show_tasks: Annotated[bool, typer.Option("--list", help="Print our tasks, and the files that --data reads.")] = False,
    json_file: JsonFile = None,
) -> None:
    """Accuracy on benchmarks through lmms-eval, beside all tokens and baselines of equal cost, with tokens, FLOPs and time."""
    if show_tasks:
        print(known_tasks())
        return
    given = () if methods is None and (config or plan) else parts_of(methods or DEFAULT, "methods", "prumerge,prumerge+")
    chosen = list(methods_of(given, budget, fields, config, plan=plan).values())
    names = parts_of(tasks, "tasks", "pope,mme")
    first = first_process()
    saved = [] if save is None else [save / "evaluation.json", save / "evaluation.md"]
    ready_json(json_file, *saved, reads=[*given, *(config or []), plan])
    with starting():
        _quiet()
        from ..evaluation.running import TaskRun, evaluate, load_tasks
        from ..loading import load, own_device, part, quiet_loading

    def tell(line: str) -> None:
        if first:
            sayer(err)(line, "dim")

    with err.status(escape(f"loading {model}")), quiet_loading(bars=False):
        loaded = load(model, dtype=dtype, device=own_device(device), attention=attention)
    if cache is not None:
        resumable(cache)
    run = TaskRun(loaded, batch_size, limit, frames, cache, save)
    report = evaluate(run, load_tasks(names, data), chosen, baselines=baselines, tell=tell)
    part()
    if not first:
        return
    report = {"command": shlex.join(["foveate", *sys.argv[1:]]), **report}
    with telling(report, json_file, lambda: show(report)) as keep:
        if save is not None and keep(write_files, report, save):
            sayer(err)(f"written to {save}")


def write_files(report: dict[str, Any], folder: Path) -> None:
    """Write ``evaluation.json`` and ``evaluation.md``.

    Raises
    ------
    FoveateError : one cannot be written.
    """
    write_text(folder / "evaluation.json", json.dumps(report, indent=1) + "\n")
    write_text(folder / "evaluation.md", markdown(report))


def _quiet() -> None:
    """Of what lmms-eval logs, warnings and errors only."""
    try:
        from loguru import logger
    except ImportError as error:
        raise MissingExtraError("lmms-eval", "eval") from error
    logger.remove()
    logger.add(sys.stderr, level="WARNING")


def known_tasks() -> str:
    """Our tasks, where they are, and the files that ``--data`` reads."""
    from ..evaluation import TASKS, local
    from ..evaluation.pocket import TASKS as POCKET_TASKS

    lines = ["on the pocket test set: pocket_clip; pocket, which is " + ", ".join(POCKET_TASKS), "with --data:", ""]
    lines += [local.__doc__.partition("\n\n")[2].rstrip() if local.__doc__ else ""]
    return "\n".join([*lines, "", f"for lmms-eval: --include_path {TASKS}"])


def cells(line: dict[str, Any]) -> list[str]:
    """One row, for a table of its task."""
    budget = "" if line["budget"] is None else f" {line['budget']}"
    costs = (f"{line['tokens']:.1f}", f"{line['flops'] / 1e9:.2f}", f"{line['seconds']:.3f}")
    error = "" if line["stderr"] is None else f" ± {line['stderr']:.1f}"
    return [f"{line['method']}{budget}", *costs, "-" if line["score"] is None else f"{line['score']:.1f}{error}"]


def tables(report: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Rows by task."""
    found: dict[str, list[dict[str, Any]]] = {}
    for line in report["rows"]:
        found.setdefault(line["task"], []).append(line)
    return found


def markdown(report: dict[str, Any]) -> str:
    """A table for each task."""
    from ..lab.tables import markdown_table

    lines = ["# Accuracy through lmms-eval", "", "```bash", report["command"], "```", ""]
    for task, rows in tables(report).items():
        lines += [f"## {task}", "", f"{rows[0]['questions']} questions; `{rows[0]['metric']}`.", ""]
        lines += [*markdown_table([*HEADS, "score"], [cells(line) for line in rows], 1), ""]
    return "\n".join([*lines, *missing(report), ""])


def missing(report: dict[str, Any]) -> list[str]:
    """Why rows are not there."""
    return [f"- {entry['method']}: {entry['reason']}" for entry in report["missing"]]


def show(report: dict[str, Any]) -> None:
    """Print a table for each task."""
    console = wide(out)
    for task, rows in tables(report).items():
        table = Table(title=escape(f"{task}, {rows[0]['questions']} questions"), title_justify="left")
        for number, head in enumerate((*HEADS, rows[0]["metric"])):
            table.add_column(escape(str(head)), justify="left" if number == 0 else "right")
        for line in rows:
            table.add_row(*map(escape, cells(line)))
        console.print(table)
    for reason in missing(report):
        sayer(console)(reason)
