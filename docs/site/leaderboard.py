"""The leaderboard: committed results as one table. Run with a folder of ``foveate compare --save``, it adds its rows to them."""

from __future__ import annotations

import csv
import json
import sys
from collections import defaultdict
from pathlib import Path

import cards

from foveate.methods.registry import methods

DOCS = Path(__file__).parent.parent
TIMES = DOCS.parent / "benchmarks" / "results" / "selectors.json"
BUDGETS = ("64", "144", "288")
TEXT = """# Leaderboard

{about}

- Answers right in %, at equal counts of tokens. Sorted by the mean of the three columns.
- *Reading* is the share of signs that are read at 144 tokens, in %.
- *ms* is the time to choose a quarter of 576 tokens for one picture on one thread ([how](choosing.md#measured-time-to-choose)).
- Inside the decoder, the budget is what the last layer runs. The number after @ is what all layers run on average.

These are drawn scenes and a small model. They rank methods under equal conditions. What a method does to your model, they do not
say: [`foveate tune`](tune.md) does.

## Before the decoder, and inside the vision encoder

{outside}

## Inside the decoder

{inside}

## The second pocket model

No [CLS], pictures of many sizes, and clips. [The whole table](results/pocket-qwen.md), with intervals.

{second}

## Add a row

Your method in a file of its own, or one that is in the package:

```bash
foveate new-method mine --folder .        # writes mine.py and test_mine.py
foveate compare --import mine.py --methods mine --budgets {budgets} --save mine
python docs/site/leaderboard.py mine     # into docs/results/comparison.csv
make docs
```

The defaults of `foveate compare` are the test set of this page: the same scenes and questions for everybody. The run can be
interrupted; the same command goes on. A change request with the new lines, the method and its test is welcome
([working on foveate](contributing.md)).
"""


def leaderboard() -> str:
    """The page as Markdown."""
    rows = by_method()
    inside = {name: found for name, found in rows.items() if found[BUDGETS[0]]["kind"] == "inside the decoder"}
    outside = {name: found for name, found in rows.items() if name not in inside}
    return TEXT.format(
        about=first_paragraph("comparison.md"),
        outside=table(outside, mean=False),
        inside=table(inside, mean=True),
        second=first_table("pocket-qwen.md"),
        budgets=",".join(BUDGETS),
    )


def by_method() -> dict[str, dict[str, dict[str, str]]]:
    """Rows of the comparison by method and budget; of methods that have all budgets."""
    found: dict[str, dict[str, dict[str, str]]] = defaultdict(dict)
    with (DOCS / "results" / "comparison.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["asked"] == "True":
                found[row["method"]][row["budget"]] = row
    return {name: rows for name, rows in found.items() if set(BUDGETS) <= set(rows)}


def table(found: dict[str, dict[str, dict[str, str]]], mean: bool) -> str:
    """A table, best first."""
    times = {
        row["method"]: row["time"]["median_ms"]
        for row in json.loads(TIMES.read_text(encoding="utf-8"))["rows"]
        if row.get("tokens") == 576 and row.get("batch") == 1 and "time" in row
    }
    ordered = sorted(found.items(), key=lambda item: -sum(float(item[1][budget]["accuracy"]) for budget in BUDGETS))
    lines = [f"| | method | {' | '.join(BUDGETS)} | own rule | reading | ms |", "|---:|---|" + "---:|" * (len(BUDGETS) + 3)]
    for place, (name, rows) in enumerate(ordered, 1):
        cells = [cell(rows[budget], mean) for budget in BUDGETS]
        own = cell(rows["own"], True) if "own" in rows else ""
        time = f"{times[name]:.1f}" if name in times else ""
        reading = f"{100 * float(rows['144']['reading']):.0f}"
        lines.append(f"| {place} | {linked(name)} | {' | '.join(cells)} | {own} | {reading} | {time} |")
    return "\n".join(lines)


def cell(row: dict[str, str], mean: bool) -> str:
    """Answers right in %, and the mean count of tokens where it is not the budget."""
    count = f" @ {float(row['mean_tokens']):.0f}" if mean else ""
    return f"{100 * float(row['accuracy']):.1f}{count}"


def linked(name: str) -> str:
    """A method, or a preset of one, with a link to its card; a method that is not in the package has none."""
    base = name.partition(":")[0]
    places = [cards.place_of(info) for info in methods() if info.name == base]
    return f"[`{name}`](papers/{places[0]}.md#{cards.anchor(base)})" if places else f"`{name}`"


def first_paragraph(name: str, folder: Path = DOCS / "results") -> str:
    """What a page of results says of itself below its title."""
    return (folder / name).read_text(encoding="utf-8").split("\n\n")[1].strip()


def add_rows(folder: Path, results: Path = DOCS / "results") -> list[str]:
    """Add the methods of a folder of ``foveate compare --save`` that the committed results do not have, and name them.

    Raises
    ------
    ValueError : the folder is of another test set.
    """
    ours, theirs = (first_paragraph("comparison.md", place).partition(";")[0] for place in (results, folder))
    if ours != theirs:
        raise ValueError(f"{folder} is of {theirs}; the leaderboard is of {ours}. Leave out --scenes, --each and --seed.")
    file = results / "comparison.csv"
    with file.open(encoding="utf-8", newline="") as old, (folder / "comparison.csv").open(encoding="utf-8", newline="") as new:
        before = csv.DictReader(old)
        columns, known = list(before.fieldnames or ()), {row["method"] for row in before}
        rows = [row for row in csv.DictReader(new) if row["asked"] == "True" and row["method"] not in known]
    with file.open("a", encoding="utf-8", newline="") as out:
        csv.DictWriter(out, columns, restval="", extrasaction="ignore", lineterminator="\n").writerows(rows)
    return sorted({row["method"] for row in rows})


def first_table(name: str) -> str:
    """The first table of a page of results."""
    blocks = (DOCS / "results" / name).read_text(encoding="utf-8").split("\n\n")
    return next(block for block in blocks if block.startswith("|")).strip()


if __name__ == "__main__":
    print("added:", ", ".join(add_rows(Path(sys.argv[1]))) or "nothing new")
