"""Servers on the loopback interface that a benchmark starts, places on cores and stops."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foveate.serving.gateway.launch import HOST, free_port
from foveate.serving.handover import Handover

ROOT = Path(__file__).parents[1]
SHIM = ROOT / "tests" / "vllm" / "shim"
LENGTH, SEQUENCES, BATCHED = 1024, 16, 4096  # tokens of a prompt with its answer, requests and tokens that vLLM computes at once
TITLES = {
    "VLLM::Worker": "worker",
    "VLLM::EngineCore": "scheduler",
    "vllm.entrypoints": "API",
    "foveate.cli.main": "gateway",
}
VLLM_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_HOST_IP": HOST,
    "HF_HUB_OFFLINE": "1",
}


class Server:
    """A process, what it starts, and where it listens.

    Parameters
    ----------
    name : for messages and the file of its log.
    command : its command line.
    port : that it listens at.
    environment : variables in addition to those of this process.
    logs : the folder for its log.
    """

    def __init__(self, name: str, command: Sequence[str], port: int, environment: dict[str, str], logs: Path) -> None:
        self.name, self.url, self.log = name, f"http://{HOST}:{port}", logs / f"{name}.log"
        with self.log.open("wb") as written:
            self.process = subprocess.Popen(
                command,
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=written,
                stderr=written,
                start_new_session=True,  # so that all of it can be stopped
            )

    def wait(self, seconds: float) -> None:
        """Until it answers.

        Raises
        ------
        RuntimeError : it ended, or took too long; the message has the end of its log.
        """
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/health", timeout=5):  # noqa: S310
                return
            time.sleep(0.5)
        tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-30:])
        raise RuntimeError(f"{self.name} does not answer. The end of {self.log}:\n{tail}")

    def metrics(self) -> dict[str, float]:
        """Counters of Prometheus that it shows, summed over their labels."""
        found: dict[str, float] = {}
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=10) as answer:  # noqa: S310
            for line in answer.read().decode().splitlines():
                if line and line[0] != "#":
                    name, _, value = line.rpartition(" ")
                    name = name.partition("{")[0]
                    found[name] = found.get(name, 0.0) + float(value)
        return found

    def processes(self) -> list[int]:
        """Of it and all that it started."""
        return [pid for pid in _numbers(Path("/proc")) if _session(pid) == self.process.pid]

    def place(self, cores: set[int]) -> None:
        """Put all but the worker of vLLM, which vLLM places itself, on some cores."""
        for pid in self.processes():
            if not _is_worker(pid):
                for thread in _numbers(Path(f"/proc/{pid}/task")):
                    with contextlib.suppress(ProcessLookupError):
                        os.sched_setaffinity(thread, cores)

    def placement(self) -> list[dict[str, Any]]:
        """The cores that the threads of each process may use, of those threads that have computed."""
        named = [(_title(pid), _working(pid)) for pid in self.processes()]
        return [
            {"process": title, "cores": sorted({core for thread in threads for core in os.sched_getaffinity(thread)})}
            for title, threads in named
            if title
        ]

    def version(self) -> str:
        """Of a vLLM."""
        with urllib.request.urlopen(f"{self.url}/version", timeout=10) as answer:  # noqa: S310
            return str(json.load(answer)["version"])

    def seconds(self) -> Counter[str]:
        """That its processes have computed so far."""
        found = Counter[str]()
        for pid in self.processes():
            found[_title(pid)] += _ticks(Path(f"/proc/{pid}")) / os.sysconf("SC_CLK_TCK")
        return found

    def stop(self) -> None:
        """End all of it."""
        for told, patience in ((signal.SIGINT, 10.0), (signal.SIGKILL, 5.0)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, told)
            end = time.monotonic() + patience
            while time.monotonic() < end and (self.process.poll() is None or self.processes()):
                time.sleep(0.1)


def _numbers(folder: Path) -> list[int]:
    try:
        return [int(each.name) for each in folder.iterdir() if each.name.isdecimal()]
    except OSError:  # it has ended
        return []


def _fields(folder: Path) -> list[str]:
    """Of its line in /proc from the state on; none where it has ended."""
    try:
        return (folder / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _session(pid: int) -> int | None:
    fields = _fields(Path(f"/proc/{pid}"))
    return int(fields[3]) if fields and fields[0] != "Z" else None


def _ticks(folder: Path) -> int:
    fields = _fields(folder)
    return int(fields[11]) + int(fields[12]) if fields else 0


def _working(pid: int, share: float = 0.2) -> list[int]:
    """Threads that have computed at least a share of what the busiest one has."""
    ticks = {thread: _ticks(Path(f"/proc/{pid}/task/{thread}")) for thread in _numbers(Path(f"/proc/{pid}/task"))}
    return [thread for thread, spent in ticks.items() if spent >= share * max(ticks.values())]


def _title(pid: int) -> str:
    """What a process is, "" for helpers of multiprocessing."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:  # it has ended
        return ""
    return next((title for mark, title in TITLES.items() if mark in words), "")


def _is_worker(pid: int) -> bool:
    return _title(pid) == TITLES["VLLM::Worker"]


@dataclass(frozen=True)
class Environment:
    """The one that vLLM is in.

    Attributes
    ----------
    python : of it.
    path : folders that it imports from, too: torchvision and what makes it load, where it has none.
    """

    python: str
    path: tuple[Path, ...]

    def engine(self, name: str, model: Path, cores: str, logs: Path, handover: type[Handover] | None) -> Server:
        """A vLLM whose worker computes on some cores, such as "0" or "0-1"; for pictures, or for what a gateway hands over."""
        port = free_port()
        sizes = ("--max-model-len", LENGTH, "--max-num-seqs", SEQUENCES, "--max-num-batched-tokens", BATCHED)
        command = [
            *(self.python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--served-model-name", "model"),
            *("--host", HOST, "--port", str(port), "--dtype", "bfloat16", "--chat-template-content-format", "openai"),
            "--enforce-eager",  # compiling changes nothing about what is compared, and takes minutes
            *(map(str, sizes)),
            *(handover.arguments if handover else ()),
        ]
        environment = VLLM_ENVIRONMENT | {"VLLM_CPU_OMP_THREADS_BIND": cores, "PYTHONPATH": os.pathsep.join(map(str, self.path))}
        if handover is None or not handover.plugin:
            environment["VLLM_PLUGINS"] = "none"  # vLLM as it is
        return Server(name, command, port, environment, logs)


def gateway(name: str, model: Path, engine: Server, threads: int, logs: Path) -> Server:
    """``foveate serve`` in front of a vLLM."""
    port = free_port()
    command = [
        *(sys.executable, "-c", "from foveate.cli.main import run; run()", "serve", "--model", str(model), "--name", "model"),
        *("--vllm-url", engine.url, "--port", str(port)),
    ]
    return Server(name, command, port, {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}, logs)


@contextlib.contextmanager
def stopped_at_the_end() -> Iterator[list[Server]]:
    """A list of servers, all of which are stopped afterwards, also when this process is told to end."""

    def end(*_: object) -> None:
        raise SystemExit(1)

    before, servers = signal.signal(signal.SIGTERM, end), list[Server]()
    try:
        yield servers
    finally:
        for server in reversed(servers):
            server.stop()
        signal.signal(signal.SIGTERM, before)
