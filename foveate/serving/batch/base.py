"""What every engine of an offline batch is, and the registry that engines enter by being defined."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from ...errors import FoveateError, InputError, first_line

if TYPE_CHECKING:
    from .rows import AnswerSettings, Row, RowPlace, Source

REGISTRY: dict[str, type[BatchEngine]] = {}


class EngineError(FoveateError):
    """An engine does not start, or has stopped: no row can be answered any more."""


@dataclass(frozen=True)
class Answered:
    """The answer to a row.

    Attributes
    ----------
    text : the answer.
    ended : whether the model ended it; otherwise it was cut off.
    prompt, written : tokens of the shortened prompt, and of the answer with its end.
    before, after : visual tokens per picture.
    """

    text: str
    ended: bool
    prompt: int
    written: int
    before: list[int]
    after: list[int]


class Engine(Protocol):
    """Answers rows."""

    def answer(self, rows: Sequence[Row]) -> list[Answered | Exception]:
        """Answer rows of one ``Row.batch``; of a row that cannot be answered, what was raised.

        Raises
        ------
        EngineError : no row can be answered any more.
        """


def document(number: str | int, row: str, outcome: Answered | Exception) -> dict[str, Any]:
    """A row of the output; ``row`` is the digest of the question and its pictures, by which it is known again."""
    if isinstance(outcome, Exception):
        return {"id": number, "row": row, "error": {"type": type(outcome).__name__, "message": first_line(outcome)}}
    pairs = zip(outcome.after, outcome.before, strict=True)
    pictures = [{"visual_tokens": after, "visual_tokens_before": before} for after, before in pairs]
    usage = {"prompt_tokens": outcome.prompt, "completion_tokens": outcome.written, "pictures": pictures}
    ended = "stop" if outcome.ended else "length"
    return {"id": number, "row": row, "answer": outcome.text, "finish_reason": ended, "usage": usage}


@dataclass(frozen=True)
class Job:
    """Rows to be answered.

    Attributes
    ----------
    source, lines : the file, and the rows of it that have no answer yet.
    wanted : how rows are answered that do not say.
    model : Hub id or folder; "pocket" is the shipped model.
    size : rows answered at once.
    export : folder of the text model, for engines that read one; None = in the cache.
    options : others, of ``BatchEngine.options``, where they were given.
    """

    source: Source
    lines: Sequence[RowPlace]
    wanted: AnswerSettings
    model: str
    size: int
    export: Path | None = None
    options: dict[str, Any] = field(default_factory=dict)


class BatchEngine:
    """A way to answer a batch: ``class Mine(BatchEngine, name="mine", rows=8)`` in a file of this folder registers itself.

    Attributes
    ----------
    rows : how many it answers at once.
    answers : what its answers depend on; engines of the same may go on with each other's output.
    options : of the command line that it reads: export, encoders, engines, address.
    """

    name: ClassVar[str]
    rows: ClassVar[int]
    answers: ClassVar[str]
    options: ClassVar[tuple[str, ...]]

    def __init_subclass__(cls, *, name: str, rows: int, answers: str = "", options: tuple[str, ...] = ()) -> None:
        super().__init_subclass__()
        if name in REGISTRY and REGISTRY[name].__qualname__ != cls.__qualname__:
            raise InputError(f"an engine named {name!r} is already registered ({REGISTRY[name].__module__}); choose another name")
        cls.name, cls.rows, cls.answers, cls.options = name, rows, answers or name, options
        REGISTRY[name] = cls

    def check(self, wanted: AnswerSettings) -> None:
        """Raise ``InputError`` where rows cannot be answered so; nothing is loaded."""
        raise TypeError(f"{type(self).__name__} does not implement check(wanted)")

    def start(self, job: Job) -> Iterator[list[dict[str, Any]]]:
        """Load what is needed, and return the rows of the output, as they come.

        Raises
        ------
        InputError : the model cannot be loaded, or the method does not work on it.
        EngineError : the engine does not start, or stops.
        """
        raise TypeError(f"{type(self).__name__} does not implement start(job)")


@functools.cache
def _load_all() -> None:
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        importlib.import_module(f"{__package__}.{module.name}")


def batch_engines() -> dict[str, type[BatchEngine]]:
    """All engines by name."""
    _load_all()
    return dict(sorted(REGISTRY.items()))


def batch_engine(name: str, given: dict[str, Any]) -> BatchEngine:
    """The engine of a name, which reads all options that were ``given`` (those that are not None).

    Raises
    ------
    InputError : there is none, or an option is for other engines.
    """
    known = batch_engines()
    if name not in known:
        raise InputError(f"there is no engine {name!r}; choose {', '.join(known)}")
    for option, value in given.items():
        if value is not None and option not in known[name].options:
            others = " or ".join(other for other, engine in known.items() if option in engine.options)
            raise InputError(f"--{option} is for --engine {others}, and this is {name}")
    return known[name]()
