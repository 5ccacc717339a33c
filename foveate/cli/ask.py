"""``foveate ask``: a question about a picture or a video, with fewer visual tokens."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from .common import POCKET, Config, Fields, Imports, PlanFile, err, method_of, out, sayer, starting
from .document import JsonFile, ready_json, telling

if TYPE_CHECKING:
    from ..answering import Answer

EPILOG = (
    'Examples:  foveate ask photo.jpg "What is on the table?" --model llava-hf/llava-1.5-7b-hf  |  '
    'foveate ask scene.png "what color is the star ?" --compare --save kept.png  |  '
    'foveate ask clip.mp4 "What happens?" --model LanguageBind/Video-LLaVA-7B-hf --save strip.png'
)


def ask_command(
    file: Annotated[Path, typer.Argument(help="Any picture or video file.")],
    question: Annotated[str, typer.Argument(help="What to ask.")],
    model: Annotated[str, typer.Option(help="Hub id, folder, pocket or pocket-qwen.")] = POCKET,
    method: Annotated[
        str | None, typer.Option(help="As listed by 'foveate methods'; name:preset for a preset. Default: prumerge+.")
    ] = None,
    budget: Annotated[
        str | None, typer.Option(help="Visual tokens to keep: a count (144) or a fraction (0.25). Default: the method's rule.")
    ] = None,
    fields: Fields = None,
    config: Config = None,
    plan: PlanFile = None,
    imports: Imports = None,
    frames: Annotated[
        int | None,
        typer.Option(min=1, help="Frames of a video to take: 8 by default. With it, moving GIF and WebP are read as videos, too."),
    ] = None,
    compare: Annotated[bool, typer.Option(help="Also answer with all tokens, and with uniform and random ones.")] = False,
    save: Annotated[
        Path | None, typer.Option(help="Write a picture of the kept tokens; of a video, a strip of its frames.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 64,
    json_file: JsonFile = None,
) -> None:
    """Ask a question about a picture or a video, with fewer visual tokens."""
    from ..errors import FoveateError, InputError

    if not question.strip():
        raise InputError("the question is empty")
    with starting():
        from ..answering import ask_all, frame_counts, limits, open_shown, save_kept, unknown
        from ..chat import AS_PICTURES, make_inputs, takes_videos
        from ..loading import SPREAD, load
        from ..video import Video
        from ..viz.overlay import picture_file

    shown, notes = open_shown(file, frames)
    video = shown if isinstance(shown, Video) else None
    save = save and picture_file(save)
    ready_json(json_file, save, reads=[file, method, config, plan])
    reducer = method_of(method, budget, fields, config, plan)
    with err.status(escape(f"loading {model}")) as status:
        loaded = load(model, device=SPREAD)
        inputs, note = make_inputs(loaded.processor, loaded.model, shown, question)
        notes += [AS_PICTURES] if video and not takes_videos(loaded.processor, loaded.model) else []
        notes += [*([note] if note else []), *unknown(loaded, shown.frames[0] if isinstance(shown, Video) else shown, question)]
        status.update("answering")
        answers = ask_all(loaded.model, loaded.processor, inputs, reducer, new_tokens=max_new_tokens, compare=compare)
        unsaved = None
        try:
            notes += save_kept(shown, loaded.processor, inputs, answers, save, question) if save else []
        except FoveateError as error:  # what was answered is told all the same
            unsaved, save = error, None
        notes += limits(loaded.model, answers)
    chosen = answers[reducer.name]
    counts = frame_counts(video, chosen.report) if video and chosen.report else []
    document = {
        "model": model,
        "method": reducer.settings(),
        "question": question,
        **_document(chosen, answers),
        "video": {"fps": video.fps, "duration": video.duration, "frames": counts} if video else None,
        "picture": str(save) if save else None,
        "notes": notes,
    }
    with telling(document, json_file, lambda: _show(notes, answers, chosen, counts, compare), unsaved):
        if save:
            sayer(err)(f"picture: {save}")


def _show(notes: list[str], answers: dict[str, Answer], chosen: Answer, counts: list[dict[str, Any]], compare: bool) -> None:
    tell, say = sayer(err), sayer(out)
    for line in notes:
        tell(f"note: {line}", "yellow")
    if compare:
        out.print(_table(answers))
    else:
        say(chosen.text, "bold")
        tell(str(chosen.report), "dim")
    if counts and chosen.report:
        each = ", ".join(f"{frame['seconds']:.2f} s {frame['after']} of {frame['before']}" for frame in counts)
        total = f"{sum(chosen.report.before)} -> {sum(chosen.report.after)}"
        tell(f"visual tokens of the video {total}; frame by frame: {each}", "dim")


def _document(chosen: Answer, answers: dict[str, Answer]) -> dict[str, Any]:
    """What is printed of the answers as JSON."""
    return {
        "answer": chosen.text,
        "answers": {name: answer.text for name, answer in answers.items()},
        "visual_tokens": {name: answer.visual_tokens for name, answer in answers.items()},
        "layers": {name: answer.layers for name, answer in answers.items()},
        "kept": None if chosen.report is None else [asdict(image) for image in chosen.report.images],
        "visual_tokens_before": sum(chosen.report.before) if chosen.report else chosen.visual_tokens,
        "prefill_seconds": {name: answer.prefill for name, answer in answers.items()},
        "prefill_flops": {name: answer.flops for name, answer in answers.items()},
    }


def _table(answers: dict[str, Answer]) -> Table:
    from ..answering import title

    table = Table()
    for column in ("tokens chosen by", "answer", "visual tokens", "LLM prefill", "LLM GFLOPs"):
        table.add_column(column, justify="left" if column in ("tokens chosen by", "answer") else "right")
    for name, answer in answers.items():
        flops = f"{answer.flops / 1e9:.2f}"
        table.add_row(title(name), escape(answer.text), answer.shown_tokens, f"{1000 * answer.prefill:.1f} ms", flops)
    return table
