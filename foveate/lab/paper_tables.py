"""Tables 4, 5 and 7 of LLaVA-PruMerge (arXiv 2403.15388) in small: ``foveate compare --table``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..errors import FoveateError, InputError, UnsupportedModelError
from ..methods.base import Method
from ..methods.registry import get
from .claims import MIRRORED, MIRRORS, Claim, Judge, TableLine, claims_of, tally
from .compare import TOTAL
from .runner import Runner, Tell

TITLES = {
    4: "Table 4: token sampling strategies",
    5: "Table 5: adaptive selection (AITS) and token supplement (TS)",
    7: "Table 7: other methods of token reduction",
}
NOTES: dict[int, tuple[str, ...]] = {
    4: (
        "In the paper every task has a mean count of its own (40, 40, 35, 16); here one picture gets all questions, so that all "
        "tasks share one. Patterns are the nearest ones to it: more columns than rows, more rows than columns, and about square.",
        "All of the paper's numbers in this table are training-free.",
    ),
    5: (
        "The paper's row AITS & TS equals the LoRA-fine-tuned row of its Table 6; training-free the same method has SQA 68.0, VQAT "
        "54.0, POPE 76.2 and MME 1250.1 there. Whether the row AITS was fine-tuned is not said. Ours are all training-free.",
        "prumerge:released at its own count has one token more with TS: the sum of all dropped ones. Its fence is that of each "
        "picture alone.",
    ),
    7: (
        "The paper's row PruMerge+ at 25 % equals the LoRA-fine-tuned row of its Table 1, and it never says whether the other rows "
        "were fine-tuned. Its row CrossGET is taken from the CrossGET paper and fine-tuned. Ours are all training-free.",
    ),
}
SPATIAL: dict[str, tuple[dict[str, str], dict[str, float]]] = {
    "spatial, wide": (
        {"VQAT": "5 x 8 = 40", "MME": "5 x 8 = 40", "POPE": "5 x 7 = 35"},
        {"VQAT": 46.85, "MME": 1180.23, "POPE": 69.8},
    ),
    "spatial, tall": (
        {"VQAT": "8 x 5 = 40", "MME": "8 x 5 = 40", "POPE": "7 x 5 = 35"},
        {"VQAT": 47.42, "MME": 1142.32, "POPE": 71.1},
    ),
    "spatial, square": ({"POPE": "6 x 6 = 36", "SQA": "4 x 4 = 16"}, {"POPE": 67.9, "SQA": 66.29}),
}
COUNTS = {"VQAT": "40", "MME": "40", "POPE": "35", "SQA": "16"}
TASKS = {4: ("VQAT", "MME", "POPE", "SQA"), 5: ("SQA", "VQAT", "POPE", "MME"), 7: ("VQAv2", "SQA", "VQAT", "POPE", "MME", "MMB")}
TABLE5: dict[str, tuple[float, ...]] = {
    "all tokens": (66.8, 58.2, 85.9, 1510.7),
    "AITS": (66.5, 54.8, 75.7, 1221.6),
    "AITS & TS": (68.5, 56.0, 76.3, 1350.3),
}
TABLE7: dict[str, tuple[str, str, tuple[float, ...]]] = {  # label: share, registered name, numbers
    "ToMe": ("25 %", "tome", (66.0, 62.7, 56.0, 51.0, 1385.2, 56.9)),
    "ATS": ("25 %", "ats", (66.7, 63.0, 55.1, 57.4, 1313.2, 54.9)),
    "EViT": ("25 %", "evit", (65.5, 64.1, 54.2, 60.1, 1299.3, 56.2)),
    "PruMerge+ 25 %": ("25 %", "prumerge+", (76.8, 68.3, 57.1, 84.0, 1462.4, 64.9)),
    "CrossGET": ("50 %", "crossget", (77.3, 66.7, 54.9, 83.9, 1510.2, 64.7)),
    "PruMerge+ 50 %": ("50 %", "prumerge+", (77.6, 68.5, 57.6, 85.1, 1507.1, 64.9)),
}


class Filler:
    """Fills lines of a table with ours."""

    def __init__(self, runner: Runner, tell: Tell, total: int) -> None:
        self.runner, self.tell, self.total, self.done = runner, tell, total, 0

    def fill(self, line: TableLine, make: Callable[[], Method | None]) -> TableLine:
        """The line with what a method answers; None = all tokens."""
        self.tell(" ".join(filter(None, (line.label, line.setting))), self.done, self.total)
        self.done += 1
        try:
            outcome = self.runner.outcome(make())
            line.right, line.tokens = outcome.right, outcome.mean
        except (InputError, UnsupportedModelError) as error:
            line.reason = str(error)
        return line


def shapes_near(count: float, rows: int = 24, columns: int = 24) -> dict[str, tuple[int, int]]:
    """Patterns of about ``count`` tokens: wide, tall and about square, the first two at most twice as long as high."""
    every = [(r, c) for r in range(1, rows + 1) for c in range(1, columns + 1)]

    def nearest(fits: Callable[[int, int], bool]) -> tuple[int, int]:
        found = [shape for shape in every if fits(*shape)]
        return min(found, key=lambda shape: (abs(shape[0] * shape[1] - count), abs(shape[0] - shape[1])))

    wide = nearest(lambda r, c: 1.2 * r <= c <= 2 * r)
    return {"wide": wide, "tall": (wide[1], wide[0]), "square": nearest(lambda r, c: r == c)}


def table4(runner: Runner, tell: Tell) -> tuple[list[TableLine], list[Claim]]:
    filler = Filler(runner, tell, 5)
    pru = TableLine("PruMerge", COUNTS, {"VQAT": 54.0, "MME": 1250.07, "POPE": 76.2, "SQA": 68.07})
    filler.fill(pru, lambda: get("prumerge"))
    if pru.tokens is None:
        raise FoveateError(f"PruMerge cannot be run at its own count: {pru.reason}")
    mean, lines = pru.tokens, [pru]
    sequential = TableLine("sequential", COUNTS, {"VQAT": 42.72, "MME": 703.6, "POPE": 11.7, "SQA": 64.2})
    lines.append(filler.fill(sequential, lambda: get("sequential", budget=max(1, round(mean)))))
    for kind, shape in shapes_near(mean).items():
        told, paper = SPATIAL[f"spatial, {kind}"]
        line = TableLine(f"spatial, {kind}", told, paper, shape=shape)
        lines.append(filler.fill(line, lambda shape=shape: get("spatial", shape=shape)))  # type: ignore[misc]
    judge = Judge(runner.scores)
    return lines, claims_of(judge, TASKS[4], lambda _: [{"": (pru, line)} for line in lines[1:]])


def table5(runner: Runner, tell: Tell) -> tuple[list[TableLine], list[Claim]]:
    filler, numbers = Filler(runner, tell, 13), {label: dict(zip(TASKS[5], row, strict=True)) for label, row in TABLE5.items()}
    whole = filler.fill(TableLine("all tokens", {"": str(TOTAL)}, numbers["all tokens"]), lambda: None)
    lines = [whole]
    without: dict[str, TableLine] = {}
    both: dict[str, TableLine] = {}
    for name in ("prumerge", "prumerge:paper", "prumerge:released"):
        for budget in (40, None):
            setting = f"{name}, {budget or 'own count'}"
            for label, found in (("AITS", without), ("AITS & TS", both)):

                def make(name: str = name, budget: int | None = budget, merge: bool = label != "AITS") -> Method:
                    return get(name, budget=budget, merge=merge).per_image()

                found[setting] = filler.fill(TableLine(label, {"": "40"}, numbers[label], setting), make)
                lines.append(found[setting])
    pairs = [
        {setting: (both[setting], without[setting]) for setting in both},
        {setting: (whole, line) for setting, line in without.items()},
        {setting: (whole, line) for setting, line in both.items()},
    ]
    return lines, claims_of(Judge(runner.scores), TASKS[5], lambda _: pairs)


def table7(runner: Runner, tell: Tell) -> tuple[list[TableLine], list[Claim]]:
    filler = Filler(runner, tell, 1 + len(TABLE7))
    whole = TableLine("all tokens", {"": "100 %"}, dict(zip(TASKS[7], (78.5, 66.8, 58.2, 85.9, 1510.7, 64.3), strict=True)))
    lines = {"all tokens": filler.fill(whole, lambda: None)}
    for label, (share, name, numbers) in TABLE7.items():
        budget = round(TOTAL * float(share.split()[0]) / 100)
        line = TableLine(label, {"": share}, dict(zip(TASKS[7], numbers, strict=True)))
        lines[label] = filler.fill(line, lambda name=name, budget=budget: get(name, budget=budget))  # type: ignore[misc]
    pairs = [{"": (lines["PruMerge+ 25 %"], lines[other])} for other in ("ToMe", "ATS", "EViT")]
    pairs.append({"": (lines["PruMerge+ 50 %"], lines["CrossGET"])})
    return list(lines.values()), claims_of(Judge(runner.scores), TASKS[7], lambda _: pairs)


BUILD = {4: table4, 5: table5, 7: table7}


def paper_table(number: int, runner: Runner, tell: Tell = lambda *_: None) -> dict[str, Any]:
    """Run a table of the paper in small; a JSON-able report.

    Raises
    ------
    InputError : there is no such preset.
    """
    if number not in BUILD:
        raise InputError(f"there is no preset for table {number}; choose one of {', '.join(map(str, BUILD))}")
    lines, claims = BUILD[number](runner, tell)
    judge, tasks = Judge(runner.scores), TASKS[number]
    return {
        **runner.setting,
        "table": number,
        "title": TITLES[number] + " (arXiv 2403.15388)",
        "questions": len(runner.data.asked),
        "tasks": {task: MIRRORS[task] for task in tasks},
        "lines": [
            {
                "label": line.label,
                "setting": line.setting,
                "told": {task: line.tokens_told(task) for task in tasks if task in line.paper},
                "tokens": line.tokens,
                "shown": line.tokens_shown,
                "paper": line.paper,
                "ours": {task: judge.accuracy(line, task) for task in tasks if task in line.paper},
                "reason": line.reason,
            }
            for line in lines
        ],
        "claims": [claim.to_dict() for claim in claims],
        "tally": tally(claims),
        "notes": [MIRRORED, *NOTES[number]],
    }
