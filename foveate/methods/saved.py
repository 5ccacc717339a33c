"""Methods as JSON: what ``Method.save`` writes, and what the command line sends to other processes."""

from __future__ import annotations

import dataclasses
import inspect
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import InputError, first_line
from ..fingerprint import digest
from ..jsonl import parsed
from ..places import user_path, write_text
from .registry import REGISTRY, UNLISTED, get, look_up

if TYPE_CHECKING:
    from ..tokens import Budget
    from .base import Method

EXPECTED = 'expected {"method": "prumerge+", "fields": {"budget": 144}}, as Method.save writes it'

KNOWN = {"method", "fields", "methods", "foveate", "model"}


class Saved:
    """What every method can do on disk."""

    name: ClassVar[str]
    made_for: dict[str, Any] | None = None  # of one that a tuning chose, the name and marks of its model: it is refused by others

    def described(self) -> dict[str, Any]:
        """What ``save`` writes: the name and all fields, JSON-able.

        Raises
        ------
        InputError : the class is not registered by a name of its own, or the method has weights that are in no folder yet.
        """
        if {**REGISTRY, **UNLISTED}.get(self.name) is not type(self):
            raise InputError(
                f"{type(self).__name__} is not registered, so that nothing could find it by its name. Define it with one: "
                "class Mine(ProjectorReducer, name='mine')."
            )
        own: Any = self
        return {"method": self.name, "fields": {field.name: getattr(self, field.name) for field in dataclasses.fields(own)}}

    @classmethod
    def joined(cls, methods: list[Method]) -> Method:
        """The method that several make together, where a file describes one of these."""
        raise InputError(f"{cls.name!r} is not made of methods; {EXPECTED}")

    def save(self, path: str | Path) -> None:
        """Write name and fields as a small JSON file, which ``Method.load`` and ``--config`` of every command read.

        Raises
        ------
        InputError : as of ``described``.
        FoveateError : the file cannot be written.
        """
        from .. import __version__

        write_text(path, json.dumps({**whole(self), "foveate": __version__}, indent=1) + "\n")

    @staticmethod
    def load(path: str | Path) -> Method:
        """The method that ``save``, ``foveate search`` or ``foveate tune`` wrote, whatever its class.

        Raises
        ------
        InputError : there is no such file, it describes no method, or a field is wrong.
        """
        return read(path)


def read(path: str | Path) -> Method:
    """The method that a file describes.

    Raises
    ------
    InputError : there is no such file, it describes no method, or there is no such method here.
    """
    place = user_path(path)
    try:
        document = parsed(place.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"{path} cannot be read: {error.strerror}. Give a file that Method.save or 'foveate search' wrote."
        ) from error
    except ValueError as error:
        raise InputError(f"{path} is no JSON ({first_line(error)}); {EXPECTED}") from error
    return restored(document, place)


def restored(document: Any, place: Path | None = None) -> Method:
    """The method that a document describes.

    Parameters
    ----------
    document : of ``Method.described``, or of a search.
    place : the file it came from, for methods that read what a search found.

    Raises
    ------
    InputError : it describes no method, or there is no such method here.
    """
    if isinstance(document, dict) and isinstance(document.get("method"), dict):  # a plan of a tuning
        document = {**document["method"], "model": document.get("model")}
    found = _restored(document, place)
    made_for = document.get("model")
    if made_for is not None:
        if not isinstance(made_for, dict) or not isinstance(made_for.get("signature"), dict):
            raise InputError(f"{place or 'the method'}: 'model' names no model; expected what 'foveate tune' wrote")
        found.made_for = made_for
    return found


def _restored(document: Any, place: Path | None) -> Method:
    where = "the method" if place is None else str(place)
    if not isinstance(document, dict) or not isinstance(document.get("method"), str):
        raise InputError(f"{where}: {EXPECTED}")
    name, fields, parts = document["method"], document.get("fields"), document.get("methods")
    if parts is not None:
        if strange := sorted(set(document) - KNOWN | ({"fields"} if fields else set())):
            raise InputError(f"{where}: a composition has no {strange[0]!r} of its own. Give it to one of its methods.")
        if not isinstance(parts, list):
            raise InputError(f"{where}: 'methods' is no list of methods")
        return look_up(name)[0].joined([restored(part) for part in parts])
    cls = look_up(name)[0]
    if fields is None and place is not None and cls.found_by_search:
        fields = {cls.found_by_search: str(place)}
    elif (strange := sorted(set(document) - KNOWN)) and (fields is None or not cls.searched):  # a search tells more than the fields
        raise InputError(f"{where}: nothing is called {strange[0]!r} here; {EXPECTED}")
    if not isinstance({} if fields is None else fields, dict):
        raise InputError(f"{where}: 'fields' is no object; {EXPECTED}")
    return get(name, **(fields or {}))


def named(name: str, budget: Budget = None, config: str = "") -> Method:
    """The method that another process, a row or a request means.

    Parameters
    ----------
    name : as listed by ``foveate.methods()``.
    budget : None = the method's own, that of ``config`` included.
    config : all of the method, as ``dumped`` wrote it; "" = the name tells it. Never from a request: it may name files.

    Raises
    ------
    InputError : there is no such method, or it cannot have the budget.
    """
    if not config:
        return get(name, **({} if budget is None else {"budget": budget}))
    method = restored(json.loads(config))
    return method if budget is None else method.with_budget(budget)


def dumped(method: Method) -> str:
    """A method in one line, for other processes."""
    return json.dumps(whole(method), sort_keys=True)


def whole(method: Any) -> dict[str, Any]:
    """What describes a method, and the model that it was made for, if it was for one."""
    found: dict[str, Any] = method.described()
    return found if method.made_for is None else {**found, "model": method.made_for}


def code_of(method: Method, *, foreign: bool = False) -> str:
    """A digest of the files that define a method; "" where there are none.

    Parameters
    ----------
    foreign : only files outside of this package, whose version tells nothing about them.
    """
    parts = {type(part) for part in (method, method.before_decoder(), *method.inside_decoder())}
    classes = {cls for part in parts for cls in part.__mro__ if issubclass(cls, Saved) and cls is not Saved}
    package = __name__.partition(".")[0] + "."
    modules = {cls.__module__: cls for cls in classes if cls.__module__ not in (f"{package}methods.base", "__main__")}
    files = {inspect.getfile(cls) for module, cls in modules.items() if not (foreign and module.startswith(package))}
    return digest(*(Path(file).read_bytes() for file in sorted(files))) if files else ""
