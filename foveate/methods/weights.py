"""The weights of a trained method: a folder with ``config.json`` and ``model.safetensors``, as Hugging Face models have them."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import FoveateError, InputError, first_line
from ..jsonl import parsed
from ..places import user_path

FORMAT = 1
CONFIG, TENSORS = "config.json", "model.safetensors"
POCKET = "pocket"
SHIPPED = Path(__file__).parents[1] / POCKET / "methods"  # weights that come with the package, trained on the pocket model


class Weights:
    """A folder of weights on this machine.

    Parameters
    ----------
    name : a folder, or an id of the Hub, which may end in ``@revision``; that is downloaded, or found where it was before.

    Raises
    ------
    InputError : there is no such folder, or it holds no weights of a method.
    """

    def __init__(self, name: str) -> None:
        self.name, self.folder = name, _folder(name)
        try:
            self.config: dict[str, Any] = parsed((self.folder / CONFIG).read_text(encoding="utf-8"))
            version, self.method = self.config["format"], str(self.config["method"])
            self.fields: dict[str, Any] = dict(self.config["fields"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{name} holds no weights of a method: {CONFIG} cannot be read ({type(error).__name__}: {first_line(error)}). "
                "Give a folder that save_pretrained wrote, or its id on the Hub."
            ) from error
        if version != FORMAT:
            raise InputError(f"{name}: weights of format {version}, and this foveate reads format {FORMAT}. Install a newer one.")

    @cached_property
    def digest(self) -> str:
        """The first 16 hex digits of the SHA-256 of the tensors."""
        found = hashlib.sha256()
        try:
            with (self.folder / TENSORS).open("rb") as file:
                while piece := file.read(1 << 20):
                    found.update(piece)
        except OSError as error:
            raise InputError(f"{self.name}: {TENSORS} cannot be read: {error.strerror}") from error
        return found.hexdigest()[:16]

    def tensors(self) -> dict[str, Tensor]:
        """All of them, on the CPU.

        Raises
        ------
        InputError : the file is broken, or a tensor holds NaN or infinite values.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            found = load_file(self.folder / TENSORS)
        except (OSError, SafetensorError) as error:
            raise InputError(f"{self.name}: {TENSORS} is broken or missing ({first_line(error)}). Copy the folder anew.") from error
        broken = [name for name, tensor in found.items() if not bool(torch.isfinite(tensor).all())]
        if broken:
            raise InputError(f"{self.name}: {broken[0]} holds NaN or infinite values. These weights cannot be used.")
        return found


def named(name: str, method: str) -> str:
    """The folder or Hub id that a name of weights stands for: "pocket" are those shipped for a method, "pocket/..." others.

    Raises
    ------
    InputError : none of that name are shipped.
    """
    first, _, rest = name.partition("/")
    if first != POCKET or Path(name).is_dir():
        return name
    folder = SHIPPED / (rest or method)
    if folder.parent != SHIPPED or not folder.is_dir():
        known = ", ".join(sorted(path.name for path in SHIPPED.iterdir())) if SHIPPED.is_dir() else ""
        raise InputError(f"no weights {name!r} are shipped for {method!r}. Shipped are those of: {known or 'no method'}.")
    return str(folder)


def _folder(name: str) -> Path:
    """Where the weights are on this machine."""
    path = user_path(name)
    if path.is_dir():
        return path
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise InputError(f"there is no folder {name}. Give a folder of weights, or an id of the Hub such as someone/method.")
    from huggingface_hub import snapshot_download

    place, _, revision = name.partition("@")
    try:
        return Path(snapshot_download(place, revision=revision or None, allow_patterns=[CONFIG, TENSORS]))
    except Exception as error:  # whatever the network, the Hub and the disk lead to
        raise InputError(f"there is no folder {name}, and the Hub gives none either: {first_line(error)}") from error


def write(folder: str | Path, config: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write a folder of weights. Each file is there in whole or not at all.

    Raises
    ------
    FoveateError : the folder cannot be written.
    """
    from safetensors.torch import save

    data = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    text = json.dumps({"format": FORMAT, **config}, indent=1) + "\n"
    place = user_path(folder)
    try:
        place.mkdir(parents=True, exist_ok=True)
        for name, content in ((TENSORS, data), (CONFIG, text.encode())):
            _replace(place / name, content)
    except OSError as error:
        raise FoveateError(f"{place} cannot be written: {error.strerror}. Choose another folder; the weights are kept.") from error


def _replace(path: Path, content: bytes) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def state_digest(tensors: Mapping[str, Tensor]) -> str:
    """A short name of tensors that are in no file."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
        found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]
