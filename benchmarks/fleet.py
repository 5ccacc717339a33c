"""How many encoders and engines a service needs, by simulation: ``python -m benchmarks.fleet --rate 1000``.

A cell is a few engines and a few encoders. Requests that come at random go to an encoder, then to the engine of the cell that has
the fewest requests. An engine works in steps, as vLLM does: each step writes a token of every answer that runs, and reads prompts
until the step is full. Where requests are spread over many cells at random, they reach each cell at random, too. So one cell is
simulated, and a fleet is as many of them as its rate needs.

What a step takes is fitted to a measured load run, at the fewest and at the most requests at once. What is predicted for the
numbers between them is compared with what was measured there.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from scipy.optimize import minimize

from benchmarks.fleet_cell import Cell, Times
from foveate.errors import FoveateError, InputError
from foveate.lab.tables import markdown_table
from foveate.measuring import ledger
from foveate.places import ready_file, write_text

LEDGER = Path(__file__).parent / "results" / "serving-short-answers.json"
TEXT = 32  # tokens of a prompt beside the picture, in the load run
WAYS = {"full@0": 576, "prumerge+:144@0": 144, "prumerge+:40@0": 40}  # of the load run: visual tokens that stay
RUNS = 5  # of a closed load
ENGINES = 4  # of a cell
ENCODERS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)  # of a cell, that are tried


# -- service times out of a measured load


@dataclass(frozen=True)
class Load:
    """One row of a load run: visual tokens, requests at once, requests in all, tokens of an answer, and what was measured."""

    visual: int
    at_once: int
    number: int
    answer: int
    rate: float
    first: float

    def simulated(self, times: Times) -> tuple[float, float]:
        """Requests per second and the median first token, as they are in the middle of some runs."""
        runs = [Cell(times, 1, 1, TEXT + self.visual, self.answer, seed).closed(self.at_once, self.number) for seed in range(RUNS)]
        rate, first = np.median(runs, 0).tolist()
        return rate, first


def loads_of(path: Path) -> tuple[list[Load], float]:
    """The rows of a ledger of ``benchmarks.serving`` whose engine has a core of its own, and the seconds of a picture's encoding.

    Raises
    ------
    InputError : it is no such ledger.
    """
    try:
        told = json.loads(path.read_text())
        asked = dict(pair.split(":") for pair in re.search(r"--loads (\S+)", told["command"])[1].split(","))  # type: ignore[index]
        rows = [row for row in told["rows"] if row["way"] in WAYS and row["concurrency"] in asked]
        seen = told["encoders"]["gateway@0"]
        encode = seen["foveate_encoder_seconds_sum"] / seen["foveate_encoder_batch_sum"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is no ledger of benchmarks.serving with --loads: {error!r}") from error
    loads = [
        Load(
            WAYS[row["way"]],
            int(row["concurrency"]),
            int(asked[row["concurrency"]]),
            told.get("answer", 16),
            row["requests_per_s"],
            row["ttft_median_s"],
        )
        for row in rows
    ]
    return loads, encode


def fitted(loads: Sequence[Load], encode: float) -> Times:
    """The times with which the simulation is nearest to measured loads, by the squares of the logarithms of what is off."""

    def times(logs: Sequence[float]) -> Times:
        other, step, prompt, written = np.exp(np.clip(logs, -12, 5)).tolist()
        return Times(encode, other, step, prompt, written)

    def off(logs: Sequence[float]) -> float:
        found = times(logs)
        wrong = 0.0
        for load in loads:
            rate, first = load.simulated(found)
            wrong += math.log(rate / load.rate) ** 2 + math.log(first / load.first) ** 2
        return wrong

    best = minimize(off, np.log([0.01, 0.02, 0.0015, 0.01]), method="Nelder-Mead", options={"maxiter": 400, "fatol": 1e-5})
    return times(best.x)


# -- how large a fleet


@dataclass(frozen=True)
class CellSize:
    """A cell that answers in time: encoders, engines, requests per second, and seconds to the first token, of half and of 95 %."""

    encoders: int
    engines: int
    rate: float
    half: float
    most: float

    def fleet(self, rate: float) -> tuple[int, int]:
        """Engines and encoders for a rate."""
        cells = math.ceil(rate / self.rate)
        return cells * self.engines, cells * self.encoders


def sized(times: Times, tokens: int, answer: int, target: float) -> CellSize | None:
    """The cell of which 95 % of the first tokens come within ``target`` seconds; None = not even an idle one does that.

    What four engines can do is found first, with as many encoders as they can use. Then encoders are counted: the fewest with which
    19 of 20 of these requests are still served in time.
    """

    def seen(encoders: int, each: float) -> tuple[float, float]:
        return Cell(times, encoders, ENGINES, tokens, answer).open(each)

    low, high = 1e-3, 1.0
    if seen(ENCODERS[-1], low)[1] > target:
        return None
    while seen(ENCODERS[-1], high)[1] <= target:
        low, high = high, 2 * high
    for _ in range(10):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if seen(ENCODERS[-1], middle)[1] <= target else (low, middle)
    each = 0.95 * low
    for encoders in ENCODERS:
        if each * times.encode < encoders:  # they can keep up at all
            half, late = seen(encoders, each)
            if late <= target:
                return CellSize(encoders, ENGINES, each, half, late)
    return None


def main(
    rate: Annotated[list[float] | None, typer.Option(help="Requests a second; may be given again.")] = None,
    tokens: Annotated[str, typer.Option(help="Visual tokens that stay, separated by commas.")] = "576,144,40",
    answer: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 16,
    target: Annotated[float, typer.Option(min=0.001, help="Seconds within which 95 % of the first tokens are to come.")] = 5.0,
    measured: Annotated[Path, typer.Option("--ledger", help="Load run of benchmarks.serving with service times.")] = LEDGER,
    given: Annotated[Path | None, typer.Option("--times", help="JSON with service times of your own, instead of a ledger.")] = None,
    out: Annotated[Path | None, typer.Option("--json", help="Where to write the ledger.")] = None,
) -> None:
    """Encoders and engines for a rate of requests."""
    console, rates, counts = Console(highlight=False), rate or [10.0, 1000.0, 10_000.0], _counts(tokens)
    for each in rates:
        if not 0 < each < math.inf:
            raise InputError(f"--rate {each:g}: expected requests a second, above 0")
    if out is not None:
        ready_file(out)
    about: dict[str, Any] = {
        "benchmark": "fleet",
        "command": ledger.command("python -m benchmarks.fleet"),
        "versions": ledger.versions(),
    }
    if given is not None:
        times = _read(given)
    else:
        loads, encode = loads_of(measured)
        ends = {min(load.at_once for load in loads), max(load.at_once for load in loads)}
        times = fitted([load for load in loads if load.at_once in ends], encode)
        about |= {"ledger": measured.name, "check": _checked(console, loads, ends, times)}
    about["times"] = asdict(times)
    console.print("seconds:", ", ".join(f"{name} {value:.4g}" for name, value in asdict(times).items()))
    rows, cells = [], []
    for visual in counts:
        cell = sized(times, TEXT + visual, answer, target)
        rows.append({"visual": visual, "cell": None if cell is None else asdict(cell)})
        cells += [_cells(visual, wanted, cell) for wanted in rates]
    heads = ("visual tokens", "requests/s", "engines", "encoders", "requests/s of an engine", "first token, median / p95")
    _print(console, heads, cells)
    if out is not None:
        write_text(out, json.dumps({**about, "answer": answer, "target": target, "rows": rows}, indent=1) + "\n")


def _counts(text: str) -> list[int]:
    """Numbers of visual tokens, as ``--tokens`` has them."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise InputError(f"--tokens {text!r}: expected whole numbers, such as 576,144")
    return [int(part) for part in parts]


def _read(path: Path) -> Times:
    try:
        return Times(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        expected = ", ".join(each.name for each in fields(Times))
        raise InputError(f"{path} has no service times: {error}; expected a JSON object with {expected}") from error


def _checked(console: Console, loads: Sequence[Load], ends: set[int], times: Times) -> list[dict[str, Any]]:
    """Show what is predicted beside what was measured."""
    rows, cells = [], []
    for load in loads:
        rate, first = load.simulated(times)
        rows.append({**asdict(load), "fitted": load.at_once in ends, "simulated": {"rate": rate, "first": first}})
        off = f"{rate:.2f} ({rate / load.rate - 1:+.0%})", f"{first:.2f} ({first / load.first - 1:+.0%})"
        how = "fitted" if load.at_once in ends else "predicted"
        cells.append([str(load.visual), str(load.at_once), f"{load.rate:.2f}", off[0], f"{load.first:.2f}", off[1], how])
    heads = ("visual tokens", "at once", "requests/s", "simulated", "first token, s", "simulated", "")
    _print(console, heads, cells)
    return rows


def _cells(visual: int, rate: float, cell: CellSize | None) -> list[str]:
    if cell is None:
        return [str(visual), f"{rate:g}", "the target cannot be met", "", "", ""]
    engines, encoders = cell.fleet(rate)
    each = f"{cell.rate / cell.engines:.2f}"
    return [str(visual), f"{rate:g}", str(engines), str(encoders), each, f"{cell.half:.2f} / {cell.most:.2f} s"]


def _print(console: Console, heads: Sequence[str], cells: Sequence[Sequence[str]]) -> None:
    console.print("\n".join(markdown_table(heads, cells, 0)), soft_wrap=True)


if __name__ == "__main__":
    try:
        typer.run(main)
    except FoveateError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
