"""``--json``: what a command found as one JSON document, alone on stdout or in a file beside what is shown."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from ..errors import FoveateError, InputError
from ..jsonl import parsed
from ..places import ready_files, saving, user_path, write_text
from .common import err, sayer

STDOUT = Path("-")
OPTION = "--json"
JsonFile = Annotated[
    Path | None,
    typer.Option(
        OPTION,
        metavar="[FILE|-]",
        help="One JSON document: alone, or as -, printed with nothing else on stdout; with a file, written there.",
    ),
]


class Command(TyperCommand):
    """A command whose ``--json`` may stand alone, which is ``--json -``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the arguments.

        Where a command takes arguments without a name, what follows ``--json`` is one of them if it is neither ``-`` nor a
        file of JSON: ``foveate ask --json photo.jpg ...`` never writes to the photo.
        """
        unnamed = any(parameter.param_type_name == "argument" for parameter in self.params)
        return super().parse_args(ctx, completed(args, unnamed))


def completed(args: list[str], unnamed: bool) -> list[str]:
    """The arguments with ``-`` behind each ``--json`` that stands alone; ``unnamed``: there may be arguments without a name."""
    found: list[str] = []
    named = args[: args.index("--")] if "--" in args else args
    for number, part in enumerate(args):
        found.append(part)
        if part == OPTION and number < len(named):
            value = named[number + 1] if number + 1 < len(named) else None
            file = value is not None and (value.endswith(".json") or value.startswith("/dev/"))
            if value is None or (value != "-" and (value.startswith("-") or (unnamed and not file))):
                found.append("-")
    return found


def ready_json(place: Path | None, *others: str | Path | None, reads: Iterable[str | Path | None] = ()) -> None:
    """Try the file of ``--json`` and other places before long work.

    Parameters
    ----------
    reads : files that the command reads.

    Raises
    ------
    InputError : one cannot be written, two are the same, one is read, or the file is the config of a model.
    """
    file = None if place == STDOUT else place
    ready_files(file, *others, reads=reads)
    if file is not None and user_path(file).is_file() and _configures(file):  # devices and pipes may have no end
        raise InputError(f"--json {file} would replace the config of a model. Name another file, or give --json last.")


def _configures(file: Path) -> bool:
    try:
        found = parsed(user_path(file).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and "model_type" in found


@contextlib.contextmanager
def telling(
    document: Any, place: Path | None, show: Callable[[], Any], *earlier: FoveateError | None
) -> Iterator[Callable[..., bool]]:
    """Tell a result, and save further ones: what cannot be printed or written stops none of the others (``places.saving``).

    Parameters
    ----------
    document : of ``--json``.
    place : what ``--json`` says.
    show : prints the result for people; not called where the document is alone on stdout.
    earlier : what could not be written before.

    Yields
    ------
    As ``places.saving`` does.

    Raises
    ------
    FoveateError : something could not be told or written; the message names all of it.
    """
    with saving(*earlier) as keep:
        keep(_print, document, place, show)
        if place is not None and place != STDOUT and keep(write_text, place, json.dumps(document, indent=1) + "\n"):
            sayer(err)(f"numbers: {place}")
        yield keep


def tell(document: Any, place: Path | None, show: Callable[[], Any], *earlier: FoveateError | None) -> None:
    """Tell a result as ``telling`` does, where nothing else is saved.

    Raises
    ------
    FoveateError : it could not be told or written.
    """
    with telling(document, place, show, *earlier):
        pass


def _print(document: Any, place: Path | None, show: Callable[[], Any]) -> None:
    try:
        if place == STDOUT:
            print(json.dumps(document))
        else:
            show()
        sys.stdout.flush()
    except (OSError, SystemExit) as error:  # rich ends the process where nobody reads on
        with contextlib.suppress(OSError, ValueError):  # what could not be written is not tried again at the end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        why = getattr(error, "strerror", None) or "nobody reads it"
        raise FoveateError(f"the result cannot be printed ({why}). Make room, or choose another place.") from error
