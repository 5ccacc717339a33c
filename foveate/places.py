"""Places on disk: tried before long work, written as a whole or not at all, and refused in words."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from .errors import FoveateError, InputError, shown


def user_path(path: str | Path) -> Path:
    """A path whose ``~`` or ``~name`` is the home folder that it stands for.

    Raises
    ------
    InputError : there is no such user, or nobody knows the home folder.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        name = Path(path).parts[0][1:]
        why = f"there is no user {shown(name)} with a home folder here" if name else "the home folder of this user is not known"
        raise InputError(f"{path} is no place: {why}. Give the whole path.") from error


def ready_folder(path: str | Path) -> Path:
    """A folder that files can be written to; it is made if it is new, with those above it.

    Raises
    ------
    InputError : it cannot be made, or not written to.
    """
    place = user_path(path)
    try:
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise InputError(f"the folder {place} cannot be written ({error.strerror}). Choose another place.") from error
    return place


def ready_file(path: str | Path) -> Path:
    """A file that can be written; its folder is made if it is new.

    Raises
    ------
    InputError : it is a folder, its folder cannot be written, or the file there cannot be replaced.
    """
    place = user_path(path)
    if place.is_dir():
        raise InputError(f"{place} is a folder; give the name of a file")
    if not place.exists() or place.is_file():  # a device or a pipe is written to where it is
        ready_folder(place.parent)
    if place.exists() and not os.access(place, os.W_OK):
        raise InputError(f"{place} cannot be written (Permission denied). Choose another place.")
    return place


def ready_files(*paths: str | Path | None, reads: Iterable[str | Path | None] = ()) -> None:
    """Several files that can be written, each of its own; None = is not wanted.

    Parameters
    ----------
    reads : files that are read, none of which may be written.

    Raises
    ------
    InputError : one cannot be written, two are the same, or one is read.
    """
    places: dict[Path, str | Path] = {}
    sources = {Path(os.path.expanduser(each)).resolve() for each in reads if each is not None}  # some are read as ~name itself
    for path in paths:
        if path is not None:
            place = ready_file(path).resolve()
            if place in places:
                raise InputError(
                    f"{path} is to hold two results, and the second would replace the first. Give each a name of its own."
                )
            if place in sources and place.is_file():
                raise InputError(f"{path} is read here, and the result would replace it. Choose another place.")
            places[place] = path


@contextmanager
def saving(*earlier: FoveateError | None) -> Iterator[Callable[..., bool]]:
    """Save several results: one that cannot be written stops none of the others, and is told when all were tried.

    Parameters
    ----------
    earlier : what could not be written before; None = nothing.

    Yields
    ------
    A function that calls ``write(*arguments)`` and returns whether that worked.

    Raises
    ------
    FoveateError : something could not be written; the message names all of it.
    """
    errors = [str(error) for error in earlier if error is not None]

    def save(write: Callable[..., Any], *arguments: Any) -> bool:
        try:
            write(*arguments)
        except FoveateError as error:
            errors.append(str(error))
            return False
        return True

    yield save
    if errors:
        raise FoveateError(" ".join(errors))


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turn what the disk says while a place is written into our own error.

    Raises
    ------
    FoveateError : it cannot be written, for example because the disk is full.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or error
        raise FoveateError(f"{path} cannot be written ({why}). Make room, or choose another place.") from error


def write_text(path: str | Path, text: str) -> None:
    """Write a text file as ``write_bytes`` does; bytes in names of files that are no text are written as escapes.

    Raises
    ------
    FoveateError : it cannot be written.
    """
    write_bytes(path, text.encode(errors="backslashreplace"))


def write_bytes(path: str | Path, contents: bytes) -> None:
    """Write a file as a whole: where that fails, what was there before stays. Links and special files stay what they are.

    Raises
    ------
    FoveateError : it cannot be written.
    """
    place = user_path(path)
    with writing(path):
        if place.exists() and not place.is_file():
            place.write_bytes(contents)
            return
        place = place.resolve()
        handle, temporary = tempfile.mkstemp(dir=place.parent, prefix=f".{place.name[:80]}-")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(contents)
            os.chmod(temporary, place.stat().st_mode & 0o777 if place.exists() else 0o666 & ~_umask())
            os.replace(temporary, place)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
