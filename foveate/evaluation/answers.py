"""NEW."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from ..errors import InputError
from ..fingerprint import digest


@dataclass(frozen=True)
class CostedAnswer:
    """One answer, and what it cost.

    Attributes
    ----------
    text : the answer.
    items : pictures and videos of the prompt.
    before : visual tokens of the prompt before reduction.
    tokens : visual tokens on average over decoder layers.
    flops : of the decoder's prefill.
    seconds : share of this prompt in the time of its batch, from pixels to the last token.
    prompt, written : tokens of the shortened prompt, and of the answer.
    """

    text: str
    items: int
    before: int
    tokens: float
    flops: int
    seconds: float
    prompt: int
    written: int


class Ledger:
    """Answers of one setting, in files of JSON lines: each process appends to its own and reads all.

    Parameters
    ----------
    folder : where ledgers are; None keeps answers in memory only.
    setting : what all answers depend on; another setting is another ledger.
    rank : of this process.

    Raises
    ------
    InputError : the folder cannot be written.
    """

    def __init__(self, folder: Path | None, setting: Mapping[str, Any], rank: int = 0) -> None:
        self._answers: dict[str, CostedAnswer] = {}
        self._file: TextIO | None = None
        if folder is None:
            return
        text = json.dumps(setting, sort_keys=True, default=str)
        mine = folder / digest(text)
        try:
            mine.mkdir(parents=True, exist_ok=True)
            for file in sorted(mine.glob("answers-*.jsonl")):
                self._answers |= _read(file)
            (mine / f"setting-{rank}.json").write_text(text + "\n")
            own = mine / f"answers-{rank}.jsonl"
            self._file = own.open("a", encoding="utf-8")
            if own.read_bytes()[-1:] not in (b"", b"\n"):  # a killed run left a line unfinished
                self._file.write("\n")
        except OSError as error:
            raise InputError(f"{folder} cannot be used for answers: {error.strerror}. Give another folder.") from error

    def __len__(self) -> int:
        return len(self._answers)

    def get(self, key: str) -> CostedAnswer | None:
        """The answer to a prompt, or None."""
        return self._answers.get(key)

    def put(self, answers: Mapping[str, CostedAnswer]) -> None:
        """Add the answers of a batch; they are on disk when this returns."""
        self._answers.update(answers)
        if self._file is not None:
            for key, answer in answers.items():
                self._file.write(json.dumps({"key": key, **asdict(answer)}) + "\n")
            self._file.flush()


def _read(file: Path) -> dict[str, CostedAnswer]:
    """Answers of one file; a line that a killed run left unfinished is no answer."""
    found = {}
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            document = json.loads(line)
            key = document.pop("key")
            found[key] = CostedAnswer(**document)
        except (ValueError, TypeError, KeyError, AttributeError):
            continue
    return found
