"""``foveate show``: a question about a picture or a clip as one picture that explains itself."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from .common import DEFAULT, POCKET, Configs, Fields, Imports, PlanFile, err, methods_of, out, sayer, starting
from .document import JsonFile, ready_json, telling

EPILOG = (
    'Examples:  foveate show scene.png "what color is the star ?" --method prumerge+ --method fovea --budget 64  |  '
    'foveate show clip.mp4 "What happens?" --model LanguageBind/Video-LLaVA-7B-hf --out clip.png'
)


def show_command(
    file: Annotated[Path, typer.Argument(help="Any picture or video file.")],
    question: Annotated[str, typer.Argument(help="What to ask.")],
    out_file: Annotated[Path, typer.Option("--out", help="The picture to write.")] = Path("foveate-show.png"),
    model: Annotated[str, typer.Option(help="Hub id, folder, pocket or pocket-qwen.")] = POCKET,
    method: Annotated[
        list[str] | None, typer.Option(help="As listed by 'foveate methods'; may be given again. Default: prumerge+.")
    ] = None,
    budget: Annotated[str | None, typer.Option(help="Visual tokens to keep, of all methods: a count or a fraction.")] = None,
    fields: Fields = None,
    config: Configs = None,
    plan: PlanFile = None,
    imports: Imports = None,
    frames: Annotated[int | None, typer.Option(min=1, help="Frames of a video to take: 8 by default.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 64,
    json_file: JsonFile = None,
) -> None:
    """One picture of a question: the answers with all tokens and with fewer, what was kept, and the scores as heat."""
    from ..errors import FoveateError, InputError

    if not question.strip():
        raise InputError("the question is empty. Ask something.")
    methods = methods_of(method or ([] if config or plan else [DEFAULT]), budget, fields, config, plan=plan)
    with starting():
        from ..answering import ask, open_shown, title, unknown
        from ..chat import make_inputs
        from ..loading import SPREAD, load
        from ..video import Video
        from ..viz.frames import first_as_seen, frames_as_seen
        from ..viz.overlay import picture_file
        from ..viz.question import Way, save_question

    shown, notes = open_shown(file, frames)
    place = picture_file(out_file)
    ready_json(json_file, place, reads=[file, *(method or []), *(config or []), plan])
    with err.status(escape(f"loading {model}")) as status:
        loaded = load(model, device=SPREAD)
        inputs, note = make_inputs(loaded.processor, loaded.model, shown, question)
        notes += [*([note] if note else []), *unknown(loaded, shown.frames[0] if isinstance(shown, Video) else shown, question)]
        status.update("answering")
        answers = {
            name: ask(loaded.model, loaded.processor, inputs, each, new_tokens=max_new_tokens)
            for name, each in {"full": None, **methods}.items()
        }
        whole = answers["full"]
        ways = []
        for name, answer in answers.items():
            mean = "" if answer.mean_tokens == answer.visual_tokens else f", mean over layers {answer.mean_tokens:.0f}"
            counts = f"{answer.visual_tokens} of {whole.visual_tokens} tokens{mean}" if answer is not whole else ""
            counts = counts or f"{whole.visual_tokens} tokens"
            ways.append(Way(title(name), answer.text, counts, answer.report.images if answer.report else None))
        unsaved = None
        try:
            if isinstance(shown, Video):
                seen = frames_as_seen(inputs, loaded.processor, shown.frames)
                save_question(question, seen, shown.seconds, ways, place)
            else:
                save_question(question, [first_as_seen(inputs, loaded.processor, shown)], [], ways, place)
        except FoveateError as error:  # the answers are told all the same
            unsaved = error
    for line in notes:
        sayer(err)(f"note: {line}", "yellow")
    tokens = {name: answer.visual_tokens for name, answer in answers.items()}
    told = {"answers": {name: answer.text for name, answer in answers.items()}, "visual_tokens": tokens}
    told |= {"picture": None if unsaved else str(place)}
    lines = [f"{way.name}: {way.answer} ({way.counts})" for way in ways] if unsaved else []  # otherwise the picture says it
    with telling(told, json_file, lambda: [sayer(out)(line) for line in lines], unsaved):
        if not unsaved:
            sayer(err)(f"picture: {place}")
