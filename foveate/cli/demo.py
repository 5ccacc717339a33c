"""``foveate demo``: the pocket model answers about three scenes, with all visual tokens and with a fraction of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from ..errors import FoveateError, MissingExtraError
from ..places import ready_folder, writing
from .common import POCKET, Configs, Fields, Imports, err, methods_of, out, sayer
from .document import JsonFile, ready_json, tell

if TYPE_CHECKING:
    from ..answering import Answer
    from ..methods.base import Method

EPILOG = "Example:  foveate demo --folder pictures"
SHOWN = ("prumerge+", "prumerge")
BUDGET = 144  # tokens for methods that have no rule of their own


@dataclass(frozen=True)
class Shown:
    """One scene of the demo."""

    level: str
    question: str
    expected: str
    answers: dict[str, Answer]
    scene: Path | None
    picture: Path | None

    def to_dict(self) -> dict[str, Any]:
        return {
            "level": self.level,
            "question": self.question,
            "expected": self.expected,
            "answers": {name: answer.text for name, answer in self.answers.items()},
            "visual_tokens": {name: answer.visual_tokens for name, answer in self.answers.items()},
            "layers": {name: answer.layers for name, answer in self.answers.items()},
            "prefill_seconds": {name: answer.prefill for name, answer in self.answers.items()},
            "prefill_flops": {name: answer.flops for name, answer in self.answers.items()},
            "scene": self.scene and str(self.scene),
            "picture": self.picture and str(self.picture),
        }


def demo_command(
    folder: Annotated[Path, typer.Option(help="Where the pictures go.")] = Path("foveate-demo"),
    seed: Annotated[int, typer.Option(help="Other scenes.")] = 7,
    method: Annotated[
        list[str] | None,
        typer.Option(
            "--method",
            "--methods",
            help="Names, separated by commas, instead of prumerge+ and prumerge; may be given again. 144 tokens without a rule.",
        ),
    ] = None,
    fields: Fields = None,
    config: Configs = None,
    imports: Imports = None,
    model: Annotated[str, typer.Option(help="Hub id, folder, pocket or pocket-qwen.")] = POCKET,
    json_file: JsonFile = None,
) -> None:
    """A pocket model answers about three scenes, with all visual tokens and with a fraction of them."""
    methods = methods_of(method or ([] if config else SHOWN), None, fields, config, otherwise=BUDGET)
    ready_json(json_file, reads=[*(method or []), *(config or [])])
    with err.status("starting") as status:
        scenes, problem = run_demo(folder, seed, methods, lambda what: status.update(escape(what)), model)
    document = {"scenes": [scene.to_dict() for scene in scenes]}
    bare = isinstance(problem, MissingExtraError)
    if bare:
        sayer(err)(f"note: there are no pictures of what is kept. {problem}", "yellow")
    tell(document, json_file, lambda: _show(scenes), None if bare else problem)


def _show(scenes: list[Shown]) -> None:
    say, first = sayer(out), scenes[0]
    for scene in scenes:
        out.print(_table(scene))
        say(f"what they keep: {scene.picture}\n" if scene.picture else "")
    if first.scene:
        say(f"Ask about one yourself:  foveate ask {first.scene} '{first.question}' --compare")


def _table(scene: Shown) -> Table:
    """The answers about one scene, and what they cost."""
    title = f"{scene.level}: [bold]{escape(scene.question)}[/bold]  expected: [bold]{escape(scene.expected)}[/bold]"
    table = Table(title=title, title_justify="left")
    for column in ("", "answer", "visual tokens", "LLM prefill", "LLM FLOPs saved"):
        table.add_column(column, justify="left" if column in ("", "answer") else "right")
    full = scene.answers["full"]
    for name, answer in scene.answers.items():
        said = f"[{'green' if answer.text == scene.expected else 'red'}]{escape(answer.text)}[/]"
        tokens = f"{answer.shown_tokens} ({answer.mean_tokens / full.visual_tokens:.0%})"
        saved = "" if answer is full else f"{(full.flops - answer.flops) / full.flops:.0%}"
        table.add_row("all tokens" if name == "full" else name, said, tokens, f"{1000 * answer.prefill:.1f} ms", saved)
    return table


def run_demo(
    folder: Path, seed: int, methods: dict[str, Method], progress: Callable[[str], None], model: str = POCKET
) -> tuple[list[Shown], FoveateError | None]:
    """Draw three scenes from plain to crowded, answer one question about each with all tokens and with each method, and save a
    picture of each. Beside them, why pictures are missing.
    """
    from ..answering import ask, save_kept
    from ..chat import make_inputs
    from ..lab.examples import examples
    from ..loading import SPREAD, load
    from ..video import Video
    from ..viz.overlay import picture_file

    ready_folder(folder)
    problem: FoveateError | None = None
    try:
        picture_file(folder / "kept.png")
    except MissingExtraError as error:
        problem = error
    progress(f"loading {model}")
    loaded = load(model, device=SPREAD)
    ways: dict[str, Method | None] = {"full": None, **methods}
    shown: list[Shown] = []
    for number, (name, scene, question) in enumerate(examples(loaded, seed), 1):
        progress(f"{name}: {question.text}")
        inputs, _ = make_inputs(loaded.processor, loaded.model, scene, question.text)
        if not shown:
            ask(loaded.model, loaded.processor, inputs, None, new_tokens=2)  # warm-up, so that all prefills are timed alike
        answers = {}
        for key, method in ways.items():
            answers[key] = ask(loaded.model, loaded.processor, inputs, method, new_tokens=8, repeats=3)
        file = folder / f"scene-{number}-{name}.{'gif' if isinstance(scene, Video) else 'png'}"
        scene_file: Path | None = file
        kept: Path | None = None
        said = ", ".join(f"{key}: {answer.text}" for key, answer in answers.items())
        title = f"{question.text}   {question.answer}   ({said})"
        try:
            with writing(file):
                _save(scene, file)
            if not isinstance(problem, MissingExtraError):
                kept = folder / f"kept-{number}-{name}.png"
                save_kept(scene, loaded.processor, inputs, answers, kept, title)
        except FoveateError as error:
            problem, scene_file, kept = error, None, None
        shown.append(Shown(name, question.text, question.answer, answers, scene_file, kept))
    return shown, problem


def _save(scene: Any, file: Path) -> None:
    """Write a picture as PNG, a clip as a moving GIF."""
    if hasattr(scene, "frames"):
        first, *others = scene.frames
        first.save(file, save_all=True, append_images=others, duration=round(1000 / scene.fps), loop=0)
    else:
        scene.save(file)
