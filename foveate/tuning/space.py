"""The settings that a tuning tries: methods with budgets and thresholds, before the decoder, inside it, and in both places."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..engine.model.anatomy import Anatomy
from ..engine.vision.front import prepare
from ..errors import InputError, UnsupportedModelError
from ..methods.base import DecoderReducer, Method
from ..methods.compose import Compose
from ..methods.registry import get, look_up, shipped

COARSE = (0.6, 0.4, 0.25, 0.15, 0.08)  # shares of the visual tokens that are tried first
FINE = (0.9, 0.75, 0.5, 0.33, 0.2, 0.11, 0.05)  # and those of the methods that do well
SHARES = sorted((*COARSE, *FINE), reverse=True)
MANY = 1000  # visual tokens of a picture
USUAL = (
    "fovea",
    "prumerge",
    "prumerge+",
    "scope",
    "vispruner",
    "divprune",
    "visionzip",
    "pool",
    "resize",
    "spatial",
    "fastv",
    "pyramiddrop",
    "iti",
    "pixelprune",
)
FOR_VIDEOS = ("evs", "vidcom2", "v-cast", "flashvid", "fewer-frames")


@dataclass(frozen=True)
class Setting:
    """A method with values for its fields.

    Attributes
    ----------
    method : ready to be attached.
    kind : settings that differ in how many tokens stay have the same; from many tokens to few they follow each other.
    label : for people.
    place : in its kind.
    """

    method: Method
    kind: str
    label: str
    place: int


@dataclass(frozen=True)
class Space:
    """Settings that the model can do.

    Attributes
    ----------
    first : that are tried first.
    further : by kind, those in between, for kinds that do well.
    impossible : methods that this model cannot have, and why.
    """

    first: list[Setting]
    further: dict[str, list[Setting]]
    impossible: dict[str, str]


def usual(shipped_for_it: bool, videos: bool) -> tuple[str, ...]:
    """Names of the methods that are tried where nobody says which.

    Parameters
    ----------
    shipped_for_it : whether the weights that come with the package are of this model.
    videos : whether there are any.
    """
    trained = [f"{name}:{which}" for name in ("fovea", "dyvte") for which in shipped(look_up(name)[0])] if shipped_for_it else []
    return (*USUAL, *(FOR_VIDEOS if videos else ()), *trained)


def space_of(parts: Anatomy, names: Sequence[str]) -> Space:
    """What can be tried of some methods on a model.

    Parameters
    ----------
    names : as of ``foveate.get``, ``name:preset`` and ``name:weights`` among them, or files of ``Method.save``.

    Raises
    ------
    InputError : there is no such method, or none of them can act on this model.
    """
    first: list[Setting] = []
    further: dict[str, list[Setting]] = {}
    impossible: dict[str, str] = {}
    for name in dict.fromkeys(names):
        if name.endswith(".json"):
            first.append(Setting(Method.load(name), name, name, 0))
            continue
        for setting, is_first in _settings(name, parts, impossible):
            if is_first:
                first.append(setting)
            else:
                further.setdefault(setting.kind, []).append(setting)
    if not first:
        reasons = "; ".join(f"{name}: {why}" for name, why in impossible.items())
        raise InputError(f"none of the methods can act on this model ({reasons}). Name others with --methods.")
    first += _together(first, parts)
    return Space(first, further, impossible)


def _settings(name: str, parts: Anatomy, impossible: dict[str, str]) -> list[tuple[Setting, bool]]:
    """Settings of a method that the model can have, and whether they are tried first."""
    found = []
    for number, ladder in enumerate(look_up(name)[0].to_tune(SHARES, parts.decoder_layers)):
        for place, fields in enumerate(ladder):
            try:
                method = get(name, **fields).per_image()
                prepare(parts, method)
                _check_cuts(method, parts)
            except (InputError, UnsupportedModelError) as error:
                impossible.setdefault(name, str(error))
                continue
            setting = Setting(method, f"{name}/{number}", label_of(name, fields), place)
            found.append((setting, fields.get("budget") not in FINE))
    if found:
        impossible.pop(name, None)
    return found


def _check_cuts(method: Method, parts: Anatomy) -> None:
    """Raise ``InputError`` where the decoder has no such layers, or the method cannot have the budget in it."""
    method.layer_tokens(MANY, parts.decoder_layers)
    if any(not 0 < layer < parts.decoder_layers for part in method.inside_decoder() for layer in part.cuts(parts.decoder_layers)):
        raise InputError(f"the decoder has {parts.decoder_layers} layers")


def label_of(name: str, fields: dict[str, Any]) -> str:
    """A setting for people, such as "fovea 25 %" or "fastv 40 % layer=2"."""
    budget = fields.get("budget")
    shown = [] if budget is None else [f"{100 * budget:g} %"]
    return " ".join([name, *shown, *(f"{key}={value:g}" for key, value in fields.items() if key != "budget")])


def _together(settings: Sequence[Setting], parts: Anatomy) -> list[Setting]:
    """The first method before the decoder, each time with the first one inside it: its latest cut, where it leaves half or less."""
    fronts = [setting for setting in settings if not setting.method.inside_decoder()]
    cuts = [setting for setting in settings if setting.method.stage == DecoderReducer.stage]
    first = [cut for cut in cuts if cut.kind.partition("/")[0] == cuts[0].kind.partition("/")[0]]
    if not fronts or not first:
        return []
    latest = [cut for cut in first if cut.kind == first[-1].kind]
    cut = latest[min(1, len(latest) - 1)]
    found = []
    for front in (front for front in fronts if front.kind == fronts[0].kind):
        try:
            both = Compose(front.method, cut.method)
            prepare(parts, both)
        except (InputError, UnsupportedModelError):
            return []
        found.append(Setting(both, f"{front.kind}+{cut.kind}", f"{front.label} + {cut.label}", front.place))
    return found
