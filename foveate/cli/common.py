"""What the commands share: where they print, and how they read budgets and lists."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.status import Status

if TYPE_CHECKING:
    from ..methods.base import Method

out, err = Console(highlight=False), Console(stderr=True, highlight=False)
POCKET = "pocket"  # the model where none is named
DEFAULT = "prumerge+"  # the method
LOOPBACK = ("127.0.0.1", "::1", "localhost")  # interfaces that only this machine reaches
Tell = Callable[[str, int, int], None]  # what comes next, how much is done, of how much
WIDTH = 150  # of tables that go to a file or a pipe


def starting() -> Status:
    """What a terminal shows while libraries are imported, which takes seconds. Nothing is shown elsewhere."""
    return err.status("starting")


def first_process() -> bool:
    """Whether this is the process that tells, where accelerate or torchrun started several."""
    return int(os.environ.get("RANK", "0")) == 0


@contextmanager
def progress(first: str) -> Iterator[Tell]:
    """A bar that is told what comes next, how much is done, and of how much. It is shown in a terminal and goes in the end.

    Parameters
    ----------
    first : what is shown until it is told something.
    """
    if not (err.is_terminal and first_process()):
        yield lambda what, done, total: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task(escape(first), total=None)
        yield lambda what, done, total: bar.update(task, description=escape(what), completed=done, total=total)


def parse_budget(text: str) -> int | float | None:
    """A whole number is a count, anything with a point a fraction, none the method's own rule.

    Raises
    ------
    InputError : the text is no number.
    """
    from ..errors import InputError

    if text.lower() == "none":
        return None
    try:
        return int(text) if text.lstrip("+-").isdigit() else float(text)
    except ValueError as error:
        raise InputError(f"budget {text!r} is not a number. Use a count such as 144, a fraction such as 0.25, or none.") from error


def _import(files: list[Path] | None) -> list[Path] | None:
    """Run the files of ``--import`` before anything else looks at methods; processes that are started later run them, too."""
    if files:
        from ..methods.registry import IMPORTS, import_file

        for file in files:
            import_file(file)
        earlier = filter(None, os.environ.get(IMPORTS, "").split(os.pathsep))
        os.environ[IMPORTS] = os.pathsep.join(dict.fromkeys([*earlier, *(str(file.absolute()) for file in files)]))
    return files


Fields = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="A field of the method, such as k=16; may be given again."),
]
Config = Annotated[
    Path | None, typer.Option(help="File of a method, written by Method.save or 'foveate search', instead of --method.")
]
Configs = Annotated[
    list[Path] | None,
    typer.Option("--config", help="File of a method, written by Method.save or 'foveate search'; may be given again."),
]
PlanFile = Annotated[
    Path | None, typer.Option("--plan", help="Plan of 'foveate tune', instead of a method; it is refused by other models.")
]
ExampleFile = Annotated[
    Path | None,
    typer.Option(
        "--data",
        help='Your own examples: JSON lines such as {"image": "a.jpg", "question": "...", "answer": "..."}, or "video". '
        "Without answers, the model's own with all tokens are right. Default: drawn scenes.",
    ),
]
ScoreName = Annotated[
    str,
    typer.Option("--score", help="Of --data: exact, begins, contains, vqa, anls, choice, or a function of yours: my.py:score."),
]
LongestAnswer = Annotated[int, typer.Option("--max-tokens", "--max-new-tokens", min=1, help="Of --data: longest answer.")]
VideoFrames = Annotated[int, typer.Option("--frames", min=1, help="Of --data: frames of a video to take.")]
Imports = Annotated[
    list[Path] | None,
    typer.Option("--import", callback=_import, is_eager=True, help="Python file that defines a method; may be given again."),
]


def planned(plan: Path, *others: Any) -> Method:
    """The method of a plan.

    Raises
    ------
    InputError : it is no plan, or other options say something of the method, too.
    """
    from ..errors import InputError

    with starting():
        from ..tuning.plan import load_plan

    if any(other is not None and other != [] for other in others):
        raise InputError("--plan says all of the method. Leave out --method, --budget, --set and --config.")
    return load_plan(plan)


def method_of(
    name: str | None,
    budget: str | None,
    fields: Sequence[str] | None = None,
    config: Path | None = None,
    plan: Path | None = None,
) -> Method:
    """A method as the command line names it.

    Parameters
    ----------
    name : as listed, or a JSON file of a method; None = ``config``, or the default where there is none.
    budget, fields, config, plan : as the options say.

    Raises
    ------
    InputError : there is no such method or field, or a value is wrong.
    """
    if plan is not None:
        return planned(plan, name, budget, fields, config)
    from ..errors import InputError

    with starting():
        from ..methods.base import Method
        from ..methods.fields import read_field
        from ..methods.registry import get, look_up

    if name is not None and config is not None:
        raise InputError("--method and --config both name a method. Leave one out.")
    file = config or (Path(name) if name is not None and name.endswith(".json") else None)
    method = None if file is None else Method.load(file)
    cls = look_up(name or DEFAULT)[0] if method is None else type(method)
    found = {field: read_field(cls, field, text) for field, text in _pairs(fields or ()).items()}
    if budget is not None:
        if "budget" in found:
            raise InputError("--budget and --set budget= are one field. Leave one out.")
        found["budget"] = parse_budget(budget)
    if method is None:
        return get(name or DEFAULT, **found)
    if "budget" in found:
        method = method.with_budget(found.pop("budget"))
    return method.with_fields(**found) if found else method


def methods_of(
    names: Sequence[str],
    budget: str | None,
    fields: Sequence[str] | None = None,
    configs: Sequence[Path] | None = None,
    otherwise: int | None = None,
    plan: Path | None = None,
) -> dict[str, Method]:
    """Several methods by their names, those in files by the names of these; ``otherwise`` is the budget of those without a rule.

    A name may be several, separated by commas.

    Raises
    ------
    InputError : as of ``method_of``, or one is given twice.
    """
    from ..errors import InputError

    each = [part for name in names for part in parts_of(name, "method", "prumerge+,fovea")]
    asked = [(name, name, None) for name in each] + [(file.stem, None, file) for file in configs or ()]
    found: dict[str, Method] = {} if plan is None else {plan.stem: planned(plan)}
    for shown, name, file in asked:
        if shown in found:
            raise InputError(f"the method {shown} is given twice. Leave one out.")
        try:
            found[shown] = method_of(name, budget, fields, file)
        except InputError:
            if otherwise is None or budget is not None:
                raise
            found[shown] = method_of(name, str(otherwise), fields, file)
    return found


def asked_of(
    name: str | None, budget: str | None, fields: Sequence[str] | None, config: Path | None, plan: Path | None = None
) -> tuple[str, int | float | None, str]:
    """A method for other processes: its name, a budget, and all of it where name and budget do not tell (``methods.saved.named``).

    Raises
    ------
    InputError : as of ``method_of``.
    """
    if plan is None and config is None and not fields and not (name or "").endswith(".json"):
        return name or DEFAULT, None if budget is None else parse_budget(budget), ""
    from ..methods.saved import dumped

    method = method_of(name, budget, fields, config, plan)
    return method.name, None, dumped(method)


def _pairs(fields: Sequence[str]) -> dict[str, str]:
    """``name=value`` texts by name.

    Raises
    ------
    InputError : one has no "=", or a name is given twice.
    """
    from ..errors import InputError

    found: dict[str, str] = {}
    for text in fields:
        name, equals, value = text.partition("=")
        name = name.strip()
        if not equals or not name:
            raise InputError(f"--set {text!r}: expected NAME=VALUE, such as --set budget=0.25")
        if name in found:
            raise InputError(f"--set {name} is given twice. Leave one out.")
        found[name] = value
    return found


_resumed: list[str] = []


def resumable(place: Path) -> None:
    """Say that what is done so far is in a file, from which the same command goes on."""
    _resumed[:] = [f"; what is done is in {place}, and the same command goes on from there"]


def resumes() -> str:
    """What to say of that when the command is interrupted."""
    return "".join(_resumed)


def parts_of(text: str, option: str, example: str) -> tuple[str, ...]:
    """The entries of a list that is separated by commas, each once.

    Raises
    ------
    InputError : one is empty.
    """
    from ..errors import InputError

    found = tuple(part.strip() for part in text.split(","))
    if not all(found):
        raise InputError(f"--{option} {text!r} has an empty entry. Give names separated by commas, such as {example}.")
    return tuple(dict.fromkeys(found))


def wide(console: Console, width: int = WIDTH) -> Console:
    """A console that is wide enough for tables where nobody's terminal says how wide it is."""
    if console.is_terminal or console.width >= width:
        return console
    return Console(file=console.file, width=width, highlight=False)


def sayer(console: Console) -> Callable[..., None]:
    """Prints a line as it is, without markup and line breaks."""

    def say(line: str, style: str = "", **options: Any) -> None:
        console.print(line, style=style, markup=False, soft_wrap=True, **options)

    return say
