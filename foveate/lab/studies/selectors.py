"""Selectors side by side at equal counts: ``python -m foveate.lab.studies.selectors``. What docs/fovea.md is made with.

Every selector answers the same questions, so that differences are paired.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ...errors import InputError
from ...methods.base import Method
from ...methods.registry import get
from ...places import write_text
from ..progress import bar
from ..runner import Runner
from ..tables import markdown_table, points

ROWS = "divprune; scope; scope alpha=0.3; vispruner; fovea; fovea weights=pocket"


def method_of(text: str, budget: int | None = None) -> Method:
    """A method from its name and fields: ``scope alpha=0.3``; ``budget`` goes before that of the fields.

    Raises
    ------
    InputError : there is no such method or field.
    """
    name, *pairs = text.split()
    fields: dict[str, Any] = {}
    for pair in pairs:
        field, mark, value = pair.partition("=")
        if not mark:
            raise InputError(f"{pair!r} in {text!r} is no field; expected field=value, such as alpha=0.3")
        try:
            fields[field] = json.loads(value)
        except ValueError:
            fields[field] = value
    return get(name, **{**fields, **({} if budget is None else {"budget": budget})}).per_image()


def table(runner: Runner, rows: tuple[str, ...], budgets: tuple[int, ...]) -> dict[str, Any]:
    """Accuracies, each [mean, low, high], that of all tokens, and by "a - b" the paired differences of all pairs, by budget."""
    jobs = [(row, budget) for budget in budgets for row in rows]
    right = {(row, budget): runner.outcome(method_of(row, budget)).right for row, budget in bar(jobs, "selectors")}
    pairs = [(a, b) for number, a in enumerate(rows) for b in rows[:number]]
    return {
        "all tokens": runner.scores.interval(runner.outcome(None).right),
        "accuracy": {row: {budget: runner.scores.interval(right[row, budget]) for budget in budgets} for row in rows},
        "families": {row: {budget: runner.scores.per_family(right[row, budget]) for budget in budgets} for row in rows},
        "differences": {
            f"{a} - {b}": {budget: runner.scores.difference(right[a, budget], right[b, budget]) for budget in budgets}
            for a, b in pairs
        },
    }


def shown(found: dict[str, Any], budgets: tuple[int, ...]) -> list[str]:
    """The tables in Markdown."""
    heads = [str(budget) for budget in budgets]
    accuracy = [
        [f"`{row}`", *("{:.1f} [{:.1f}, {:.1f}]".format(*(100 * value for value in values[budget])) for budget in budgets)]
        for row, values in found["accuracy"].items()
    ]
    differences = [[pair, *(points(values[budget]) for budget in budgets)] for pair, values in found["differences"].items()]
    counting = [
        [f"`{row}`", *(f"{100 * values[budget].get('count', float('nan')):.1f}" for budget in budgets)]
        for row, values in found["families"].items()
    ]
    lines = [*markdown_table(["right, % [95 %]", *heads], accuracy), "", *markdown_table(["points [95 %]", *heads], differences)]
    return [*lines, "", *markdown_table(["counting, %", *heads], counting)]


def main(
    rows: Annotated[str, typer.Option(help="Methods with their fields, separated by semicolons.")] = ROWS,
    budgets: Annotated[str, typer.Option(help="Visual tokens to keep.")] = "16,36,64,144",
    scenes: Annotated[int, typer.Option(help="Scenes to draw.")] = 501,
    each: Annotated[int, typer.Option(help="Questions about each.")] = 6,
    split: Annotated[str, typer.Option(help="test or validation.")] = "test",
    store: Annotated[Path, typer.Option(help="Results so far.")] = Path("foveate-selectors.json"),
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all numbers as JSON.")] = None,
) -> None:
    """Accuracies with intervals, and paired differences."""
    runner = Runner(scenes, each, store=store, split=split)
    names, counts = tuple(part.strip() for part in rows.split(";")), tuple(map(int, budgets.split(",")))
    found = table(runner, names, counts)
    whole = "{:.1f} [{:.1f}, {:.1f}]".format(*(100 * value for value in found["all tokens"]))
    typer.echo(f"{len(runner.data.asked)} questions about {scenes} scenes ({split}); all tokens: {whole} %\n")
    typer.echo("\n".join(shown(found, counts)))
    if json_file is not None:
        write_text(json_file, json.dumps({**runner.setting, **found}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
