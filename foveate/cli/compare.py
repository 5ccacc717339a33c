"""``foveate compare``: methods x budgets on the pocket test set, and the tables of the LLaVA-PruMerge paper in small."""

from __future__ import annotations

import json
import shlex
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ..errors import InputError
from ..lab.compare import COUNTS, TOTAL, Tell, check_methods, compare
from ..lab.paper_tables import BUILD, cells, paper_table
from ..lab.runner import Runner
from ..lab.tables import RANKED, about, csv_text, markdown, markdown_table, rank_table, reasons
from ..loading import quiet_loading
from ..methods.registry import registered
from ..viz.overlay import make_folder, picture_file

WIDTH = 150  # of tables that go to a file or a pipe


@dataclass(frozen=True)
class CompareOptions:
    """What was asked for."""

    methods: str | None
    budgets: str | None
    own: bool
    scenes: int
    each: int
    seed: int
    store: Path
    save: Path | None
    table: int | None

    @property
    def names(self) -> tuple[str, ...]:
        return check_methods(
            tuple(registered()) if self.methods is None else _parts(self.methods, "methods", "prumerge+,visionzip")
        )

    @property
    def counts(self) -> tuple[int, ...]:
        return COUNTS if self.budgets is None else parse_counts(self.budgets)

    @property
    def command(self) -> str:
        """What gives the same report again."""
        chosen: list[Any] = ["foveate", "compare"]
        chosen += ["--table", self.table] if self.table is not None else []
        for name, value in (("--methods", self.methods), ("--budgets", self.budgets)):
            chosen += [] if value is None else [name, value]
        chosen += [] if self.own else ["--no-own"]
        return shlex.join(map(str, [*chosen, "--scenes", self.scenes, "--each", self.each, "--seed", self.seed]))


def _parts(text: str, what: str, example: str) -> tuple[str, ...]:
    found = tuple(part.strip() for part in text.split(","))
    if not all(found):
        raise InputError(f"--{what} {text!r} has an empty entry. Give names separated by commas, such as {example}.")
    return found


def parse_counts(text: str) -> tuple[int, ...]:
    """Counts in ascending order.

    Raises
    ------
    InputError : the text is no list of counts.
    """
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise InputError(f"--budgets {text!r} is no list of whole numbers. Give counts of {TOTAL}, such as 64,144.") from error
    wrong = [count for count in counts if not 1 <= count <= TOTAL]
    if wrong:
        raise InputError(f"--budgets {text!r}: {wrong[0]} is not between 1 and {TOTAL}, the visual tokens of a picture.")
    return tuple(sorted(set(counts)))


def checked(options: CompareOptions) -> CompareOptions:
    """The options, where a run can begin and its files can be written.

    Raises
    ------
    InputError : something is wrong with them; nothing has been computed yet.
    """
    if options.table is not None:
        if options.table not in BUILD:
            raise InputError(f"there is no preset for table {options.table}; choose one of {', '.join(map(str, BUILD))}")
        if options.methods is not None or options.budgets is not None:
            raise InputError("--table brings its own methods and budgets. Leave out --methods and --budgets.")
    _ = options.names, options.counts
    if options.store.is_dir():
        raise InputError(f"{options.store} is a folder; give --store the name of a file")
    if options.save is not None:
        make_folder(options.save)
        try:
            with tempfile.TemporaryFile(dir=options.save):
                pass
        except OSError as error:
            raise InputError(f"{options.save} cannot be written: {error.strerror}. Give another folder with --save.") from error
        if options.table is None:
            picture_file(options.save / "comparison.png")
    return options


@contextmanager
def progress(console: Console) -> Iterator[Tell]:
    """A bar that is told what comes next."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("encoding", total=None)
        yield lambda what, done, total: bar.update(task, description=escape(what), completed=done, total=total)


def run_compare(options: CompareOptions, console: Console) -> dict[str, Any]:
    """Run what the store does not hold, write the files, and return the report."""
    with console.status("loading the pocket model"), quiet_loading(bars=False):
        runner = Runner(options.scenes, options.each, options.seed, options.store)
    with progress(console) as tell:
        if options.table is None:
            report = compare(runner, options.names, options.counts, own=options.own, tell=tell)
        else:
            report = paper_table(options.table, runner, tell)
    report = {"command": options.command, **report}
    if options.save is not None:
        for name, text in files(report).items():
            (options.save / name).write_text(text)
        if options.table is None:
            from ..viz.curves import save_comparison

            save_comparison(report, options.save / "comparison.png")
    return report


def files(report: dict[str, Any]) -> dict[str, str]:
    """What ``--save`` writes, but for the picture."""
    document = json.dumps(report, indent=1) + "\n"
    if "table" in report:
        return {f"table-{report['table']}.md": table_markdown(report), f"table-{report['table']}.json": document}
    return {"comparison.md": markdown(report), "comparison.json": document, "comparison.csv": csv_text(report)}


def table_markdown(report: dict[str, Any]) -> str:
    """A table of the paper, its claims and what must be said about it."""
    heads, rows = cells(report)
    left = 1 if report["table"] == 4 else 3
    lines = [f"# {report['title']}, in small", "", about_table(report) + ".", "", "```bash", report["command"], "```", ""]
    lines += [*markdown_table(heads, rows, left), "", report["tally"] + ".", ""]
    lines += [f"- {claim['sentence']}" for claim in report["claims"]]
    return "\n".join([*lines, "", *report["notes"], *failed(report), ""])


def about_table(report: dict[str, Any]) -> str:
    return f"Paper / ours: {report['questions']} questions about {report['scenes']} scenes (seed {report['seed']})"


def failed(report: dict[str, Any]) -> list[str]:
    """Why lines of a table are empty."""
    return [f"{line['label']}: {line['reason']}" for line in report["lines"] if line["reason"]]


def show(report: dict[str, Any], console: Console) -> None:
    """Print a report."""
    if not console.is_terminal and console.width < WIDTH:
        console = Console(file=console.file, width=WIDTH, highlight=False)

    def say(line: str, style: str = "") -> None:
        console.print(line, style=style, markup=False, soft_wrap=True)

    if "table" not in report:
        say(about(report), "bold")
        console.print(rank_table(report))
        say(RANKED, "dim")
        for reason in reasons(report):
            say(f"- {reason}")
        return
    heads, rows = cells(report)
    say(f"{report['title']}, in small. {about_table(report)}", "bold")
    shown = Table()
    for number, head in enumerate(heads):
        shown.add_column(escape(head), justify="left" if number == 0 else "right")
    for row in rows:
        if row[0].startswith("Task:"):
            shown.add_section()
        shown.add_row(*map(escape, row))
    console.print(shown)
    for claim in report["claims"]:
        say(f"- {claim['sentence']}")
    for line in (report["tally"], *failed(report), *report["notes"]):
        say(line, "dim")
