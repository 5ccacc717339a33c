"""The one resumable store: results that were computed once, by their keys. An interrupted run goes on from there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..fingerprint import digest
from ..jsonl import append, held, parsed, whole_lines
from ..methods.base import Method
from ..methods.saved import code_of

FORMAT = 2


class Store:
    """Results of one setting, in a file of JSON lines that may hold those of others.

    Each process appends to a file of its own, and reads those of all.

    Parameters
    ----------
    path : of the file; None keeps results in memory only. Process ``n`` writes to ``path`` with the suffix ``.n``, process 0 to
        ``path`` itself.
    setting : everything that all results depend on, such as the test set, the version of foveate, the weights.
    process : number of this process.

    Raises
    ------
    InputError : the file is no such store, or cannot be written.
    """

    def __init__(self, path: Path | None, setting: Mapping[str, Any], process: int = 0) -> None:
        self._found: dict[str, Any] = {}
        self.setting = digest(json.dumps(setting, sort_keys=True, default=str))
        self.path = None if path is None else path if process == 0 else path.with_name(f"{path.name}.{process}")
        if path is None or self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            known = [self._read(file) for file in {*path.parent.glob(f"{path.name}.[0-9]*"), path}]
            if not any(known) or not self.path.exists():
                self._append([{"format": FORMAT, "setting": self.setting, "is": json.loads(json.dumps(setting, default=str))}])
            else:
                self.path.open("ab").close()  # whether it can be written is known before anything is computed
        except OSError as error:
            raise InputError(f"{self.path} cannot be written: {error.strerror}. Give another place.") from error

    def __len__(self) -> int:
        return len(self._found)

    def get(self, key: str) -> dict[str, Any] | None:
        """A result, or None."""
        return self._found.get(key)

    def put(self, key: str, result: Mapping[str, Any]) -> None:
        """Add a result; it is in the file when this returns."""
        self.put_all({key: result})

    def put_all(self, results: Mapping[str, Mapping[str, Any]]) -> None:
        """Add several results.

        Raises
        ------
        InputError : they cannot be written. They are in memory all the same.
        """
        self._found.update(results)
        if self.path is None:
            return
        try:
            self._append([{"setting": self.setting, "key": key, "result": result} for key, result in results.items()])
        except OSError as error:
            raise InputError(
                f"{self.path} cannot be written: {error.strerror}. Make room; the same command goes on from there."
            ) from error

    def _read(self, file: Path) -> bool:
        """Take in the results of a file; whether it knows the setting."""
        known = False
        for number, _, line in whole_lines(file):
            try:
                document = parsed(line)
                if number == 1 and document["format"] != FORMAT:
                    raise ValueError("unknown format")
                if document["setting"] != self.setting:
                    continue
                known = True
                if "key" in document:
                    self._found[document["key"]] = document["result"]
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(
                    f"{file} is no store of foveate (line {number}, {type(error).__name__}). Give another file, or delete it."
                ) from error
        if not known and file.exists() and file.stat().st_size and next(whole_lines(file), None) is None:
            raise InputError(f"{file} is no store of foveate. Give another file, or delete it.")
        return known

    def _append(self, documents: list[dict[str, Any]]) -> None:
        if self.path is None:
            return
        with self.path.open("a+b") as file, held(file, wait=True):
            size = file.seek(0, 2)
            if size:
                file.seek(size - 1)
                if file.read(1) != b"\n":  # a killed run left a line unfinished
                    file.truncate(max((end for _, end, _ in whole_lines(self.path)), default=0))
            append(file, documents)


def key_of(method: Method) -> str:
    """What a result of a method depends on: its settings, and the files that define it."""
    return json.dumps({**method.settings(), "code": code_of(method)}, sort_keys=True)
