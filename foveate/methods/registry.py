"""The registry that methods enter by being defined: those of this folder, those of other packages, and your own."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import logging
import pkgutil
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError, first_line, shown

if TYPE_CHECKING:
    from .base import Method

log = logging.getLogger("foveate")
REGISTRY: dict[str, type[Method]] = {}
UNLISTED: dict[str, type[Method]] = {}  # what has a name and is no method of the table, such as keeping everything
GROUP = "foveate.methods"  # entry points by which other packages add methods: the module, or class, that registers them


@functools.cache
def _load_all() -> dict[str, str]:
    """Import every method file of this folder, and what other packages add; returns what of the latter failed, and why."""
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if not module.ispkg:
            importlib.import_module(f"{__package__}.{module.name}")
    failed: dict[str, str] = {}
    for entry in entry_points(group=GROUP):
        try:
            entry.load()
        except Exception as error:  # whatever the code of others leads to
            failed[entry.name] = f"{entry.value}: {type(error).__name__}: {first_line(error)}"
            log.warning("the method %r of another package cannot be loaded (%s)", entry.name, failed[entry.name])
    return failed


def registered() -> dict[str, type[Method]]:
    """All methods by name."""
    _load_all()
    return dict(sorted(REGISTRY.items()))


def get(name: str, **fields: Any) -> Method:
    """Build a method by name.

    Parameters
    ----------
    name : as listed by ``foveate.methods()``; ``name:preset`` uses a preset, e.g. ``"prumerge:released"``; ``"full"`` keeps all
        visual tokens.
    **fields : hyper-parameters of the method.

    Raises
    ------
    InputError : unknown method, preset or field, or a value out of range.
    """
    cls, preset = look_up(name)
    allowed = [field.name for field in dataclasses.fields(cls)]
    unknown = [field for field in fields if field not in allowed]
    if unknown:
        raise InputError(f"{cls.name!r} has no field {unknown[0]!r}; its fields: {', '.join(allowed)}")
    method: Method = (getattr(cls, preset) if preset else cls)(**fields)
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
            else f"unknown method {shown(base)}; available: {', '.join(known)}"
        )
    if preset and preset not in presets(known[base]):
        raise InputError(f"{base!r} has no preset {shown(preset)}; available: {', '.join(presets(known[base])) or 'none'}")
    return known[base], preset


def presets(cls: type[Method]) -> tuple[str, ...]:
    """Names of the presets of a method: its class methods ``paper`` and ``released``, where it has them."""
    return tuple(preset for preset in ("paper", "released") if inspect.ismethod(getattr(cls, preset, None)))


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
