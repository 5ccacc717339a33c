"""The registry that methods enter by being defined: those of this folder, those of other packages, and your own."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import importlib
import importlib.util
import inspect
import logging
import os
import pkgutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError, first_line, shown
from ..places import user_path

if TYPE_CHECKING:
    from .base import Method

log = logging.getLogger("foveate")
REGISTRY: dict[str, type[Method]] = {}
UNLISTED: dict[str, type[Method]] = {}  # what has a name and is no method of the table, such as keeping everything
IMPORTS = "FOVEATE_IMPORT"  # environment variable with Python files that define methods, separated as in PATH; workers read it, too
GROUP = "foveate.methods"  # entry points by which other packages add methods: the module, or class, that registers them


@functools.cache
def _load_all() -> dict[str, str]:
    """Import every method file of this folder, and what other packages add; returns what of the latter failed, and why."""
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if not module.ispkg:
            importlib.import_module(f"{__package__}.{module.name}")
    for place in filter(None, os.environ.get(IMPORTS, "").split(os.pathsep)):
        import_file(place)
    failed: dict[str, str] = {}
    for entry in entry_points(group=GROUP):
        try:
            entry.load()
        except Exception as error:  # whatever the code of others leads to
            failed[entry.name] = f"{entry.value}: {type(error).__name__}: {first_line(error)}"
            log.warning("the method %r of another package cannot be loaded (%s)", entry.name, failed[entry.name])
    return failed


def import_file(place: str | Path) -> None:
    """Run a Python file, whose methods enter the registry by that. Nothing happens where it has been run already.

    Raises
    ------
    InputError : there is no such file, or it cannot be run.
    """
    path = user_path(place).resolve()
    name = f"foveate_import_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise InputError(f"{place} is no Python file. Give a file.py that defines a method.")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever somebody's code leads to
        del sys.modules[name]
        raise InputError(f"{place} cannot be imported ({type(error).__name__}: {first_line(error)})") from error


def registered() -> dict[str, type[Method]]:
    """All methods by name."""
    _load_all()
    return dict(sorted(REGISTRY.items()))


def get(name: str, **fields: Any) -> Method:
    """Build a method by name.

    Parameters
    ----------
    name : as listed by ``foveate.methods()``; ``name:preset`` uses a preset, e.g. ``"prumerge:released"``, or the weights that are
        shipped for the pocket model, ``"dyvte:pocket"``; ``"full"`` keeps all visual tokens.
    **fields : hyper-parameters of the method; ``weights=`` also sets those that were saved with them.

    Raises
    ------
    InputError : unknown method, preset or field, or a value out of range.
    """
    cls, preset = look_up(name)
    allowed = [field.name for field in dataclasses.fields(cls)]
    unknown = [field for field in fields if field not in allowed]
    if unknown:
        raise InputError(f"{cls.name!r} has no field {unknown[0]!r}{_near(unknown[0], allowed)}; its fields: {', '.join(allowed)}")
    if preset in shipped(cls):
        fields, preset = {"weights": shipped(cls)[preset], **fields}, ""
    build: Any = getattr(cls, preset) if preset else cls
    if fields.get("weights") is not None and hasattr(cls, "from_pretrained"):
        build = cls.from_pretrained  # with the fields that were saved with them
        fields = {**fields, "name": fields["weights"]}
        del fields["weights"]
    method: Method = build(**fields)
    return method


def look_up(name: str) -> tuple[type[Method], str]:
    """The class of a method and its preset, "" for none.

    Raises
    ------
    InputError : there is no such method or preset.
    """
    known = registered()
    if name in UNLISTED:
        return UNLISTED[name], ""
    base, _, preset = name.partition(":")
    if base not in known:
        failed = _load_all().get(base)
        raise InputError(
            f"the method {base!r} cannot be loaded: {failed}"
            if failed
            else f"unknown method {shown(base)}{_near(base, [*known, *UNLISTED])}; available: {', '.join(known)}"
        )
    available = (*presets(known[base]), *shipped(known[base]))
    if preset and preset not in available:
        raise InputError(f"{base!r} has no preset {shown(preset)}; available: {', '.join(available) or 'none'}")
    return known[base], preset


def _near(name: str, known: Sequence[str]) -> str:
    """A question, where a known name is like the one given."""
    found = difflib.get_close_matches(name, known, 1, 0.7)
    return f" (did you mean {found[0]!r}?)" if found else ""


def presets(cls: type[Method]) -> tuple[str, ...]:
    """Names of the presets of a method: its class methods ``paper`` and ``released``, where it has them."""
    return tuple(preset for preset in ("paper", "released") if inspect.ismethod(getattr(cls, preset, None)))


def shipped(cls: type[Method]) -> dict[str, str]:
    """Weights of a method that come with the package, by what stands for them in place of a preset: "pocket", "pocket-guided"."""
    from .weights import POCKET, SHIPPED

    folders = SHIPPED.iterdir() if SHIPPED.is_dir() and hasattr(cls, "from_pretrained") else ()
    of = getattr(cls, "weights_of", "") or cls.name
    mine = sorted(path.name for path in folders if path.name == of or path.name.startswith(f"{of}-"))
    return {f"{POCKET}{name.removeprefix(of)}": f"{POCKET}/{name}" for name in mine}


@dataclass(frozen=True)
class MethodInfo:
    """One row of the table of methods; ``problem`` says why a method cannot be built, "" where it can."""

    name: str
    summary: str
    stage: str
    reads_cls: bool
    reads_question: bool
    adaptive: bool
    presets: tuple[str, ...]
    paper: str
    problem: str = ""


def methods() -> list[MethodInfo]:
    """All methods, by name: what each does, where it acts, what it reads, its paper."""
    return [_info(name, cls) for name, cls in registered().items()]


def _info(name: str, cls: type[Method]) -> MethodInfo:
    summary = next(iter((cls.__doc__ or "").strip().splitlines()), "")
    try:
        example = cls() if cls.adaptive else cls(budget=0.5)
        front = example.before_decoder()
        question = front.reads_question or any(reducer.reads != "nothing" for reducer in example.inside_decoder())
    except Exception as error:  # a class of somebody else's may fail in any way, and the table is of all others, too
        problem = f"{type(error).__name__}: {first_line(error)}"
        return MethodInfo(name, summary, cls.stage, False, False, cls.adaptive, presets(cls), cls.reference, problem)
    return MethodInfo(name, summary, cls.stage, front.reads_cls, question, cls.adaptive, presets(cls), cls.reference)
