"""The output of an offline batch: each row once, and an interrupted run goes on from there."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from typing_extensions import Self

from ...errors import FoveateError, InputError


class OutputError(FoveateError):
    """The output cannot be written: a full disk, or a file system that is gone."""


class Output:
    """A file of JSON lines that rows are added to, and the settings of its answers beside it.

    Parameters
    ----------
    path : new, or of an earlier run.
    settings : what answers depend on, but for their rows.
    retry_failed : take rows that failed out, so that they are answered again.

    Attributes
    ----------
    answered, failed : ids of the rows in it.

    Raises
    ------
    InputError : it cannot be written, another run writes it, it is no output of a batch, or its answers have other settings.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], *, retry_failed: bool = False) -> None:
        self.path, self.answered, self.failed = Path(path), set[str | int](), set[str | int]()
        self._beside = self.path.with_name(self.path.name + ".settings.json")
        try:
            if self.path.exists() and self.path.stat().st_size and not self._beside.exists():
                raise InputError(f"{self.path} exists and is no output of a batch. Give another file.")
            with contextlib.ExitStack() as stack:
                beside = stack.enter_context(self._beside.open("a+", encoding="utf-8"))
                _hold(beside, self.path)
                whole = self._read()
                if self.answered or self.failed:
                    self._check(settings)
                else:
                    beside.truncate(0)
                    beside.write(json.dumps(settings, indent=1) + "\n")
                    beside.flush()
                self._file: BinaryIO = stack.enter_context(self.path.open("ab"))
                self._file.truncate(whole)
                if retry_failed and self.failed:
                    self._drop_failed()
                    self._file = stack.enter_context(self.path.open("ab"))
                self._open = stack.pop_all()
        except OSError as error:
            raise InputError(f"{self.path} cannot be written: {error.strerror}. Give another file.") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def add(self, documents: Iterable[Mapping[str, Any]]) -> None:
        """Add rows, but for those that are there; they are in the file when this returns.

        Raises
        ------
        OutputError : it cannot be written.
        """
        lines = []
        for document in documents:
            if document["id"] not in self.answered and document["id"] not in self.failed:
                (self.failed if "error" in document else self.answered).add(document["id"])
                lines.append(json.dumps(document) + "\n")
        try:
            self._file.write("".join(lines).encode())
            self._file.flush()
        except OSError as error:
            raise OutputError(
                f"{self.path} cannot be written: {error.strerror}. Make room; the same command goes on from there."
            ) from error

    def _read(self) -> int:
        """Take note of the rows; returns the bytes up to where a killed run left a line unfinished."""
        whole = 0
        if not self.path.exists():
            return whole
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    break
                try:
                    document = json.loads(line)
                    (self.failed if "error" in document else self.answered).add(document["id"])
                except (ValueError, TypeError, KeyError) as error:
                    raise InputError(f"line {number} of {self.path} is no row of a batch. Give another file.") from error
                whole += len(line)
        return whole

    def _check(self, settings: Mapping[str, Any]) -> None:
        try:
            had = dict(json.loads(self._beside.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise InputError(f"{self._beside} does not say which settings {self.path} has. Give another file.") from error
        now = json.loads(json.dumps(settings))
        other = [
            f"{name} {had.get(name)!r}, now {now.get(name)!r}" for name in sorted({*had, *now}) if had.get(name) != now.get(name)
        ]
        if other:
            raise InputError(
                f"the answers in {self.path} have other settings: {'; '.join(other)}. Use the same ones, or give another file."
            )

    def _drop_failed(self) -> None:
        made = self.path.with_name(f".{self.path.name}.new")
        with self.path.open("rb") as file, made.open("wb") as kept:
            kept.writelines(line for line in file if "error" not in json.loads(line))
        made.replace(self.path)
        self.failed = set()


def _hold(lock: Any, path: Path) -> None:
    """Keep other runs from writing, as long as a file is open; where the system cannot, nothing happens.

    Raises
    ------
    InputError : another run writes.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise InputError(f"another run writes to {path}. Wait for it, or give another file.") from error
    except OSError:  # file systems without locks
        return
