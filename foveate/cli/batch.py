"""``foveate batch``: many questions about pictures, offline."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from ..errors import InputError
from .common import Config, Fields, Imports, PlanFile, asked_of, err, progress, resumable, sayer, starting

EPILOG = (
    "Examples:  foveate batch questions.jsonl answers.jsonl  |  "
    "foveate batch questions.jsonl answers.jsonl --engine vllm --model llava-hf/llava-1.5-7b-hf  |  "
    "foveate batch questions.jsonl answers.jsonl --engine ray --encoders 4 --engines 8 --address auto --export /shared/llava-text"
)


def batch_command(
    questions: Annotated[
        Path, typer.Argument(help='JSON lines such as {"image": "a.jpg", "question": "..."}, or of OpenAI\'s batch API.')
    ],
    answers: Annotated[Path, typer.Argument(help="JSON lines of answers; an interrupted run goes on from there.")],
    engine: Annotated[str, typer.Option(help="transformers; vllm; or ray, which is vLLM on many machines.")] = "transformers",
    model: Annotated[str, typer.Option(help="Hub id or folder; the pocket model by default.")] = "pocket",
    method: Annotated[
        str | None, typer.Option(help="As listed by 'foveate methods'; full keeps all tokens. Default: prumerge+.")
    ] = None,
    budget: Annotated[
        str | None, typer.Option(help="Visual tokens to keep: a count (144) or a share (0.25). Default: the method's rule.")
    ] = None,
    fields: Fields = None,
    config: Config = None,
    plan: PlanFile = None,
    imports: Imports = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 64,
    batch_size: Annotated[
        int | None,
        typer.Option(
            "--batch-size",
            "--batch",
            min=1,
            help="Rows answered at once. Default: 8, and 64 with vLLM, which makes its own batches.",
        ),
    ] = None,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest word each time.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Other answers, where they are drawn.")] = 0,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Answer rows again that failed before.")] = False,
    export: Annotated[
        Path | None,
        typer.Option(help="vllm, ray: folder of the text model, written if it is new. Default: in ~/.cache/foveate."),
    ] = None,
    encoders: Annotated[int | None, typer.Option(min=1, help="ray: actors that encode pictures. Default: 1.")] = None,
    engines: Annotated[int | None, typer.Option(min=1, help="ray: actors with vLLM. Default: 1.")] = None,
    address: Annotated[str | None, typer.Option(help="ray: a running cluster, such as auto. Default: this machine.")] = None,
) -> None:
    """Answer a file of questions about pictures, with fewer visual tokens. Rows that fail are written with their error."""
    with starting():
        from ..loading import quiet_loading
        from ..serving.batch.base import Job, batch_engine
        from ..serving.batch.offline import settings
        from ..serving.batch.results import Output, check_apart
        from ..serving.batch.rows import AnswerSettings, Source

    answering = batch_engine(engine, {"export": export, "encoders": encoders, "engines": engines, "address": address})
    if not math.isfinite(temperature):
        raise InputError(f"--temperature {temperature} is no number")
    check_apart(questions, answers)
    name, share, whole = asked_of(method, budget, fields, config, plan)
    wanted = AnswerSettings(name, share, max_new_tokens, temperature, seed, whole)
    answering.check(wanted)
    source = Source(questions)
    lines = source.lines()
    with Output(answers, settings(model, wanted, answering), retry_failed=retry_failed) as output:
        there = [line for line in lines if line.id in output.answered or line.id in output.failed]
        again = output.changed({line.id: source.digest(line) for line in there}) if output.answered or output.failed else set()
        if again:
            sayer(err)(f"{len(again)} rows have changed since they were answered, and are asked again")
            output.drop(again)
        resumable(answers)
        waiting = [line for line in lines if line.id not in output.answered and line.id not in output.failed]
        if waiting:
            others = {"encoders": encoders, "engines": engines, "address": address}
            job = Job(source, waiting, wanted, model, batch_size or answering.rows, export, others)
            with err.status("starting"), quiet_loading(bars=False):
                found = answering.start(job)
            with progress("rows") as tell:
                tell("rows", len(lines) - len(waiting), len(lines))
                for rows in found:
                    output.add(rows)
                    failed = f", {len(output.failed)} failed" if output.failed else ""
                    tell(f"rows{failed}", len(output.answered) + len(output.failed), len(lines))
    done = len(lines) - len(waiting)
    failed = f"{len(output.failed)} failed" + (" (--retry-failed answers them again)" if output.failed else "")
    earlier = f", {done} rows were there already" if done else ""
    print(f"{answers}: {len(output.answered)} answered, {failed}{earlier}")
