"""The output of an offline batch: each row once, and an interrupted run goes on from there."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from typing_extensions import Self

from ...errors import FoveateError, InputError, shown
from ...images import check_regular
from ...jsonl import parsed


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
        self._beside, self._settings = settings_of(self.path), json.dumps(settings, indent=1) + "\n"
        self._new = [each for each in (self.path, self._beside) if not os.path.lexists(each)]
        try:
            for each in (self.path, self._beside):
                check_regular(each, "place for answers")
            if self.path.exists() and self.path.stat().st_size and not self._beside.exists():
                raise InputError(f"{self.path} exists and is no output of a batch. Give another file.")
            with contextlib.ExitStack() as stack:
                beside = stack.enter_context(self._beside.open("a+", encoding="utf-8"))
                _hold(beside, self.path)
                stack.callback(self._leave_nothing)
                self._file = self._taken(stack)
                whole = self._read()
                if self.answered or self.failed:
                    self._check(settings)
                else:
                    beside.truncate(0)
                    beside.write(self._settings)
                    beside.flush()
                self._file.truncate(whole)
                if retry_failed and self.failed:
                    self.drop(set(self.failed), stack)
                self._open = stack.pop_all()
        except OSError as error:
            raise InputError(f"{self.path} cannot be written: {error.strerror}. Give another file.") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            with self._open:
                if kind is None:
                    self._check_there()
        except OSError as failed:  # what was not written before cannot be written now
            if kind is None:
                raise self._unwritten(failed) from failed

    def _taken(self, stack: contextlib.ExitStack) -> BinaryIO:
        """The file, open for more rows; it is held itself, since it may have other names, and its settings may be removed."""
        file = stack.enter_context(self.path.open("ab"))
        _hold(file, self.path)
        return file

    def _leave_nothing(self) -> None:
        """Take away what this run has made, if it has added no row."""
        if not self.answered and not self.failed:
            for each in self._new:
                with contextlib.suppress(OSError):
                    each.unlink()

    def _check_there(self) -> None:
        """Notice that the output is gone; its settings are written again.

        Raises
        ------
        OutputError : there is no such file any more, or another one.
        """
        if not self._beside.exists():
            self._beside.write_text(self._settings, encoding="utf-8")
        try:
            same = os.path.samestat(self.path.stat(), os.fstat(self._file.fileno()))
        except FileNotFoundError:
            same = False
        if not same:
            raise OutputError(
                f"{self.path} was removed or replaced while answers were written to it, and they are lost. "
                "The same command asks for them again."
            )

    def _unwritten(self, error: OSError) -> OutputError:
        return OutputError(f"{self.path} cannot be written: {error.strerror}. Make room; the same command goes on from there.")

    def add(self, documents: Iterable[Mapping[str, Any]]) -> None:
        """Add rows, but for those that are there; they are in the file when this returns.

        Raises
        ------
        OutputError : it cannot be written, or is gone.
        """
        lines = []
        for document in documents:
            if document["id"] not in self.answered and document["id"] not in self.failed:
                (self.failed if "error" in document else self.answered)[document["id"]] = document["row"]
                lines.append(json.dumps(document) + "\n")
        try:
            self._file.write("".join(lines).encode())
            self._file.flush()
            self._check_there()
        except OSError as error:
            raise self._unwritten(error) from error

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
                    document = parsed(line)
                    (self.failed if "error" in document else self.answered)[document["id"]] = str(document.get("row"))
                except (ValueError, TypeError, KeyError) as error:
                    raise InputError(f"line {number} of {self.path} is no row of a batch. Give another file.") from error
                whole += len(line)
        return whole

    def _check(self, settings: Mapping[str, Any]) -> None:
        try:
            had = dict(parsed(self._beside.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise InputError(f"{self._beside} does not say which settings {self.path} has. Give another file.") from error
        now = json.loads(json.dumps(settings))
        differ = [name for name in sorted({*had, *now}) if had.get(name) != now.get(name)]
        other = [f"{name} {shown(had.get(name))}, now {shown(now.get(name))}" for name in differ]
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

    def drop(self, numbers: Collection[str | int], stack: contextlib.ExitStack | None = None) -> None:
        """Take rows out, so that they are answered again; the file keeps its names, mode and owner. ``stack`` closes it.

        Raises
        ------
        OutputError : the file cannot be written anew; it stays as it is.
        """
        place, made = self.path.resolve(), None  # of a link, the file it leads to
        left = "It is as it was"
        try:
            about = place.stat()
            with place.open("rb") as file, tempfile.NamedTemporaryFile(dir=place.parent, prefix=".foveate-", delete=False) as kept:
                made = Path(kept.name)
                kept.writelines(line for line in file if json.loads(line)["id"] not in numbers)
            shutil.copymode(place, made)
            with contextlib.suppress(PermissionError, AttributeError):  # the owner is another one; Windows
                os.chown(made, about.st_uid, about.st_gid)
            if about.st_nlink == 1:
                made.replace(place)
            else:  # its other names are to lead to the same rows
                written, made, left = made, None, f"Its rows are in {made}"
                with written.open("rb") as file, place.open("r+b") as old:
                    shutil.copyfileobj(file, old)
                    old.truncate()
                written.unlink()
            self._file.close()
            self._file = self._taken(stack or self._open)
        except OSError as error:
            if made is not None:
                made.unlink(missing_ok=True)
            raise OutputError(f"{self.path} cannot be written anew: {error.strerror}. {left}.") from error
        for number in numbers:
            self.answered.pop(number, None)
            self.failed.pop(number, None)


def settings_of(answers: Path) -> Path:
    """Where the settings of an output are.

    Raises
    ------
    InputError : it is a folder.
    """
    if not answers.name or answers.is_dir():
        raise InputError(f"{str(answers)!r} is a folder. Give a file for the answers.")
    return answers.with_name(answers.name + ".settings.json")


def check_apart(questions: Path, answers: Path) -> None:
    """Refuse places of which one would overwrite another.

    Raises
    ------
    InputError : two of questions, answers and settings are one file, by whatever names.
    """
    places = {"questions": questions, "answers": answers, "the settings of the answers": settings_of(answers)}
    for (one, first), (other, second) in itertools.combinations(places.items(), 2):
        if _same(first, second):
            raise InputError(f"{one} and {other} are the same file ({first} and {second}). Give another file for the answers.")


def _same(one: Path, other: Path) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError:  # one of them is not there yet
        return os.path.realpath(one) == os.path.realpath(other)


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
