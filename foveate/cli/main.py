"""``foveate``: the command line. Each command imports what it needs when it runs."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer import Abort

from .batch import EPILOG as BATCH_EPILOG
from .batch import batch_command
from .bench import EPILOG as BENCH_EPILOG
from .bench import bench_command
from .cost import EPILOG, cost_command
from .eval import EPILOG as EVAL_EPILOG
from .eval import eval_command
from .models import EPILOG as MODELS_EPILOG
from .models import models_command
from .serve import EXPORT_EPILOG, SERVE_EPILOG, export_command, serve_command

app = typer.Typer(
    name="foveate",
    help="Fewer visual tokens for vision-language models.",
    epilog="Examples:  foveate demo  |  foveate ask foveate-demo/scene-1-plain.png 'what color is the star ?' --compare",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
)
out, err = Console(highlight=False), Console(stderr=True, highlight=False)
_state = {"debug": False}


def _version(wanted: bool) -> None:
    if wanted:
        from .. import __version__

        out.print(f"foveate {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Fewer visual tokens for vision-language models: faster prefill, smaller caches, the same answers where it works."""
    _state["debug"] = debug


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.0%}"


@app.command(epilog="Example:  foveate demo --folder pictures")
def demo(
    folder: Annotated[Path, typer.Option(help="Where the pictures go.")] = Path("foveate-demo"),
    seed: Annotated[int, typer.Option(help="Other scenes.")] = 7,
    method: Annotated[
        list[str] | None,
        typer.Option(help="Show this method instead of prumerge+ and prumerge; may be given again. 144 tokens if it has no rule."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else on stdout.")] = False,
) -> None:
    """The pocket model answers about three scenes, with all visual tokens and with a fraction of them."""
    from .demo import run_demo, with_a_budget

    methods = {name: with_a_budget(name) for name in method or ("prumerge+", "prumerge")}
    with err.status("starting") as status:
        scenes = run_demo(folder, seed, methods, lambda what: status.update(escape(what)))
    if as_json:
        print(json.dumps({"scenes": [scene.to_dict() for scene in scenes]}))
        return
    for scene in scenes:
        title = f"{scene.level} scene: [bold]{escape(scene.question)}[/bold]  expected: [bold]{escape(scene.expected)}[/bold]"
        table = Table(title=title, title_justify="left")
        for column in ("", "answer", "visual tokens", "LLM prefill", "LLM FLOPs saved"):
            table.add_column(column, justify="left" if column in ("", "answer") else "right")
        full = scene.answers["full"]
        for name, answer in scene.answers.items():
            right = answer.text == scene.expected
            said = f"[{'green' if right else 'red'}]{escape(answer.text)}[/]"
            tokens = f"{answer.shown_tokens} ({_share(answer.mean_tokens, full.visual_tokens)})"
            saved = "" if answer is full else _share(full.flops - answer.flops, full.flops)
            table.add_row("all tokens" if name == "full" else name, said, tokens, f"{1000 * answer.prefill:.1f} ms", saved)
        out.print(table)
        out.print(f"what they keep: {scene.picture}\n", soft_wrap=True, markup=False)
    asked = scenes[0]
    out.print(f"Ask about one yourself:  foveate ask {asked.scene} '{asked.question}' --compare", soft_wrap=True, markup=False)


@app.command(
    "ask",
    epilog='Examples:  foveate ask photo.jpg "What is on the table?" --model llava-hf/llava-1.5-7b-hf  |  '
    'foveate ask scene.png "what color is the star ?" --compare --save kept.png  |  '
    'foveate ask clip.mp4 "What happens?" --model LanguageBind/Video-LLaVA-7B-hf --save strip.png',
)
def ask_command(
    file: Annotated[Path, typer.Argument(help="Any picture or video file.")],
    question: Annotated[str, typer.Argument(help="What to ask.")],
    model: Annotated[str | None, typer.Option(help="Hub id or folder; the pocket model by default.")] = None,
    method: Annotated[str, typer.Option(help="As listed by 'foveate methods'; name:preset for a preset.")] = "prumerge+",
    budget: Annotated[
        str | None, typer.Option(help="Visual tokens to keep: a count (144) or a fraction (0.25). Default: the method's rule.")
    ] = None,
    frames: Annotated[
        int | None,
        typer.Option(min=1, help="Frames of a video to take: 8 by default. With it, moving GIF and WebP are read as videos, too."),
    ] = None,
    compare: Annotated[bool, typer.Option(help="Also answer with all tokens, and with uniform and random ones.")] = False,
    save: Annotated[
        Path | None, typer.Option(help="Write a picture of the kept tokens; of a video, a strip of its frames.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 64,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else on stdout.")] = False,
) -> None:
    """Ask a question about a picture or a video, with fewer visual tokens."""
    if not question.strip():
        from ..errors import InputError

        raise InputError("the question is empty")
    from .. import answering
    from ..methods.registry import get
    from ..video import Video
    from ..viz.overlay import picture_file

    shown, notes = answering.open_shown(file, frames)
    video = shown if isinstance(shown, Video) else None
    save = save and picture_file(save)
    reducer = get(method, **({} if budget is None else {"budget": parse_budget(budget)}))
    with err.status(escape(f"loading {model or 'the pocket model'}")) as status:
        loaded, processor = answering.load_model(model)
        inputs, note = answering.make_inputs(processor, loaded, shown, question)
        notes += [answering.AS_PICTURES] if video and not answering.takes_videos(processor, loaded) else []
        notes += [*([note] if note else []), *([] if model else _unknown(video.frames[0] if video else shown, question))]
        status.update("answering")
        answers = answering.ask_all(loaded, processor, inputs, reducer, new_tokens=max_new_tokens, compare=compare)
        if save:
            notes += answering.save_kept(shown, processor, inputs, answers, save, question)
        notes += answering.limits(loaded, answers)
    chosen = answers[reducer.name]
    counts = answering.frame_counts(video, chosen.report) if video and chosen.report else []
    if as_json:
        document = {
            "model": model or "pocket",
            "method": reducer.settings(),
            "question": question,
            "answer": chosen.text,
            "answers": {name: answer.text for name, answer in answers.items()},
            "visual_tokens": {name: answer.visual_tokens for name, answer in answers.items()},
            "layers": {name: answer.layers for name, answer in answers.items()},
            "kept": None if chosen.report is None else [asdict(image) for image in chosen.report.images],
            "visual_tokens_before": sum(chosen.report.before) if chosen.report else chosen.visual_tokens,
            "video": {"fps": video.fps, "duration": video.duration, "frames": counts} if video else None,
            "prefill_seconds": {name: answer.prefill for name, answer in answers.items()},
            "prefill_flops": {name: answer.flops for name, answer in answers.items()},
            "picture": str(save) if save else None,
            "notes": notes,
        }
        print(json.dumps(document))
        return
    for line in notes:
        err.print(f"note: {line}", style="yellow", soft_wrap=True, markup=False)
    if not compare:
        out.print(escape(chosen.text), style="bold", soft_wrap=True)
        err.print(str(chosen.report), style="dim", soft_wrap=True, markup=False)
    else:
        table = Table()
        for column in ("tokens chosen by", "answer", "visual tokens", "LLM prefill", "LLM GFLOPs"):
            table.add_column(column, justify="left" if column in ("tokens chosen by", "answer") else "right")
        for name, answer in answers.items():
            flops = f"{answer.flops / 1e9:.2f}"
            table.add_row(answering.title(name), escape(answer.text), answer.shown_tokens, f"{1000 * answer.prefill:.1f} ms", flops)
        out.print(table)
    if counts and chosen.report:
        each = ", ".join(f"{frame['seconds']:.2f} s {frame['after']} of {frame['before']}" for frame in counts)
        total = f"{sum(chosen.report.before)} -> {sum(chosen.report.after)}"
        err.print(f"visual tokens of the video {total}; frame by frame: {each}", style="dim", soft_wrap=True, markup=False)
    if save:
        err.print(f"picture: {save}", soft_wrap=True, markup=False)


@app.command("methods", epilog="Example:  foveate methods")
def methods_command(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else on stdout.")] = False,
) -> None:
    """The table of methods."""
    from ..methods.registry import methods

    found = methods()
    if as_json:
        print(json.dumps([vars(info) for info in found]))
        return
    table = Table(show_lines=True)
    for column in ("name", "where", "reads", "count"):
        table.add_column(column, no_wrap=True)
    table.add_column("what it does")
    for info in found:
        places = {"inside the vision encoder": "encoder", "before the projector": "projector", "inside the decoder": "decoder"}
        name = "\n".join([info.name, *([", ".join(info.presets)] if info.presets else [])])
        paper = info.paper.rpartition("/")[2]
        where = places.get(info.stage, "both")
        reads = "\n".join(["[CLS]"] * info.reads_cls + ["question"] * info.reads_question)
        row = (name, where, reads, "adaptive" if info.adaptive else "budget", f"{info.summary} {paper}")
        table.add_row(*(escape(cell) for cell in row))
    out.print(table)
    out.print("second line of a name: its presets, as in prumerge:paper; last word: the paper's number at arxiv.org", style="dim")


@app.command(epilog="Example:  foveate search plan.json  |  foveate search heads.json --method yopo --share 0.5")
def search(
    plan: Annotated[Path, typer.Argument(help="The JSON file to write: plan= of g-search, heads= of yopo.")],
    method: Annotated[str, typer.Option(help="g-search, p-sigmoid or yopo.")] = "g-search",
    model: Annotated[str | None, typer.Option(help="Hub id or folder; the pocket model by default.")] = None,
    data: Annotated[
        Path | None, typer.Option(help='JSON lines such as {"image": "a.jpg", "question": "...", "answer": "..."}.')
    ] = None,
    examples: Annotated[int, typer.Option(min=1, help="How many of them; the paper uses a few hundred.")] = 200,
    epsilon: Annotated[float, typer.Option(min=0, help="g-search: accuracy that may be lost.")] = 0.002,
    steps: Annotated[int, typer.Option(min=1, help="g-search: keep rates are multiples of 1 / steps.")] = 16,
    budget: Annotated[float, typer.Option(min=0, max=1, help="p-sigmoid: mean keep rate over layers.")] = 0.5,
    share: Annotated[float, typer.Option(min=0, max=1, help="yopo: share of the heads that stay.")] = 0.5,
) -> None:
    """Search keep rates per decoder layer, or a head mask, on a calibration set."""
    from .search import Calibration, check_search, run_search

    check_search(method, plan, share)
    options = {"epsilon": epsilon, "steps": steps, "budget": budget, "share": share}
    with err.status(escape(f"loading {model or 'the pocket model'}")) as status:
        calibration = Calibration(model, data, examples)
        status.update("searching")
        found = run_search(method, calibration, plan, options, lambda line: err.print(line, style="dim", markup=False))
    out.print(found, markup=False, soft_wrap=True)
    err.print(f"plan: {plan}", soft_wrap=True, markup=False)


@app.command(
    epilog="Examples:  foveate compare --methods prumerge+,visionzip --budgets 64,144 --scenes 60  |  "
    "foveate compare --save results  |  foveate compare --table 4"
)
def compare(
    methods: Annotated[
        str | None, typer.Option(help="Names or name:preset, separated by commas. Default: all registered methods.")
    ] = None,
    budgets: Annotated[
        str | None, typer.Option(help="Visual tokens of 576 to keep, separated by commas. Default: 16,36,64,144,288.")
    ] = None,
    own: Annotated[bool, typer.Option("--own/--no-own", help="Also run the methods' own adaptive rules.")] = True,
    scenes: Annotated[int, typer.Option(min=1, help="Test scenes to draw.")] = 501,
    each: Annotated[int, typer.Option(min=1, help="Questions about each scene, at most; a scene has about 16.")] = 2,
    seed: Annotated[int, typer.Option(help="Seed of the test set.")] = 2403,
    store: Annotated[Path, typer.Option(help="Results so far; an interrupted run goes on from there.")] = Path(
        "foveate-compare.json"
    ),
    save: Annotated[Path | None, typer.Option(help="Folder for the tables and the picture (md, json, csv, png).")] = None,
    table: Annotated[int | None, typer.Option(help="Table 4, 5 or 7 of the LLaVA-PruMerge paper in small, instead.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else on stdout.")] = False,
) -> None:
    """Registered methods at several budgets on the pocket test set, beside baselines at equal cost."""
    from .compare import CompareOptions, checked, run_compare, show

    options = checked(CompareOptions(methods, budgets, own, scenes, each, seed, store, save, table))
    report = run_compare(options, err)
    if as_json:
        print(json.dumps(report))
    else:
        show(report, out)
    if save:
        err.print(f"written to {save}", soft_wrap=True, markup=False)


app.command("cost", epilog=EPILOG)(cost_command)
app.command("bench", epilog=BENCH_EPILOG)(bench_command)
app.command("eval", epilog=EVAL_EPILOG)(eval_command)
app.command("models", epilog=MODELS_EPILOG)(models_command)
app.command("export", epilog=EXPORT_EPILOG)(export_command)
app.command("serve", epilog=SERVE_EPILOG)(serve_command)
app.command("batch", epilog=BATCH_EPILOG)(batch_command)


def parse_budget(text: str) -> int | float:
    """A whole number is a count, anything with a point a fraction.

    Raises
    ------
    InputError : the text is no number.
    """
    from ..errors import InputError

    try:
        return int(text) if text.lstrip("+-").isdigit() else float(text)
    except ValueError as error:
        raise InputError(f"budget {text!r} is not a number. Use a count such as 144 or a fraction such as 0.25.") from error


def _unknown(image: Any, question: str) -> list[str]:
    """What the pocket model cannot know."""
    from ..pocket.scenes import SIDE
    from ..pocket.vocabulary import unknown_words

    notes, words = [], ", ".join(repr(word) for word in unknown_words(question))
    if image.size != (SIDE, SIDE):
        notes.append("the pocket model knows only its own drawn scenes (foveate demo saves some); use --model for photos")
    if words:
        notes.append(f"the pocket model has never seen {words}; ask as in 'what color is the star ?'")
    return notes


def run() -> None:
    """Entry point: errors are one or two lines on stderr; the exit code is 2 for bad input and 1 for what nobody expected."""
    from ..errors import FoveateError

    code = 1
    try:
        sys.exit(app(standalone_mode=False) or 0)
    except (KeyboardInterrupt, Abort):
        sys.exit(130)
    except Exception as error:
        if _state["debug"]:
            raise
        if isinstance(error, FoveateError):
            message, code = str(error), 2
        elif hasattr(error, "format_message"):  # of the command line itself; typer brings its own click or uses the installed one
            message, code = error.format_message(), getattr(error, "exit_code", 2)
            message = message if "Usage:" in message else f"{message} (foveate --help shows how)"
        else:
            where = "foveate --debug with the same command shows where"
            message = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')} ({where})"
        err.print(message if "Usage:" in message else f"error: {message}", style="red", markup=False, soft_wrap=True)
    sys.exit(code)


if __name__ == "__main__":
    run()
