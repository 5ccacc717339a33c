"""What a method learns from data, computed once and kept on disk for all epochs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import Dataset

from ..engine.model.seams import brings_pictures
from ..methods.trained import Trained
from ..pictures import Pictures
from ..places import ready_folder, writing
from .settings import number, processes, wait_for_all

ROWS = 8  # conversations at a time
PIECE = 25  # batches in a file


def moved(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """A batch on a device."""
    return {name: value.to(device) for name, value in batch.items()}


def prepares(method: Trained) -> bool:
    """Whether a method prepares what it learns from."""
    return type(method).prepare is not Trained.prepare


class Prepared(Dataset[dict[str, Tensor]]):
    """Rows of tensors that a method has prepared. A run that goes on computes only what is missing; processes share the work.

    Parameters
    ----------
    method : attached to ``model`` for training.
    data : samples, and ``collate``, which makes batches of them.
    folder : for the rows.
    tell : prints a line.
    """

    def __init__(
        self,
        method: Trained,
        model: Any,
        data: Any,
        collate: Callable[..., dict[str, Tensor]],
        folder: Path,
        tell: Callable[[str], None],
    ) -> None:
        size = ROWS * PIECE
        if len(data):
            ready_folder(folder)
        model.eval()
        paths = {folder / f"{start:08d}.safetensors": start for start in range(0, len(data), size)}
        for path, start in [*paths.items()][number() :: processes()]:
            if not path.exists():
                tell(f"{folder.name}: {start} of {len(data)} conversations")
                with writing(path):
                    whole = path.with_suffix(".part")
                    save_file(self._piece(method, model, data, collate, range(start, min(start + size, len(data)))), whole)
                    whole.replace(path)
        wait_for_all()
        pieces = [load_file(path) for path in paths]
        self.rows = {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]} if pieces else {}

    @staticmethod
    def _piece(method: Trained, model: Any, data: Any, collate: Callable[..., Any], numbers: range) -> dict[str, Tensor]:
        found = []
        for first in range(numbers.start, numbers.stop, ROWS):
            batch = collate([data[number] for number in range(first, min(first + ROWS, numbers.stop))])
            batch = moved(batch, model.device)
            if brings_pictures(batch):
                batch = Pictures(model, **batch).inputs  # which may run the decoder more than once, and the encoder need not
            rows = method.prepare(model, batch) or {}
            found.append({name: value.detach().cpu() for name, value in rows.items()})
        return {name: torch.cat([rows[name] for rows in found]).contiguous() for name in found[0]}

    def __len__(self) -> int:
        return len(next(iter(self.rows.values()), ()))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: value[index] for name, value in self.rows.items()}
