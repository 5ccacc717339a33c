"""Where numbers come from: versions, machine, command."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

PACKAGE = Path(__file__).parents[1]
BUSY = 0.25  # load average per core that a measurement should not begin with


def versions() -> dict[str, str | None]:
    """Of Python, the libraries and foveate; its git commit where it runs from a checkout."""
    from .. import __version__

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "foveate": __version__,
        "commit": commit(),
    }


def commit(package: Path = PACKAGE) -> str | None:
    """The commit of the checkout that a package lies in, with "-dirty" where files differ from it; None without one."""
    git = shutil.which("git")
    if git is None or not (package.parent / ".git").exists():
        return None
    command = [git, "-C", str(package.parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude", "*"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    return done.stdout.strip() or None


def processor_name(device: torch.device) -> str:
    """Of the GPU, or of the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def load_average() -> list[float] | None:
    """Of the last 1, 5 and 15 minutes; None where the system has none."""
    return [round(load, 2) for load in os.getloadavg()] if hasattr(os, "getloadavg") else None


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine(device: torch.device) -> dict[str, Any]:
    """What the numbers were measured on."""
    return {
        "system": platform.platform(),
        "device": str(device),
        "processor": processor_name(device),
        "host": processor_name(torch.device("cpu")),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
    }


def command(program: str = "foveate") -> str:
    """The command line of this process."""
    return shlex.join([program, *sys.argv[1:]])


def busy(load: list[float] | None) -> str | None:
    """A note where others use the machine, by the load average before the measurement."""
    if load is None or load[0] <= BUSY * cores():
        return None
    return (
        f"the machine was busy before the measurement: load average {load[0]} on {cores()} cores. Intervals are wider than need be."
    )
