"""Reports of ``foveate compare``, and of the tables of a paper, as tables, Markdown and CSV."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

Row = dict[str, Any]
SECTIONS = ("before the decoder", "inside the decoder")
SHORT = {"inside the encoder": "encoder", "before the projector": "projector", "inside the decoder": "decoder"}
RANKED = (
    "In %. In brackets the rank in the column: before the decoder by accuracy, at equal counts; inside the decoder by the "
    "difference to spatial at the same mean over decoder layers. The number after @ is that mean, where it is not the budget. "
    "Budgets are what enters the decoder or, inside it, what is left in the last layer (p-sigmoid: the mean over layers; aim: what "
    "enters). Mean ranks are over the columns that a method has."
)


def points(difference: Sequence[float] | None) -> str:
    """A difference and its interval, in points."""
    return "" if difference is None else "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * value for value in difference))


def percent(row: Row) -> str:
    """An accuracy and its interval."""
    return f"{100 * row['accuracy']:.1f} [{100 * row['low']:.1f}, {100 * row['high']:.1f}]"


def section_of(row: Row) -> str:
    return SECTIONS[row["kind"] == SECTIONS[1]]


def ranks(report: Row) -> dict[tuple[str, int], int]:
    """The rank of each method at each budget, in its section; equal ones share a rank."""
    found: dict[tuple[str, int], int] = {}
    for budget in report["budgets"]:
        for section in SECTIONS:
            rows = [row for row in report["rows"] if row["budget"] == budget and row["asked"] and section_of(row) == section]
            values = {row["method"]: _merit(row, section) for row in rows}
            found |= {(name, budget): 1 + sum(other > value for other in values.values()) for name, value in values.items()}
    return found


def _merit(row: Row, section: str) -> float:
    if section == SECTIONS[0]:
        return round(row["accuracy"], 9)
    return -1.0 if row["minus_spatial"] is None else round(row["minus_spatial"][0], 9)


def rank_rows(report: Row) -> list[tuple[str, list[str]]]:
    """Section and cells of each line: method, kind, one cell per budget, own rule, mean rank; the best first."""
    cells = {(row["method"], row["budget"]): row for row in report["rows"] if row["asked"]}
    missing = {(entry["method"], entry["budget"]) for entry in report["missing"]}
    placed, lines = ranks(report), []
    for name in dict.fromkeys([name for name, _ in [*cells, *missing]]):
        mine = [cells[name, budget] for budget in (*report["budgets"], None) if (name, budget) in cells]
        kind = mine[0]["kind"] if mine else ""
        section = section_of(mine[0]) if mine else SECTIONS[0]
        places = [placed[name, budget] for budget in report["budgets"] if (name, budget) in placed]
        mean = sum(places) / len(places) if places else None
        texts = [_cell(cells.get((name, budget)), placed.get((name, budget))) for budget in report["budgets"]]
        own = cells.get((name, None))
        shown = [
            name,
            SHORT.get(kind, kind),
            *texts,
            "" if own is None else _cell(own, None),
            "" if mean is None else f"{mean:.1f}",
        ]
        lines.append((SECTIONS.index(section), float("inf") if mean is None else mean, name, shown))
    return [(SECTIONS[section], shown) for section, _, _, shown in sorted(lines)]


def budget_text(budget: int | float | None) -> str:
    """A count, a share in %, or the method's own rule."""
    return "own rule" if budget is None else f"{100 * budget:g}%" if isinstance(budget, float) else str(budget)


def part_rows(report: Row, part: str) -> list[list[str]]:
    """Accuracies of a part of the test set with intervals, a line for each method, the best at the smallest budget first."""
    found: dict[str, dict[Any, Sequence[float]]] = {}
    for row in report["rows"]:
        if row["asked"]:
            found.setdefault(row["method"], {})[row["budget"]] = row["parts"][part]
    columns = (*report["budgets"], None)

    def text(value: Sequence[float] | None) -> str:
        return "" if value is None else "{:.1f} [{:.1f}, {:.1f}]".format(*(100 * each for each in value))

    ordered = sorted(found.items(), key=lambda item: -next((item[1][b][0] for b in columns if b in item[1]), 0.0))
    return [[name, *(text(values.get(budget)) for budget in columns)] for name, values in ordered]


def _cell(row: Row | None, rank: int | None) -> str:
    if row is None:
        return "-"
    mean = "" if row["mean_tokens"] == row["budget"] else f" @{row['mean_tokens']:.0f}"
    return f"{100 * row['accuracy']:.1f}{mean}" + ("" if rank is None else f" ({rank})")


def heads(report: Row) -> list[str]:
    return ["method", "kind", *map(budget_text, report["budgets"]), "own rule", "mean rank"]


def about(report: Row) -> str:
    """One line: the test set, and all tokens."""
    whole = report["all"]
    reading = "" if whole["reading"] is None else f", reading {100 * whole['reading']:.1f}"
    data = report.get("data")
    about = f"unseen scenes (seed {report['seed']})" if data is None else f"pictures and videos of {data['name']}"
    return (
        f"{report['questions']} questions about {report['scenes']} {about}; "
        f"all {report['total']} tokens: {percent(whole)} % right{reading}"
    )


def rank_table(report: Row) -> Table:
    """One line per method, one column per budget."""
    table = Table()
    for head in heads(report):
        table.add_column(head, justify="left" if head in ("method", "kind") else "right", no_wrap=head == "method")
    before = ""
    for section, cells in rank_rows(report):
        if before and section != before:
            table.add_section()
        before = section
        table.add_row(*map(escape, cells))
    return table


def reasons(report: Row) -> list[str]:
    """Why cells are empty; budgets of a method whose reasons differ in their number only stand together, with the first."""
    found: dict[tuple[str, str], tuple[str, list[str]]] = {}
    for entry in report["missing"]:
        method, budget = entry["method"], budget_text(entry["budget"])
        reason = entry["reason"].removeprefix(f"{method}: ")
        alike = re.sub(rf"\b{budget}\b", "", reason)
        found.setdefault((method, alike), (reason, []))[1].append(budget)
    return [f"{method} at {', '.join(budgets)}: {reason}" for (method, _), (reason, budgets) in found.items()]


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Lines of a table; the first ``left`` columns are text."""
    rule = ["---"] * left + ["---:"] * (len(columns) - left)
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (columns, rule, *rows)]


def markdown(report: Row) -> str:
    """The report for people: ranks, every row with its differences, and what is missing."""
    data = report.get("data")
    title = "Methods on the pocket test set" if data is None else f"Methods on {data['name']}"
    lines = [f"# {title}", "", about(report) + ".", "", "```bash", report["command"], "```", ""]
    whose = "the pocket model" if data is None else report["model"]
    lines += [f"foveate {report['foveate']}, weights of {whose} {report['weights']}.", ""]
    if data is not None:
        lines += [f"Right are {data['right']}, by the score {data['score']!r}. {data['digest']} is the digest of the data.", ""]
    lines += [*markdown_table(heads(report), [cells for _, cells in rank_rows(report)], 2), "", RANKED, ""]
    for part, (mean, low, high) in report["all"].get("parts", {}).items():
        lines += [f"## {part.capitalize()} alone", "", f"All tokens: {100 * mean:.1f} [{100 * low:.1f}, {100 * high:.1f}] %.", ""]
        columns = ("method", *map(budget_text, report["budgets"]), "own rule")
        lines += [*markdown_table(columns, part_rows(report, part)), ""]
    if report["missing"]:
        lines += ["Empty cells:", "", *(f"- {reason}" for reason in reasons(report)), ""]
    lines += [
        "## Every row",
        "",
        "Differences are paired, in points [95 %], to baselines before the projector at the same mean over",
    ]
    resampled = "scenes" if data is None else "pictures"
    lines += [
        f"decoder layers (random: the mean of seeds 0, 1 and 2). Intervals resample {resampled}, one comparison at a time.",
        "",
    ]
    columns = (
        "method",
        "budget",
        "enter the decoder",
        "mean over layers",
        "right, %",
        "minus all",
        "minus random",
        "minus spatial",
    )
    rows = [
        [row["method"], budget_text(row["budget"]), f"{row['tokens']:.0f}", f"{row['mean_tokens']:.0f}", percent(row)]
        + [points(row[part]) for part in ("minus_all", "minus_random", "minus_spatial", "minus_resize")]
        + ["" if row["reading"] is None else f"{100 * row['reading']:.1f}"]
        for row in sorted(report["rows"], key=lambda row: (row["mean_tokens"], row["method"]))
        if row["asked"]
    ]
    lines += [*markdown_table((*columns, "minus resize", "reading, %"), rows), ""]
    if report["notes"]:
        lines += ["Notes of the methods:", "", *(f"- {note}" for note in report["notes"]), ""]
    return "\n".join(lines)


def csv_text(report: Row) -> str:
    """The long table, one line per row of the report."""
    parts = ("minus_all", "minus_random", "minus_spatial", "minus_resize")
    plain = ("method", "kind", "budget", "asked", "tokens", "mean_tokens", "accuracy", "low", "high", "reading")
    columns = [*plain, *(f"{part}{end}" for part in parts for end in ("", "_low", "_high")), *report["all"]["families"], "seconds"]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in report["rows"]:
        differences = [value for part in parts for value in (row[part] or ("", "", ""))]
        first = ["own" if part == "budget" and row[part] is None else row[part] for part in plain]
        writer.writerow([*first, *differences, *(row["families"].get(f, "") for f in report["all"]["families"]), row["seconds"]])
    return text.getvalue()


# -- tables of a paper


def cells(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Heads and lines in the layout of the paper: Table 4 in blocks by task, the others with a column for each."""
    tasks: dict[str, str] = report["tasks"]
    if report["table"] == 4:
        rows = []
        for task, group in tasks.items():
            rows.append([f"Task: {task} / {group}", "", "", "", ""])
            for line in report["lines"]:
                if task in line["paper"]:
                    ours = _ours(line["ours"][task], True)
                    rows.append([line["label"], line["told"][task], f"{line['paper'][task]:g}", line["shown"], ours])
        return ["approach", "tokens in the paper", "paper", "tokens here", "ours, % [95 %]"], rows
    heads = ["method", "tokens in the paper", "ours", "tokens here", *(f"{task} / {group}" for task, group in tasks.items())]
    return heads, [
        [line["label"], next(iter(line["told"].values())), line["setting"].split(",")[0], line["shown"]]
        + [f"{line['paper'][task]:g} / {_ours(line['ours'][task], False)}" for task in tasks]
        for line in report["lines"]
    ]


def _ours(value: Any, interval: bool) -> str:
    if value is None:
        return "-"
    mean, low, high = (100 * each for each in value)
    return f"{mean:.1f} [{low:.1f}, {high:.1f}]" if interval else f"{mean:.1f}"


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
