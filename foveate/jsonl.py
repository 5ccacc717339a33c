"""JSON, and files of JSON lines that are only appended to. A run that is killed leaves at most one unfinished line, which does
not count.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from .errors import shown


def whole_lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """Number from 1 on, end in bytes, and contents of every finished line of a file; none where there is no file."""
    if not path.exists():
        return
    end = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            end += len(line)
            yield number, end, line


def parsed(text: str | bytes) -> Any:
    """What a text of JSON says.

    Raises
    ------
    ValueError : it is none, nested more deeply than it can be read, says one name twice, or has a number that no float can be.
    """
    try:
        return json.loads(text, object_pairs_hook=each_once, parse_int=_whole)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _whole(digits: str) -> int:
    """A whole number; much larger ones would be errors wherever they are compared or converted."""
    if math.isinf(float(digits)):
        raise ValueError(f"{digits[:20]}... is too large a number")
    return int(digits)


def each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, for ``object_pairs_hook``. Of a name that is there twice one value would win without a word.

    Raises
    ------
    ValueError : a name is there twice.
    """
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the name {shown(name)} is there twice")
        found[name] = value
    return found


def append(file: BinaryIO, documents: Iterable[Mapping[str, Any]]) -> None:
    """Write documents as lines; they are with the operating system when this returns."""
    file.write(b"".join(json.dumps(document).encode() + b"\n" for document in documents))
    file.flush()


@contextlib.contextmanager
def held(file: Any, *, wait: bool) -> Iterator[None]:
    """Within this no other process holds the file; where the system has no locks, nothing happens.

    Raises
    ------
    BlockingIOError : another process holds it, and ``wait`` is False.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:  # file systems without locks
        yield
        return
    try:
        yield
    finally:
        with contextlib.suppress(OSError, ValueError):  # the file may be closed
            fcntl.flock(file, fcntl.LOCK_UN)
