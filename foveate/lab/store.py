"""Results that were computed once: a JSON file, written whole after each, that never mixes settings.

A result belongs to the test set, the version of foveate, the weights, the settings of a method and the files that define it. Who
changes the engine, or what methods share, begins a new store.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..methods.base import Method

FORMAT = 1


class Store:
    """Results of one setting in a file that may hold others.

    Parameters
    ----------
    path : of the file; None keeps results in memory only.
    setting : what all results depend on: the test set, the version of foveate, the weights.

    Raises
    ------
    InputError : the file is no such store, or cannot be written.
    """

    def __init__(self, path: Path | None, setting: dict[str, Any]) -> None:
        self.path, self.setting = path, json.dumps(setting, sort_keys=True)
        self._found: dict[str, Any] = self._read().get(self.setting, {})
        self._write()

    def __len__(self) -> int:
        return len(self._found)

    def get(self, key: str) -> dict[str, Any] | None:
        """A result, or None."""
        return self._found.get(key)

    def put(self, key: str, result: dict[str, Any]) -> None:
        """Add a result and write the file."""
        self._found[key] = result
        self._write()

    def _read(self) -> dict[str, dict[str, Any]]:
        """All results of the file, by setting."""
        if self.path is None or not self.path.exists():
            return {}
        try:
            document = json.loads(self.path.read_text())
            if document["format"] != FORMAT or not all(isinstance(found, dict) for found in document["runs"].values()):
                raise ValueError("unknown format")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{self.path} is no store of 'foveate compare' ({type(error).__name__}). Give the name of a new file, or delete it."
            ) from error
        runs: dict[str, dict[str, Any]] = document["runs"]
        return runs

    def _write(self) -> None:
        """Replace the file at once, with what another process has added meanwhile."""
        if self.path is None:
            return
        runs = self._read()
        runs[self.setting] = self._found = {**runs.get(self.setting, {}), **self._found}
        part = self.path.with_name(f"{self.path.name}.{os.getpid()}.part")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(json.dumps({"format": FORMAT, "runs": runs}))
            part.replace(self.path)
        except OSError as error:
            raise InputError(f"{self.path} cannot be written: {error.strerror}. Give another file with --store.") from error


def weights_of(folder: Path) -> str:
    """A fingerprint of a model's configuration and weights."""
    digest = hashlib.sha256()
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("*config.json")]):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def key_of(method: Method | None) -> str:
    """What a result of a method depends on: its settings, and the files that define it. None = all tokens."""
    if method is None:
        return "all tokens"
    classes = {cls for part in (method, method.before_decoder(), *method.inside_decoder()) for cls in type(part).__mro__}
    mine = [cls for cls in classes if issubclass(cls, Method) and cls.__module__ not in (Method.__module__, "__main__")]
    digest = hashlib.sha256()
    for file in sorted({inspect.getfile(cls) for cls in mine}):
        digest.update(Path(file).read_bytes())
    return json.dumps({**method.settings(), "code": digest.hexdigest()[:16]}, sort_keys=True)
