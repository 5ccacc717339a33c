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
from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from random import Random
from typing import Annotated, Any

import numpy as np
import simpy
import typer
from rich.console import Console
from scipy.optimize import minimize

from foveate.errors import InputError
from foveate.lab.tables import markdown_table
from foveate.measuring import ledger
from foveate.places import write_text

LEDGER = Path(__file__).parent / "results" / "serving-short-answers.json"
TEXT = 32  # tokens of a prompt beside the picture, in the load run
WAYS = {"full@0": 576, "prumerge+:144@0": 144, "prumerge+:40@0": 40}  # of the load run: visual tokens that stay
RUNS = 5  # of a closed load
SIMULATED, LEFT_OUT = 3000, 300  # requests of an open load, and the first of them, which find an empty service
ENGINES = 4  # of a cell
ENCODERS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)  # of a cell, that are tried
Process = Generator[simpy.Event, Any, None]


@dataclass(frozen=True)
class Times:
    """Service times, in seconds, and limits of an engine.

    Attributes
    ----------
    encode : of a picture. An encoder takes all that wait as one batch, which takes as long as its pictures one by one.
    other : of a request on its way, on average: client, gateway, and what else keeps neither encoder nor engine busy. Requests
        that are sent together come one after the other, so it is drawn for each (exponential).
    step : of a step of the engine with nothing in it.
    prompt : what each token of a prompt adds to a step.
    written : what each answer that runs adds to a step.
    batched : tokens of a step, at most.
    running : requests of an engine that run at a time, at most.
    pictures : of a batch of an encoder, at most.
    """

    encode: float
    other: float
    step: float
    prompt: float
    written: float
    batched: int = 4096
    running: int = 16
    pictures: int = 16

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
                raise InputError(f"{each.name} is {value!r}; expected a number of 0 or more")
        if min(self.batched, self.running, self.pictures) < 1 or self.step + self.prompt <= 0:
            raise InputError(
                "an engine needs steps that take time, and there must be room for one token, one request and one picture"
            )


@dataclass(eq=False)
class Request:
    """One request: tokens that are to be read and written, and what tells of its first and its last one."""

    unread: int
    unwritten: int
    first: simpy.Event
    done: simpy.Event


@dataclass
class Engine:
    """Continuous batching with prompts in pieces."""

    env: simpy.Environment
    times: Times
    waiting: deque[Request] = field(default_factory=deque)
    running: list[Request] = field(default_factory=list)
    came: simpy.Event | None = None

    def add(self, request: Request) -> None:
        self.waiting.append(request)
        if self.came is not None and not self.came.triggered:
            self.came.succeed()

    def work(self) -> Process:
        """Steps without end."""
        while True:
            if not self.waiting and not self.running:
                self.came = self.env.event()
                yield self.came
            while self.waiting and len(self.running) < self.times.running:
                self.running.append(self.waiting.popleft())
            writing = [request for request in self.running if not request.unread]
            room, read = self.times.batched - len(writing), 0
            whole = []
            for request in self.running:
                if piece := min(request.unread, room - read):
                    request.unread -= piece
                    read += piece
                    if not request.unread:  # its last piece gives the first token
                        whole.append(request)
            yield self.env.timeout(self.times.step + self.times.prompt * read + self.times.written * len(writing))
            for request in (*writing, *whole):
                request.unwritten -= 1
                if not request.first.triggered:
                    request.first.succeed()
                if request.unwritten <= 0:
                    request.done.succeed()
            self.running = [request for request in self.running if request.unwritten > 0]


class Cell:
    """Some encoders and engines.

    Parameters
    ----------
    times : of all of them.
    encoders, engines : how many.
    tokens : of a prompt.
    answer : tokens of an answer.
    seed : of what is random.
    """

    def __init__(self, times: Times, encoders: int, engines: int, tokens: int, answer: int, seed: int = 0) -> None:
        self.random = Random(seed)
        self.env, self.times, self.tokens, self.answer = simpy.Environment(), times, tokens, answer
        self.pictures = simpy.Store(self.env)
        for _ in range(encoders):
            self.env.process(self.encode())
        self.engines = [Engine(self.env, times) for _ in range(engines)]
        for engine in self.engines:
            self.env.process(engine.work())
        self.firsts: list[float] = []
        self.ends: list[float] = []

    def encode(self) -> Process:
        """Batches of pictures without end; those of a batch are done together."""
        while True:
            batch = [(yield self.pictures.get())]
            while self.pictures.items and len(batch) < self.times.pictures:
                batch.append((yield self.pictures.get()))
            yield self.env.timeout(self.times.encode * len(batch))
            for picture in batch:
                picture.succeed()

    def serve(self) -> Process:
        """One request, from its picture to the end of its answer."""
        came = self.env.now
        yield self.env.timeout(self.random.expovariate(1 / self.times.other) if self.times.other else 0)
        encoded = self.env.event()
        self.pictures.put(encoded)
        yield encoded
        request = Request(self.tokens, self.answer, self.env.event(), self.env.event())
        min(self.engines, key=lambda engine: len(engine.waiting) + len(engine.running)).add(request)
        yield request.first
        self.firsts.append(self.env.now - came)
        yield request.done
        self.ends.append(self.env.now)

    def closed(self, at_once: int, number: int) -> tuple[float, float]:
        """Requests per second, and the median seconds to the first token, where ``at_once`` clients ask one after the other."""
        left = [number]

        def client() -> Process:
            while left[0]:
                left[0] -= 1
                yield self.env.process(self.serve())

        clients = [self.env.process(client()) for _ in range(at_once)]
        self.env.run(simpy.AllOf(self.env, clients))
        return number / max(self.ends), float(np.median(self.firsts))

    def open(self, rate: float) -> tuple[float, float]:
        """Seconds to the first token, of half and of 95 % of the requests, where ``rate`` of them come each second at random."""

        def arrivals() -> Process:
            for _ in range(SIMULATED):
                yield self.env.timeout(self.random.expovariate(rate))
                self.env.process(self.serve())

        self.env.process(arrivals())
        patience = 20 * SIMULATED / rate  # where so many are late, the rest does not matter
        while len(self.firsts) < SIMULATED and self.env.peek() < patience:
            self.env.step()
        seen = self.firsts[LEFT_OUT:] + [math.inf] * (SIMULATED - len(self.firsts))
        half, most = np.quantile(seen, (0.5, 0.95), method="inverted_cdf")
        return float(half), float(most)


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
    console, rates = Console(highlight=False), rate or [10.0, 1000.0, 10_000.0]
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
    for visual in map(int, tokens.split(",")):
        cell = sized(times, TEXT + visual, answer, target)
        rows.append({"visual": visual, "cell": None if cell is None else asdict(cell)})
        cells += [_cells(visual, wanted, cell) for wanted in rates]
    heads = ("visual tokens", "requests/s", "engines", "encoders", "requests/s of an engine", "first token, median / p95")
    _print(console, heads, cells)
    if out is not None:
        write_text(out, json.dumps({**about, "answer": answer, "target": target, "rows": rows}, indent=1) + "\n")


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
    typer.run(main)
