"""Requests per second and time to the first token: vLLM with pictures, against foveate serve in front of vLLM with embeddings.

    python -m benchmarks.serving --vllm-python vllm/bin/python --torchvision vllm/torchvision --json benchmarks/results/serving.json

The model is a LLaVA, or with --family qwen a Qwen2.5-VL, with random bfloat16 weights: a tower of 5 million parameters that makes
576 visual tokens, and a decoder of 155 million. Every request has a picture of its own, 32 tokens of text, and an answer of so
many tokens as --answer says, streamed; ``vllm bench serve`` sends them. A way of serving is METHOD[:BUDGET]@CORES[xTHREADS]:
"direct" is vLLM with pictures, everything else a method of the gateway ("full" keeps all tokens); CORES are those that the worker
of vLLM computes on, THREADS those of the gateway's encoder, 1 if it is not said. Where the worker has one core, everything else
(the API of vLLM, its scheduler, the gateway with its encoder) is put on the other cores; where it has several, the system places
everything else. All servers are up all the time, and one at a time gets requests.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.common import save
from benchmarks.serving_load import Client, Load
from benchmarks.serving_model import CELLS, FAMILIES, TEXT, body, content, published, write_model
from benchmarks.serving_servers import SHIM, Environment, Server, gateway, stopped_at_the_end
from foveate.errors import InputError
from foveate.measuring.ledger import cores as allowed_cores
from foveate.measuring.ledger import load_average
from foveate.measuring.noise import median_interval, quartiles
from foveate.serving.export import described, export
from foveate.serving.handover import HANDOVERS

WAYS = {
    "llava": "direct@0,direct@0-1,full@0,prumerge+:144@0,prumerge+:40@0",
    "qwen": "direct@0,direct@0-1,full@0,divprune:144@0,divprune:40@0",
}
HITS = ("queries", "hits")
TIMES = ("ttft_median_s", "ttft_p90_s", "token_s")
PARTS = ("worker", "scheduler", "API", "gateway")
START = 600.0  # seconds that servers have
REPEATED = 4  # pictures that are asked about again and again, where that is measured


@dataclass(frozen=True)
class Way:
    """A way of serving."""

    name: str

    @property
    def method(self) -> str | None:
        """None without a gateway."""
        method = self.name.partition("@")[0].partition(":")[0]
        return None if method == "direct" else method

    @property
    def budget(self) -> int | None:
        budget = self.name.partition("@")[0].partition(":")[2]
        return int(budget) if budget else None

    @property
    def cores(self) -> str:
        return self.name.partition("@")[2].partition("x")[0]

    @property
    def threads(self) -> int:
        """Of the gateway's encoder."""
        return int(self.name.partition("@")[2].partition("x")[2] or 1)

    @property
    def server(self) -> str:
        more = f"x{self.threads}" if self.threads > 1 else ""
        return f"direct@{self.cores}" if self.method is None else f"gateway@{self.cores}{more}"

    @property
    def engine(self) -> str:
        """One for each gateway, so that none finds in its cache what another one sent."""
        return self.server.replace("gateway", "text")

    def tokens(self) -> int:
        """Of its prompts."""
        return TEXT + (self.budget or CELLS)


@dataclass(frozen=True)
class Work:
    """What each way of serving is asked for.

    Attributes
    ----------
    client : that sends requests.
    family : of the model.
    loads : requests of a round by how many are under way at once.
    answer : tokens of an answer.
    repeated : requests at once about pictures that come again; 0 for none.
    rounds, seconds : of the measurement; no round is begun that would end later, but for the first.
    """

    client: Client
    family: str
    loads: dict[int, int]
    answer: int
    repeated: int
    rounds: int
    seconds: float

    def send(self, url: str, way: Way, number: int, first: int, concurrency: int, *, different: int | None = None) -> Load:
        """Requests about pictures from the one numbered ``first`` on; about ``different`` ones at most."""
        contents = [content(first + i % (different or number), self.family) for i in range(number)]
        return self.client.load(url, contents, concurrency, self.answer, body(way.method, way.budget))


Rounds = dict[str, dict[str, list[dict[str, Any]]]]  # of a way and a load: what was seen in each round


def start(ways: list[Way], family: str, size: str, env: Environment, folder: Path, servers: list[Server]) -> dict[str, Server]:
    """Servers for all ways, by name; those that are only behind others included."""
    own, text = write_model(family, size, folder / "own"), folder / "text"
    for_vllm = published(own, folder / "published") if family == "llava" else own
    export(str(own), text)
    handover = HANDOVERS[described(text).handover]
    found: dict[str, Server] = {}
    for way in ways:
        if way.engine not in found:
            shown, hand = (for_vllm, None) if way.method is None else (text, handover)
            found[way.engine] = env.engine(way.engine, shown, way.cores, folder, hand)
            servers.append(found[way.engine])
        if way.server not in found:
            found[way.server] = gateway(way.server, own, found[way.engine], way.threads, folder)
            servers.append(found[way.server])
        for server in found.values():  # one after the other: each start takes all cores
            server.wait(START)
    everything = os.sched_getaffinity(0)
    for name, server in found.items():
        taken = name.partition("@")[2].partition("x")[0]
        if taken.isdecimal():
            server.place(everything - {int(taken)} or everything)
    return found


def measured(
    found: dict[str, Server], work: Work, way: Way, number: int, first: int, concurrency: int, different: int | None = None
) -> dict[str, Any]:
    """The figures of one load on one way of serving, with the time of cores that its processes took."""
    engine = found[way.engine]
    mine = [engine, *([] if way.method is None else [found[way.server]])]
    before, counted = sum((server.seconds() for server in mine), Counter[str]()), engine.metrics()
    seen = work.send(found[way.server].url, way, number, first, concurrency, different=different)
    seen.computed = sum((server.seconds() for server in mine), Counter[str]()) - before
    asked, hit = (engine.metrics()[f"vllm:prefix_cache_{what}_total"] - counted[f"vllm:prefix_cache_{what}_total"] for what in HITS)
    seen.hits = hit / max(asked, 1)
    return checked(way, work.answer, seen)


def measure(found: dict[str, Server], ways: list[Way], work: Work) -> Rounds:
    """Figures of all ways, in turns."""
    pictures, begin = 0, time.monotonic()
    for way in ways:  # warm-up
        work.send(found[way.server].url, way, 5, pictures, 4)
        pictures += 5
    results: Rounds = {way.name: {} for way in ways}
    for turn in range(work.rounds):
        if turn and (time.monotonic() - begin) * (turn + 1) / turn > work.seconds:
            break
        for concurrency, number in work.loads.items():
            for way in ways if turn % 2 == 0 else reversed(ways):
                figures = measured(found, work, way, number, pictures, concurrency)
                results[way.name].setdefault(str(concurrency), []).append(figures)
            pictures += number
        for way in ways if work.repeated else ():
            work.send(found[way.server].url, way, REPEATED, pictures, 1)
            figures = measured(found, work, way, 2 * work.repeated, pictures, work.repeated, REPEATED)
            results[way.name].setdefault("repeated", []).append(figures)
        pictures += REPEATED
        print(f"round {turn + 1} of {work.rounds} done", file=sys.stderr)
    return results


def checked(way: Way, answer: int, seen: Load) -> dict[str, Any]:
    """The figures of a load whose prompts and answers are of the expected lengths."""
    figures = seen.figures()
    if seen.first:
        assert figures["prompt_tokens"] == [way.tokens()], (way.name, figures["prompt_tokens"])
        assert figures["answer_tokens"] == [answer], (way.name, figures["answer_tokens"])
    return figures


def summarised(results: Rounds, ways: list[Way]) -> list[dict[str, Any]]:
    """A row for each way and load: medians of the rounds, and ratios to vLLM with pictures in the same round."""
    rows = []
    for way in ways:
        for name, turns in results[way.name].items():
            rates = [turn["requests_per_s"] for turn in turns]
            low, middle, high = quartiles(rates)
            errors = [error for turn in turns for error in turn["errors"]]
            row = {"way": way.name, "concurrency": name, "requests_per_s": middle, "q1": low, "q3": high, "errors": errors}
            if any(rates):
                answered = [turn for turn in turns if turn["requests_per_s"]]
                row |= {part: statistics.median(turn[part] for turn in answered) for part in TIMES}
                row["core_s"] = {part: statistics.median(turn["core_s"].get(part, 0.0) for turn in answered) for part in PARTS}
                row["prefix_hits"] = statistics.median(turn["prefix_hits"] for turn in answered)
            for direct in (each.name for each in ways if each.method is None):
                pairs = zip(rates, (turn["requests_per_s"] for turn in results[direct][name]), strict=True)
                ratios = [mine / base for mine, base in pairs if base]
                if ratios and way.name != direct:
                    spread = {"min": min(ratios), "max": max(ratios), "interval": median_interval(ratios)}
                    row[f"of {direct}"] = {"median": statistics.median(ratios)} | spread
            rows.append(row)
    return rows


def shown(rows: list[dict[str, Any]], directs: list[str], answer: int) -> Table:
    """The table that is printed."""
    table = Table(title=f"{TEXT} tokens of text, {answer} of answer")
    ratios = [f"of {name}" for name in directs]
    parts = [f"s of {part}" for part in PARTS]
    for column in ("at once", "way", "requests/s", *ratios, "TTFT", "p90", "per token", *parts, "errors"):
        table.add_column(column, justify="right")
    for row in sorted(rows, key=lambda row: (row["concurrency"] == "repeated", len(row["concurrency"]), row["concurrency"])):
        table.add_row(
            row["concurrency"],
            row["way"],
            f"{row['requests_per_s']:.2f} [{row['q1']:.2f}, {row['q3']:.2f}]",
            *("{median:.2f} [{min:.2f}, {max:.2f}]".format(**row[name]) if name in row else "" for name in ratios),
            *(f"{row[part]:.2f} s" if part in row else "" for part in ("ttft_median_s", "ttft_p90_s")),
            f"{1000 * row['token_s']:.0f} ms" if "token_s" in row else "",
            *(f"{row['core_s'][part]:.2f}" if "core_s" in row else "" for part in PARTS),
            str(len(row["errors"])),
        )
    return table


def told(found: dict[str, Server]) -> dict[str, Any]:
    """What gateways say of their encoders, of all rounds together."""
    keys = [f"foveate_encoder_{what}" for what in ("seconds_sum", "wait_seconds_sum", "batch_sum", "batch_count")]
    return {
        name: {key: value for key, value in server.metrics().items() if key in keys}
        for name, server in found.items()
        if name.startswith("gateway")
    }


def main(
    family: Annotated[str, typer.Option(help=f"Of the model: {' or '.join(FAMILIES)}.")] = FAMILIES[0],
    ways: Annotated[str | None, typer.Option(help="What is compared.")] = None,
    loads: Annotated[str, typer.Option(help="CONCURRENCY:REQUESTS of each round.")] = "1:3,4:6,8:8,16:16",
    repeated: Annotated[int, typer.Option(help="Concurrency at which pictures come again and caches hit; 0: not measured.")] = 8,
    answer: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 16,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    minutes: Annotated[float, typer.Option(help="No round is begun that would end later.")] = 12,
    vllm_python: Annotated[str, typer.Option(help="Python of the environment that vLLM is in.")] = sys.executable,
    torchvision: Annotated[Path | None, typer.Option(help="Folder with torchvision, if that environment has none.")] = None,
    size: Annotated[str, typer.Option(help="full or small (for a test of this script).")] = "full",
    json_file: Annotated[Path | None, typer.Option("--json", help="Where the ledger goes.")] = None,
) -> None:
    """Print rates, ratios and times."""
    if family not in FAMILIES:
        raise InputError(f"--family {family!r}: expected {' or '.join(FAMILIES)}")
    chosen = [Way(name.strip()) for name in (ways or WAYS[family]).split(",")]
    asked = {int(one): int(number) for one, _, number in (each.partition(":") for each in loads.split(","))}
    path = () if torchvision is None else (SHIM, torchvision)
    work = Work(Client(vllm_python, path), family, asked, answer, repeated, rounds, 60 * minutes)
    begin, busy = time.perf_counter(), [load_average()]
    with tempfile.TemporaryDirectory(prefix="foveate-serving-") as folder, stopped_at_the_end() as servers:
        found = start(chosen, family, size, Environment(vllm_python, path), Path(folder), servers)
        ready = time.perf_counter()
        busy.append(load_average())
        results = measure(found, chosen, work)
        counters = told(found)
        placement = {name: server.placement() for name, server in found.items()}
        version = next(server.version() for name, server in found.items() if not name.startswith("gateway"))
    rows = summarised(results, chosen)
    Console(width=230).print(shown(rows, [way.name for way in chosen if way.method is None], answer))
    print(f"load average before, at the first request, at the end: {busy[0]}, {busy[1]}, {load_average()}")
    facts = {
        "vllm": version,
        "cores": allowed_cores(),
        "load_average": [*busy, load_average()],
        "placement": placement,
        "encoders": counters,
    }
    seconds = {"start": ready - begin, "measurement": time.perf_counter() - ready}
    save(
        {
            "benchmark": "serving",
            "family": family,
            "size": size,
            "answer": answer,
            "seconds": seconds,
            **facts,
            "rows": rows,
            "rounds": results,
        },
        json_file,
    )


if __name__ == "__main__":
    typer.run(main)
