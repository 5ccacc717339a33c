"""``foveate tune``: my model, my pictures, my tolerance."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .common import (
    POCKET,
    ExampleFile,
    Imports,
    LongestAnswer,
    ScoreName,
    VideoFrames,
    err,
    out,
    parts_of,
    resumable,
    sayer,
    starting,
    wide,
)
from .document import JsonFile, ready_json, telling

if TYPE_CHECKING:
    from ..tuning.trial import Tuned

EPILOG = (
    "Examples:  foveate tune --model pocket --tolerance 2  |  "
    "foveate tune --model llava-hf/llava-1.5-7b-hf --data examples.jsonl --tolerance 1 --out plan.json  |  "
    "foveate ask photo.jpg 'What is on the table?' --model llava-hf/llava-1.5-7b-hf --plan plan.json"
)
SHOWN = 16  # rows of the table


def tune_command(
    model: Annotated[str, typer.Option(help="Hub id, folder, pocket or pocket-qwen.")] = POCKET,
    data: ExampleFile = None,
    tolerance: Annotated[float, typer.Option(help="Points of the score that may be lost, out of 100.")] = 1.0,
    out_file: Annotated[Path, typer.Option("--out", help="The plan to write; its page goes beside it.")] = Path("plan.json"),
    objective: Annotated[str, typer.Option(help="What is to be saved: prefill, end-to-end, kv-bytes or tokens.")] = "prefill",
    score: ScoreName = "exact",
    methods: Annotated[
        str | None,
        typer.Option(
            "--methods",
            "--method",
            help="Names, name:preset, or files of Method.save, separated by commas. Default: the usual ones.",
        ),
    ] = None,
    imports: Imports = None,
    examples: Annotated[int, typer.Option(min=1, help="How many examples to use, at most.")] = 2000,
    max_tokens: LongestAnswer = 32,
    frames: VideoFrames = 8,
    minutes: Annotated[float | None, typer.Option(help="Time to take at most; what is known by then decides.")] = None,
    batch: Annotated[int, typer.Option("--batch", "--batch-size", min=1, help="Examples that are answered together.")] = 8,
    seed: Annotated[int, typer.Option(help="Of the order of the examples.")] = 0,
    store: Annotated[Path | None, typer.Option(help="File of answers, from which a run goes on. Default: beside the plan.")] = None,
    html: Annotated[Path | None, typer.Option(help="Where its page goes. Default: beside the plan.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Find the setting that saves most and loses less than a tolerance, on your model and your examples."""
    from ..errors import InputError

    with starting():
        from ..lab.scoring import score_of
        from ..places import user_path
        from ..tuning.costs import OBJECTIVES

    if not 0 < tolerance < 100:
        raise InputError(
            f"--tolerance {tolerance:g}: expected points above 0 and below 100. No sample can show that nothing is lost."
        )
    if minutes is not None and not minutes > 0:
        raise InputError(f"--minutes {minutes:g}: expected a time above 0")
    if objective not in OBJECTIVES:
        raise InputError(f"--objective {objective!r}: expected one of {', '.join(OBJECTIVES)}")
    names = None if methods is None else parts_of(methods, "methods", "fovea,prumerge+")
    judge = score_of(score)
    page, answers = html or out_file.with_suffix(".html"), store or out_file.with_suffix(".answers.jsonl")
    page, answers = user_path(page), user_path(answers)
    ready_json(json_file, out_file, page, answers, reads=[data, *(names or [])])
    resumable(answers)

    with starting():
        from ..measuring import ledger
        from ..tuning.run import Options, tuned_plan

    options = Options(
        model, data, tolerance / 100, objective, score, judge, names, examples, max_tokens, frames, minutes, batch, seed, answers
    )
    with err.status(escape(f"loading {model}")) as status:
        begun = time.monotonic()

        def tell(what: str) -> None:
            status.update(escape(f"[{time.monotonic() - begun:.0f} s] {what}"))

        found = tuned_plan(options, ledger.command(), tell)
    for line in found.notes:
        sayer(err)(f"note: {line}", "yellow")
    from ..tuning.page import write_page

    with telling(found.document, json_file, lambda: show(found.tuned, found.plan.saving, objective, out)) as keep:
        if keep(found.plan.save, out_file):
            sayer(err)(f"plan: {out_file}")
        if keep(write_page, found, page):
            sayer(err)(f"page: {page}")


def show(tuned: Tuned, saving: dict[str, Any], objective: str, console: Console) -> None:
    """Print what was tried, and what came of it."""
    console = wide(console)
    say = sayer(console)
    console.print(table(tuned))
    say(
        f"all tokens: {100 * tuned.full:.1f} on {len(tuned.searched) + len(tuned.confirmed)} examples; {tuned.seconds:.0f} s", "dim"
    )
    for name, reason in tuned.impossible.items():
        say(f"{name} was not tried: {reason}", "dim")
    if tuned.chosen is None:
        say(f"All tokens are kept: {tuned.reason}.", "bold")
        return
    low, high = saving["interval"]
    say(
        f"{tuned.chosen.setting.label}: saves {saving['saving']:.0%} [{low:.0%}, {high:.0%}] of {objective}, and loses less than "
        f"{100 * (tuned.bound or 0):.2f} points with 95 % confidence.",
        "bold",
    )
    say(f"Chosen because {tuned.reason}.", "dim")


def table(tuned: Tuned) -> Table:
    """The settings that got farthest."""
    found = Table()
    for head in ("setting", "tokens", "cost", "loss in the search", "on", "loss in the test", "on", "verdict"):
        found.add_column(head, justify="left" if head in ("setting", "verdict") else "right")
    for trial in tuned.trials[:SHOWN]:
        tokens = "" if trial.losses is None else f"{trial.share:.0%}"
        cells = [trial.setting.label, tokens, "" if trial.cost is None else f"{trial.cost.median:.2f}"]
        for losses in (trial.losses, trial.confirmed):
            cells += ["", ""] if losses is None else [f"{100 * losses.mean:+.1f}", str(len(losses.values))]
        found.add_row(*map(escape, [*cells, trial.verdict]))
    return found
