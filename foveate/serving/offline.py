"""An offline batch on one machine: rows in batches through an engine; and what its answers depend on."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import InputError, first_line
from ..evaluation.ledger import digest
from ..evaluation.loading import POCKET
from ..pocket import ADAPTERS, WEIGHTS
from .engines import Engine, document
from .rows import Line, Row, Source, Wanted

CHUNK, CHUNKS = 4096, 256  # bytes of a file that its fingerprint reads at a time, and how often at most
FILES = (".json", ".jinja", ".safetensors", ".bin", ".model", ".txt")


def batches(
    source: Source, lines: Iterable[Line], wanted: Wanted, size: int
) -> Iterator[tuple[list[Row], list[tuple[Line, InputError]]]]:
    """Rows that can be answered together, ``size`` at most, and lines that hold none."""
    waiting: dict[tuple[Any, ...], list[Row]] = {}
    for line in lines:
        try:
            row = source.read(line, wanted)
        except InputError as error:
            yield [], [(line, error)]
            continue
        group = waiting.setdefault(row.batch, [])
        group.append(row)
        if len(group) == size:
            yield waiting.pop(row.batch), []
    for group in waiting.values():
        yield group, []


def answered(source: Source, lines: Iterable[Line], wanted: Wanted, engine: Engine, size: int) -> Iterator[list[dict[str, Any]]]:
    """Rows of the output, batch by batch.

    Raises
    ------
    EngineError : the engine has stopped.
    """
    for rows, broken in batches(source, lines, wanted, size):
        found = [document(line.id, error) for line, error in broken]
        yield found + [document(row.id, outcome) for row, outcome in zip(rows, engine.answer(rows) if rows else [], strict=True)]


def settings(model: str, wanted: Wanted, engine: str) -> dict[str, Any]:
    """What the answers of a run depend on, but for the rows.

    Raises
    ------
    InputError : there is no such model.
    """
    from .. import __version__

    answers_by = "transformers" if engine == "transformers" else "vllm"
    return {"foveate": __version__, "engine": answers_by, "model": model, "weights": fingerprint(model), **asdict(wanted)}


def fingerprint(model: str) -> str:
    """Which files a model has, without loading it: of a folder, pieces spread over each file; of the Hub, the commit.

    Raises
    ------
    InputError : there is no such model.
    """
    from transformers import AutoConfig

    folder = WEIGHTS if model == POCKET else Path(model)
    if model.startswith(f"{POCKET}+"):
        folder = ADAPTERS / model.removeprefix(f"{POCKET}+")
    if not folder.is_dir():
        try:
            return digest(model, str(AutoConfig.from_pretrained(model)._commit_hash))
        except Exception as error:  # whatever a missing repository or network leads to
            raise InputError(f"the model {model!r} cannot be found: {first_line(error)}") from error
    parts: list[str | bytes] = []
    for file in sorted(path for path in folder.iterdir() if path.is_file() and path.suffix in FILES):
        size = file.stat().st_size
        with file.open("rb") as opened:
            for place in range(0, size, max(CHUNK, size // CHUNKS)):
                opened.seek(place)
                parts.append(opened.read(CHUNK))
        parts.append(f"{file.name} {size}")
    adapter = folder / "adapter_config.json"
    base = json.loads(adapter.read_text(encoding="utf-8")).get("base_model_name_or_path") if adapter.is_file() else None
    return digest(*parts, fingerprint(base) if base else "")
