"""What a report of a fault needs to say of the machine and of what is installed."""

from __future__ import annotations

import os
import re
from importlib.metadata import PackageNotFoundError, distribution, version
from typing import Any

import torch
from packaging.requirements import Requirement

from ..precision import has_bfloat16
from .ledger import machine, versions

LISTED = ("numpy", "pillow", "safetensors", "typer", "rich", "vllm", "flash-attn", "torchvision")  # beside what extras bring
TOLD = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE", "VLLM_PLUGINS", "FOVEATE_IMPORT")  # variables without secrets


def environment() -> dict[str, Any]:
    """Versions, devices, precision, extras, and the variables that change what foveate does. Nothing of it is secret.

    Returns
    -------
    A dict that can be written as JSON. ``extras`` has, for each extra, what of it is missing here: nothing is an empty list.
    """
    extras = _extras()
    names = sorted({*LISTED, *(requirement.name for needs in extras.values() for requirement in needs)})
    return {
        "versions": versions(),
        "machine": machine(torch.device("cpu")),
        "devices": _devices(),
        "bfloat16": {"cpu": has_bfloat16(), **({"cuda": has_bfloat16("cuda")} if torch.cuda.is_available() else {})},
        "extras": {name: _missing(needs) for name, needs in extras.items()},
        "packages": {name: found for name in names if (found := _version(name)) and name not in ("torch", "transformers")},
        "variables": {name: os.environ[name] for name in TOLD if name in os.environ},
    }


def _devices() -> list[str]:
    """Accelerators that torch sees."""
    found = [f"cuda:{number} {torch.cuda.get_device_name(number)}" for number in range(torch.cuda.device_count())]
    return found + (["mps"] if torch.backends.mps.is_available() else [])


def _extras() -> dict[str, list[Requirement]]:
    """What each extra of foveate needs; {} where foveate runs from a source tree that is not installed."""
    try:
        about = distribution("foveate")
    except PackageNotFoundError:
        return {}
    names: list[str] = sorted(about.metadata.get_all("Provides-Extra") or [])
    needs = [Requirement(text) for text in about.requires or []]
    return {name: [need for need in needs if need.marker and _of_extra(str(need.marker), name)] for name in names}


def _of_extra(marker: str, name: str) -> bool:
    return re.search(rf"extra == ['\"]{re.escape(name)}['\"]", marker) is not None


def _missing(needs: list[Requirement]) -> list[str]:
    """Packages that are not there, or of another version than is needed."""
    found = ((need, _version(need.name)) for need in needs if need.name != "foveate")
    return [need.name for need, have in found if have is None or not need.specifier.contains(have, prereleases=True)]


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
