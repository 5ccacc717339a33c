"""The output of an offline batch: each row once, and an interrupted run goes on from there."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Collection, Iterable, Mapping
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
    answered, failed : digests of the rows in it, by id.

    Raises
    ------
    InputError : it cannot be written, another run writes it, it is no output of a batch, or its answers have other settings.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], *, retry_failed: bool = False) -> None:
        self.path, self.answered, self.failed = Path(path), dict[str | int, str](), dict[str | int, str]()
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
                self._open = stack.pop_all()
            if retry_failed and self.failed:
                self.drop(set(self.failed))
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
                (self.failed if "error" in document else self.answered)[document["id"]] = document["row"]
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
                    (self.failed if "error" in document else self.answered)[document["id"]] = str(document.get("row"))
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

    def changed(self, digests: Mapping[str | int, str]) -> set[str | int]:
        """Ids of rows in it that are other ones now, by the ``digests`` of the questions.

        Raises
        ------
        InputError : all of them are other ones: these are answers to another file.
        """
        had = {**self.answered, **self.failed}
        known = had.keys() & digests.keys()
        other = {number for number in known if had[number] != digests[number]}
        if known and len(other) == len(known):
            raise InputError(
                f"the answers in {self.path} are those to other rows: of {len(known)} with the ids of these questions, none is the "
                "same. Give another file, or remove it with its settings."
            )
        return other

    def drop(self, numbers: Collection[str | int]) -> None:
        """Take rows out, so that they are answered again.

        Raises
        ------
        OutputError : the file cannot be written anew; it stays as it is.
        """
        place = self.path.resolve()  # of a link, the file it leads to
        made = place.with_name(f".{place.name}.new")
        try:
            with place.open("rb") as file, made.open("wb") as kept:
                shutil.copymode(place, made)
                kept.writelines(line for line in file if json.loads(line)["id"] not in numbers)
            made.replace(place)
            self._file = self._open.enter_context(self.path.open("ab"))
        except OSError as error:
            made.unlink(missing_ok=True)
            raise OutputError(f"{self.path} cannot be written anew: {error.strerror}. It is as it was.") from error
        for number in numbers:
            self.answered.pop(number, None)
            self.failed.pop(number, None)


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
