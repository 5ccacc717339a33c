"""``foveate compare``: methods x budgets on the pocket test set or your own data, and tables of the PruMerge paper in small."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..places import saving
from .common import (
    POCKET,
    ExampleFile,
    Imports,
    LongestAnswer,
    PlanFile,
    ScoreName,
    VideoFrames,
    err,
    out,
    parts_of,
    progress,
    resumable,
    sayer,
    starting,
    wide,
)
from .document import JsonFile, ready_json, telling
from .html import HtmlFile, lines_part, picture_part, table_part, write_html

if TYPE_CHECKING:
    from ..lab.runner import Runner

EPILOG = (
    "Examples:  foveate compare --methods prumerge+,visionzip --budgets 64,144 --scenes 60  |  "
    "foveate compare --save results  |  foveate compare --table 4  |  "
    "foveate compare --model llava-hf/llava-1.5-7b-hf --data examples.jsonl --methods prumerge+,fovea,divprune --budgets 0.1,0.33"
)


def compare_command(
    methods: Annotated[
        str | None,
        typer.Option(
            "--methods", "--method", help="Names, name:preset, or files of Method.save, separated by commas. Default: all."
        ),
    ] = None,
    imports: Imports = None,
    budgets: Annotated[
        str | None,
        typer.Option(
            "--budgets",
            "--budget",
            help="Visual tokens of 576 to keep, separated by commas: 16,36,64,144,288; of pocket-qwen shares: 0.1,0.22,0.33,0.5.",
        ),
    ] = None,
    own: Annotated[bool, typer.Option("--own/--no-own", help="Also run the methods' own adaptive rules.")] = True,
    scenes: Annotated[int, typer.Option(min=1, help="Test scenes to draw.")] = 501,
    each: Annotated[int, typer.Option(min=1, help="Questions about each scene, at most; a scene has about 16.")] = 2,
    seed: Annotated[int, typer.Option(help="Seed of the test set.")] = 2403,
    model: Annotated[str, typer.Option(help="Hub id, folder, pocket or pocket-qwen.")] = POCKET,
    data: ExampleFile = None,
    score: ScoreName = "exact",
    limit: Annotated[int | None, typer.Option(min=1, help="Of --data, only the first rows.")] = None,
    max_tokens: LongestAnswer = 32,
    frames: VideoFrames = 8,
    plan: PlanFile = None,
    store: Annotated[Path, typer.Option(help="Results so far; an interrupted run goes on from there.")] = Path(
        "foveate-compare.jsonl"
    ),
    save: Annotated[Path | None, typer.Option(help="Folder for the tables and the picture (md, json, csv, png).")] = None,
    table: Annotated[int | None, typer.Option(help="Table 4, 5 or 7 of the LLaVA-PruMerge paper in small, instead.")] = None,
    html: HtmlFile = None,
    json_file: JsonFile = None,
) -> None:
    """Registered methods at several budgets on the pocket test set, or on your own data, beside baselines at equal cost."""
    mine = None if data is None else OwnData(data, score, limit, max_tokens, frames)
    if plan is not None:
        methods = ",".join(filter(None, [methods, str(planned_file(plan))]))
    options = checked(CompareOptions(methods, budgets, own, scenes, each, seed, model, store, save, table, mine))
    ready_json(json_file, options.store, html, *options.saved, reads=[data, plan, *options.names])
    resumable(options.store)
    report = run_compare(options)
    with telling(report, json_file, lambda: show(report, out)) as keep:
        if save and keep(write_files, report, save):
            sayer(err)(f"written to {save}")
        if html is not None:
            keep(lambda: write_html(html, *page_parts(report), report["command"]))


def planned_file(plan: Path) -> Path:
    """The file of a plan.

    Raises
    ------
    InputError : it is none.
    """
    from ..errors import InputError
    from ..tuning.plan import read_plan

    read_plan(plan)
    if plan.suffix != ".json":
        raise InputError(f"{plan}: give the plan a name that ends in .json, by which it is told from names of methods")
    return plan


@dataclass(frozen=True)
class OwnData:
    """Examples of one's own, and how they are answered."""

    path: Path
    score: str
    limit: int | None
    max_tokens: int
    frames: int


@dataclass(frozen=True)
class CompareOptions:
    """What was asked for."""

    methods: str | None
    budgets: str | None
    own: bool
    scenes: int
    each: int
    seed: int
    model: str
    store: Path
    save: Path | None
    table: int | None
    data: OwnData | None = None

    @property
    def names(self) -> tuple[str, ...]:
        from ..lab.compare import check_methods
        from ..methods.registry import registered

        given = tuple(registered()) if self.methods is None else parts_of(self.methods, "methods", "prumerge+,visionzip")
        return check_methods(given)

    @property
    def counts(self) -> tuple[int | float, ...] | None:
        """None = the usual ones of the model."""
        return None if self.budgets is None else parse_counts(self.budgets, self.model)

    @property
    def saved(self) -> list[Path]:
        """The files that ``--save`` writes."""
        if self.save is None:
            return []
        if self.table is not None:
            return [self.save / f"table-{self.table}{kind}" for kind in (".md", ".json")]
        return [self.save / f"comparison{kind}" for kind in (".md", ".json", ".csv", ".png")]

    @property
    def command(self) -> str:
        """What gives the same report again."""
        chosen: list[Any] = ["foveate", "compare"]
        chosen += ["--table", self.table] if self.table is not None else []
        model = None if self.model == POCKET else self.model
        for name, value in (("--methods", self.methods), ("--budgets", self.budgets), ("--model", model)):
            chosen += [] if value is None else [name, value]
        chosen += [] if self.own else ["--no-own"]
        if self.data is not None:
            limit = [] if self.data.limit is None else ["--limit", self.data.limit]
            how = ["--score", self.data.score, "--max-tokens", self.data.max_tokens, "--frames", self.data.frames]
            return shlex.join(map(str, [*chosen, "--data", self.data.path, *how, *limit]))
        return shlex.join(map(str, [*chosen, "--scenes", self.scenes, "--each", self.each, "--seed", self.seed]))


def parse_counts(text: str, model: str = POCKET) -> tuple[int | float, ...]:
    """Counts and shares in ascending order; what has a point is a share.

    Raises
    ------
    InputError : the text is no list of counts, or shares, that a picture of the model can have.
    """
    from ..errors import InputError
    from ..lab.compare import TOTAL

    most = TOTAL if model == POCKET or model.startswith(f"{POCKET}+") else 2**31
    try:
        parts = [float(part) if "." in part else int(part) for part in text.split(",")]
    except ValueError as error:
        raise InputError(
            f"--budgets {text!r} is no list of whole numbers or shares. Give counts of {TOTAL}, such as 64,144, or shares, such as "
            "0.1,0.33."
        ) from error
    budgets: set[int | float] = set(parts)
    if len(budgets) < len({(type(budget), budget) for budget in parts}):
        raise InputError(f"--budgets {text!r}: 1 is one token, and 1.0 are all. They have one column in the tables: leave one out.")
    for budget in sorted(budgets):
        if isinstance(budget, float) and not 0 < budget <= 1:
            raise InputError(f"--budgets {text!r}: {budget} is no share of the tokens of a picture. Give one above 0, up to 1.0.")
        if isinstance(budget, int) and not 1 <= budget <= most:
            raise InputError(f"--budgets {text!r}: {budget} is not between 1 and {TOTAL}, the visual tokens of a picture.")
    return tuple(sorted(budgets))


def checked(options: CompareOptions) -> CompareOptions:
    """The options, where a run can begin and its files can be written.

    Raises
    ------
    InputError : something is wrong with them; nothing has been computed yet.
    """
    from ..errors import InputError

    with starting():
        from ..lab.paper_tables import BUILD
        from ..places import ready_file, ready_folder
        from ..viz.overlay import picture_file

    if options.table is not None:
        if options.table not in BUILD:
            raise InputError(f"there is no preset for table {options.table}; choose one of {', '.join(map(str, BUILD))}")
        if options.methods is not None or options.budgets is not None:
            raise InputError("--table brings its own methods and budgets. Leave out --methods and --budgets.")
    _ = options.names, options.counts
    ready_file(options.store)
    if options.save is not None:
        ready_folder(options.save)
        if options.table is None:
            picture_file(options.save / "comparison.png")
    return options


def run_compare(options: CompareOptions) -> dict[str, Any]:
    """Run what the store does not hold, and return the report."""
    with starting():
        from ..lab.compare import budgets_for, compare
        from ..lab.paper_tables import paper_table
    with err.status(escape(f"loading {options.model}")):
        runner = _runner(options)
    budgets = budgets_for(runner, options.counts, options.table)
    with progress("encoding") as tell:
        if options.table is None:
            report = compare(runner, options.names, budgets, own=options.own, tell=tell)
        else:
            report = paper_table(options.table, runner, tell)
    return {"command": options.command, **report}


def _runner(options: CompareOptions) -> Runner:
    from ..lab.runner import Runner

    if options.data is None:
        return Runner(options.scenes, options.each, options.seed, options.store, model=options.model)
    from ..lab.own import OwnRunner, read_examples
    from ..lab.scoring import score_of
    from ..loading import load

    own, loaded = options.data, load(options.model)
    examples = read_examples(own.path, loaded, own.frames, own.limit)
    for note in examples.notes():
        sayer(err)(f"note: {note}", "yellow")
    return OwnRunner(examples, score_of(own.score), own.score, options.store, loaded, longest=own.max_tokens)


def write_files(report: dict[str, Any], folder: Path) -> None:
    """Write a report as Markdown, JSON and CSV, and a comparison as a picture, too.

    Raises
    ------
    FoveateError : a file cannot be written.
    """
    from ..lab.tables import files
    from ..places import write_text

    with saving() as keep:
        for name, text in files(report).items():
            keep(write_text, folder / name, text)
        if "table" not in report:
            from ..viz.curves import save_comparison

            keep(save_comparison, report, folder / "comparison.png")


def page_parts(report: dict[str, Any]) -> tuple[str, list[str]]:
    """The title of a report's page, and what stands on it."""
    from ..lab.tables import RANKED, about, about_table, failed, rank_table, reasons
    from ..viz.curves import comparison_figure
    from ..viz.page import paragraph

    if "table" in report:
        claims = [claim["sentence"] for claim in report["claims"]]
        lines = lines_part([*claims, report["tally"], *failed(report), *report["notes"]])
        return f"{report['title']}, in small", [paragraph(about_table(report)), table_part(preset_table(report)), *lines]
    data = report.get("data")
    title = "Methods on the pocket test set" if data is None else f"Methods on {data['name']}"
    drawn = picture_part(lambda: comparison_figure(report), "answers right against visual tokens")
    return title, [paragraph(about(report)), drawn, table_part(rank_table(report)), *lines_part([RANKED, *reasons(report)])]


def preset_table(report: dict[str, Any]) -> Table:
    """A table of the paper, with ours."""
    from ..lab.tables import cells

    heads, rows = cells(report)
    shown = Table()
    for number, head in enumerate(heads):
        shown.add_column(escape(head), justify="left" if number == 0 else "right")
    for row in rows:
        if row[0].startswith("Task:"):
            shown.add_section()
        shown.add_row(*map(escape, row))
    return shown


def show(report: dict[str, Any], console: Console) -> None:
    """Print a report."""
    from ..lab.tables import RANKED, about, about_table, failed, rank_table, reasons

    console = wide(console)
    say = sayer(console)
    if "table" not in report:
        say(about(report), "bold")
        console.print(rank_table(report))
        say(RANKED, "dim")
        for reason in reasons(report):
            say(f"- {reason}")
        return
    say(f"{report['title']}, in small. {about_table(report)}", "bold")
    console.print(preset_table(report))
    for claim in report["claims"]:
        say(f"- {claim['sentence']}")
    for line in (report["tally"], *failed(report), *report["notes"]):
        say(line, "dim")
