"""``foveate law``: the law of QueCC, fitted to its table or to your own, and what it says of model size and visual tokens."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from .common import err, out, parts_of, sayer, wide
from .document import JsonFile, ready_json, tell

if TYPE_CHECKING:
    from ..analysis.law import Study

EPILOG = "Examples:  foveate law  |  foveate law --text 0 --budget 50,200 --sizes 1,3,7,13  |  foveate law --data mine.json"
BUDGETS = "50,100,200,400,1000"
NUMBERS = {"a": "a", "alpha": "alpha", "beta": "beta", "floor": "D"}


def law_command(
    data: Annotated[
        Path | None, typer.Option(help="JSON of your own scores, as docs/law.md shows, instead of the paper's.")
    ] = None,
    text: Annotated[float, typer.Option(help="Q, tokens of a prompt beside the visual ones that no cache holds.")] = 50,
    budget: Annotated[str, typer.Option(help="The most that N (Q + V) may be, N in billions; several by commas.")] = BUDGETS,
    sizes: Annotated[
        str | None, typer.Option(help="Models there are, in billions of weights. Default: those of the table.")
    ] = None,
    tasks: Annotated[str | None, typer.Option(help="Scores of the file to use: reasoning or ocr. Default: the first.")] = None,
    json_file: JsonFile = None,
) -> None:
    """How many visual tokens, and how large a model, for a given cost: error = a N^-alpha V^-beta + D."""
    from ..analysis.law import LARGEST, PUBLISHED, read_points, study
    from ..errors import InputError, shown

    if not 0 <= text <= LARGEST:
        raise InputError(f"--text {text:g}: expected a number of tokens, 0 or more, and at most {LARGEST:g}")
    ready_json(json_file, reads=[data])
    budgets = _numbers(budget, "budget", BUDGETS)
    known = read_points(data or PUBLISHED)
    name = next(iter(known)) if tasks is None else tasks
    if name not in known:
        raise InputError(f"--tasks {shown(name)}: there are scores of {', '.join(known)}")
    points = known[name]
    having = sorted(set(points.sizes.tolist())) if sizes is None else sorted(_numbers(sizes, "sizes", "0.5,1.8,4,7"))
    with err.status("fitting the law"):
        document = {"tasks": name, "data": str(data or PUBLISHED.name), **described(study(points), text, budgets, having)}
    tell(document, json_file, lambda: show(document))


def _numbers(given: str, option: str, example: str) -> list[float]:
    """Positive numbers that are separated by commas.

    Raises
    ------
    InputError : one is no such number, or far from any that there is.
    """
    from ..analysis.law import LARGEST, SMALLEST
    from ..errors import InputError

    found = []
    for part in parts_of(given, option, example):
        try:
            found.append(float(part))
        except ValueError:
            found.append(math.nan)
        if not SMALLEST <= found[-1] <= LARGEST:
            what = f"no positive number from {SMALLEST:g} to {LARGEST:g}"
            raise InputError(f"--{option} {given!r}: {part!r} is {what}. Give numbers such as {example}.")
    return found


def described(found: Study, text: float, budgets: list[float], sizes: list[float]) -> dict[str, Any]:
    """All that the command tells, JSON-able; null stands for an optimum that is not below all tokens."""
    law, points = found.law, found.points
    most = int(points.tokens.max())
    fitted = {shown: {"value": getattr(law, name), "interval": list(found.interval(name))} for name, shown in NUMBERS.items()}
    low, high = (_finite(value) for value in found.optimum_interval(text))
    rows = zip(points.pairs, points.scores.tolist(), law.error(points.sizes, points.tokens).tolist(), strict=True)
    return {
        "fit": fitted,
        "rmse": found.rmse,
        "draws": len(found.draws),
        "left_out": {f"{size:g}": error for size, error in found.left_out().items()},
        "text": text,
        "most": most,
        "optimum": {"value": _finite(law.optimum(text)), "interval": [low, high]},
        "budgets": [_at_budget(found, text, each, sizes, most) for each in budgets],
        "points": [{"size": size, "tokens": tokens, "score": score, "law": 1 - error} for (size, tokens), score, error in rows],
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _at_budget(found: Study, text: float, budget: float, sizes: list[float], most: int) -> dict[str, Any]:
    """The best size and number of tokens at a cost: by the law with models of any size, with those there are, and as measured."""
    law, points = found.law, found.points
    free = min(law.optimum(text), most)
    each = [{"size": size, "tokens": tokens, "law": 1 - error} for size, tokens, error in law.affordable(sizes, text, budget, most)]
    number = points.best(text, budget)
    measured = None
    if number is not None:
        size, tokens = points.pairs[number]
        measured = {"size": size, "tokens": tokens, "score": float(points.scores[number])}
    return {
        "budget": budget,
        "any_size": {"size": budget / (text + free), "tokens": free},
        "sizes": each,
        "best": max(each, key=lambda row: row["law"], default=None),
        "measured": measured,
    }


# -- tables


def show(document: dict[str, Any]) -> None:
    """Print it."""
    say, console = sayer(out), wide(out)
    say(
        f"{document['tasks']} of {document['data']}: error = a N^-alpha V^-beta + D, {len(document['points'])} points", style="bold"
    )
    table = Table()
    for head in ("", "fit", f"95 % of {document['draws']} draws"):
        table.add_column(head, justify="left" if not head else "right")
    for name, row in document["fit"].items():
        table.add_row(name, f"{row['value']:.4f}", " to ".join(f"{value:.4f}" for value in row["interval"]))
    best = document["optimum"]
    table.add_row(
        f"V* at Q = {document['text']:g}", _tokens(best["value"]), " to ".join(_tokens(value) for value in best["interval"])
    )
    console.print(table)
    if best["value"] is None:
        say("no optimum below all tokens: here tokens help at least as much as size (beta >= alpha)")
    left = ", ".join(f"{size}B {100 * error:.1f} %" for size, error in document["left_out"].items()) or "too few sizes"
    say(f"rms residual {document['rmse']:.4f}; largest relative error on a size that was left out of the fit: {left}")
    console.print(_budget_table(document))
    console.print(_point_table(document))
    say(
        "N in billions of weights, V visual tokens, Q text tokens, cost N (Q + V): 2 N (Q + V) GFLOPs of prefill, without "
        "those of the encoder. It tells of this mix of tasks (docs/law.md).",
        style="dim",
    )


def _tokens(value: float | None) -> str:
    return "all" if value is None else f"{value:.1f}"


def _budget_table(document: dict[str, Any]) -> Table:
    table = Table(title="the best size and number of tokens", title_justify="left")
    for head in ("cost", "any size: N, V", "these sizes: N, V", "score by law", "measured: N, V", "score"):
        table.add_column(head, justify="right")
    for row in document["budgets"]:
        free, best, measured = row["any_size"], row["best"], row["measured"]
        by_law = ("none", "") if best is None else (_pair(best), f"{best['law']:.4f}")
        seen = ("none", "") if measured is None else (_pair(measured), f"{measured['score']:.4f}")
        table.add_row(f"{row['budget']:g}", f"{free['size']:.3g}B, {free['tokens']:.1f}", *by_law, *seen)
    return table


def _pair(row: dict[str, float]) -> str:
    return f"{row['size']:g}B, {row['tokens']:g}"


def _point_table(document: dict[str, Any]) -> Table:
    table = Table(title="score, measured / by law", title_justify="left")
    points = {(row["size"], row["tokens"]): row for row in document["points"]}
    counts = sorted({tokens for _, tokens in points})
    for head in ("N", *(f"V = {tokens:g}" for tokens in counts)):
        table.add_column(escape(head), justify="right")
    for size in sorted({size for size, _ in points}):
        rows = [points.get((size, tokens)) for tokens in counts]
        table.add_row(f"{size:g}B", *("" if row is None else f"{row['score']:.3f} / {row['law']:.3f}" for row in rows))
    return table
