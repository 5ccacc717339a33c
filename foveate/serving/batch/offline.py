"""An offline batch on one machine: rows in batches through an engine; and what its answers depend on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

from ...errors import InputError
from ...methods.saved import code_of, named
from ..files import fingerprint
from .base import BatchEngine, Engine, document
from .rows import AnswerSettings, Row, RowPlace, Source


def batches(
    source: Source, lines: Iterable[RowPlace], wanted: AnswerSettings, size: int
) -> Iterator[tuple[list[Row], list[tuple[RowPlace, InputError]]]]:
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


def answered(
    source: Source, lines: Iterable[RowPlace], wanted: AnswerSettings, engine: Engine, size: int
) -> Iterator[list[dict[str, Any]]]:
    """Rows of the output, batch by batch.

    Raises
    ------
    EngineError : the engine has stopped.
    """
    for rows, broken in batches(source, lines, wanted, size):
        found = [document(line.id, source.digest(line), error) for line, error in broken]
        outcomes = engine.answer(rows) if rows else []
        yield found + [document(row.id, row.digest, outcome) for row, outcome in zip(rows, outcomes, strict=True)]


def settings(model: str, wanted: AnswerSettings, engine: BatchEngine) -> dict[str, Any]:
    """What the answers of a run depend on, but for the rows.

    Raises
    ------
    InputError : there is no such model, or there are no weights of its method.
    """
    from ... import __version__

    asked, method = asdict(wanted), named(wanted.method, wanted.budget, wanted.config)
    del asked["config"]
    fields = {f"method.{name}": value for name, value in method.settings().items()}
    fields["method.code"] = code_of(method, foreign=True)
    return {"foveate": __version__, "engine": engine.answers, "model": model, "weights": fingerprint(model), **asked, **fields}
