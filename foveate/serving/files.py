"""Which files a model has, to know it again without loading it."""

from __future__ import annotations

from pathlib import Path

from ..errors import InputError, first_line
from ..fingerprint import digest
from ..loading import base_of, is_adapter, source_of

CHUNK, CHUNKS = 4096, 256  # bytes of a file that its fingerprint reads at a time, and how often at most
FILES = (".json", ".jinja", ".safetensors", ".bin", ".model", ".txt")


def fingerprint(model: str) -> str:
    """Which files a model has, without loading it: of a folder, pieces spread over each file; of the Hub, the commit.

    Raises
    ------
    InputError : there is no such model.
    """
    from transformers import AutoConfig

    folder = Path(source_of(model))
    if not folder.is_dir():
        try:
            return digest(model, str(AutoConfig.from_pretrained(model)._commit_hash))
        except Exception as error:  # whatever a missing repository or network leads to
            raise InputError(f"the model {model!r} cannot be found: {first_line(error)}") from error
    parts: list[str | bytes] = []
    for file in sorted(path for path in folder.iterdir() if path.is_file() and path.suffix in FILES):
        size = file.stat().st_size
        with file.open("rb") as opened:
            for place in range(0, size, max(CHUNK, size // CHUNKS)):
                opened.seek(place)
                parts.append(opened.read(CHUNK))
        parts.append(f"{file.name} {size}")
    return digest(*parts, fingerprint(base_of(folder)) if is_adapter(model) else "")
