"""Answers that were given once, with what they cost: an interrupted run goes on from there and never mixes settings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from .errors import InputError

SAMPLES = 4096  # weights of each tensor that the fingerprint reads in their order


@dataclass(frozen=True)
class Answer:
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
        self._answers: dict[str, Answer] = {}
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

    def get(self, key: str) -> Answer | None:
        """The answer to a prompt, or None."""
        return self._answers.get(key)

    def put(self, answers: Mapping[str, Answer]) -> None:
        """Add the answers of a batch; they are on disk when this returns."""
        self._answers.update(answers)
        if self._file is not None:
            for key, answer in answers.items():
                self._file.write(json.dumps({"key": key, **asdict(answer)}) + "\n")
            self._file.flush()


def _read(file: Path) -> dict[str, Answer]:
    """Answers of one file; a line that a killed run left unfinished is no answer."""
    found = {}
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            document = json.loads(line)
            key = document.pop("key")
            found[key] = Answer(**document)
        except (ValueError, TypeError, KeyError, AttributeError):
            continue
    return found


def digest(*parts: str | bytes) -> str:
    """A short name of some texts and bytes."""
    found = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        found.update(len(data).to_bytes(8, "big") + data)
    return found.hexdigest()[:20]


def fingerprint(model: Any) -> str:
    """Which weights a loaded model has: of each tensor its shape, type, the sum of its bits, and ``SAMPLES`` spread over it.

    Read from memory, so that adapters and quantisation count, and files need not be read twice. Of tensors that are not in memory
    (offloaded ones) only shape and type count.
    """
    parts = [model.config.to_json_string(use_diff=False), str(getattr(model.config, "_commit_hash", None))]
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        bits = "" if tensor.is_meta else _bits(tensor.detach())
        parts.append(f"{name} {tuple(tensor.shape)} {tensor.dtype} {bits}")
    return digest(*parts)


def _bits(tensor: Tensor) -> str:
    flat = tensor.contiguous().flatten().view(torch.uint8)
    words = flat.view(torch.int16) if flat.numel() % 2 == 0 else flat
    spread = words[:: max(1, words.numel() // SAMPLES)].cpu().numpy().tobytes()
    return f"{int(words.sum(dtype=torch.int64))} {digest(spread)}"
