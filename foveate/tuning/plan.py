"""What a tuning decided, as a small file: a method for one model, with what is known of its loss and its saving."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..engine.model.anatomy import innermost
from ..errors import InputError, first_line
from ..fingerprint import signature
from ..jsonl import parsed
from ..methods.base import Method
from ..methods.saved import restored
from ..places import user_path, write_text

FORMAT = 1
EXPECTED = "expected a plan that 'foveate tune' wrote"


@dataclass(frozen=True)
class TunedPlan:
    """A method for one model.

    Attributes
    ----------
    method : as ``Method.described``; of "full" all tokens stay.
    model : its name, and some of its weights, by which it is recognised.
    reason : why this method.
    tolerance : loss that was allowed, in [0, 1].
    loss, bound : on the examples that confirmed it, and what the loss is below with 95 % confidence.
    saving : of the objective, in [0, 1], with its interval.
    needed : examples with which something would probably be accepted, where nothing was.
    about : data, settings, versions, machine and command.
    """

    method: dict[str, Any]
    model: dict[str, Any]
    reason: str
    tolerance: float
    loss: float
    bound: float | None
    saving: dict[str, Any]
    needed: int | None = None
    about: dict[str, Any] = field(default_factory=dict)
    format: int = FORMAT

    def save(self, path: str | Path) -> None:
        """Write the plan.

        Raises
        ------
        FoveateError : the file cannot be written.
        """
        write_text(path, json.dumps(asdict(self), indent=1) + "\n")


def read_plan(path: str | Path) -> TunedPlan:
    """The plan of a file.

    Raises
    ------
    InputError : there is no such file, or it is no plan.
    """
    place = user_path(path)
    try:
        document = parsed(place.read_text(encoding="utf-8"))
        plan = TunedPlan(**document)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}. Give a plan that 'foveate tune' wrote.") from error
    except (ValueError, TypeError) as error:
        raise InputError(f"{path} is no plan ({first_line(error)}); {EXPECTED}") from error
    if plan.format != FORMAT or not isinstance(plan.method, dict) or not isinstance(plan.model, dict):
        raise InputError(f"{path} is no plan of format {FORMAT}; {EXPECTED}")
    return plan


def load_plan(path: str | Path) -> Method:
    """The method that ``foveate tune`` chose; attached to another model than the one it was chosen for, it raises ``InputError``.

    Parameters
    ----------
    path : of the plan.

    Raises
    ------
    InputError : there is no such file, or it is no plan.

    Examples
    --------
    >>> with foveate.load_plan("plan.json")(model):
    ...     out = model.generate(**inputs)
    """
    plan = read_plan(path)
    return restored({"method": plan.method, "model": plan.model})


def marks_of(model: Any) -> dict[str, list[float]]:
    """By which a model is recognised: samples of its weights, also where decoder layers or adapters are left out."""
    return signature(innermost(model))
