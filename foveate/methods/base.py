"""The contract of a method, and the registry that methods enter by being defined."""

from __future__ import annotations

import dataclasses
import inspect
import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args, get_origin, get_type_hints

from ..errors import InputError
from ..tokens import Budget, EncoderLayer, Reduction, VisualTokens, check_budget

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..engine.session import Session

_KINDS: dict[Any, tuple[str, tuple[type, ...]]] = {
    int: ("a whole number", (Integral,)),
    float: ("a number", (Real,)),
    bool: ("True or False", (bool,)),
}
REGISTRY: dict[str, type[TokenReducer]] = {}


@dataclass(kw_only=True)
class TokenReducer:
    """A method that reduces visual tokens between the vision encoder and the projector.

    A subclass is a dataclass whose fields are its hyper-parameters; it implements ``reduce`` and registers itself by naming
    itself in its class statement: ``class Mine(TokenReducer, name="mine", paper="...")``.

    Parameters
    ----------
    budget : visual tokens kept per image: None = the method's own adaptive rule, an int = a count, a float in (0, 1] = a
        fraction. A budget that covers all tokens leaves the model exactly as it is, for merging methods too.
    positions : "compact" renumbers the shortened prompt, "original" lets kept tokens keep their places.
    """

    name: ClassVar[str] = ""
    stage: ClassVar[str] = "before the projector"
    reference: ClassVar[str] = ""
    adaptive: ClassVar[bool] = True

    budget: Budget = None
    positions: Literal["compact", "original"] = "compact"

    def __init_subclass__(cls, *, name: str = "", paper: str = "", adaptive: bool = True, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not name:
            return
        if name in REGISTRY and REGISTRY[name].__qualname__ != cls.__qualname__:
            raise InputError(f"a method named {name!r} is already registered ({REGISTRY[name].__module__}); choose another name")
        cls.name, cls.reference, cls.adaptive = name, paper, adaptive
        REGISTRY[name] = cls

    def __post_init__(self) -> None:
        check_budget(self.budget)
        if self.budget is not None:
            self.budget = int(self.budget) if isinstance(self.budget, Integral) else float(self.budget)
        if self.budget is None and not self.adaptive:
            raise InputError(f"{self.name!r} has no rule of its own for how many tokens to keep. Give budget=, an int or a float.")
        hints = get_type_hints(type(self))
        for field in dataclasses.fields(self):
            hint, value = hints[field.name], getattr(self, field.name)
            if get_origin(hint) is Literal and value not in get_args(hint):
                raise InputError(f"{self.name}: {field.name}={value!r}; choose one of {', '.join(map(repr, get_args(hint)))}")
            kind, allowed = _KINDS.get(hint, ("", ()))
            if hint in _KINDS and (not isinstance(value, allowed) or isinstance(value, bool) != (hint is bool)):
                raise InputError(f"{self.name}: {field.name}={value!r}; expected {kind}")
            if hint is float and not math.isfinite(value):
                raise InputError(f"{self.name}: {field.name}={value!r}; expected a finite number")

    def encoder_layers(self) -> tuple[EncoderLayer, ...]:
        """Encoder layers whose [CLS] query and keys the method needs: an index, "last", or "aligned" (the layer that made the
        features). Empty: the method needs no [CLS] token.
        """
        return ()

    def reduce(self, tokens: VisualTokens) -> Reduction:
        """Choose and merge. Row b of a batch must equal the same image alone."""
        raise TypeError(f"{type(self).__name__} does not implement reduce(tokens)")

    def __call__(self, model: PreTrainedModel) -> Session:
        """``with method(model) as session:`` applies the method inside the block and restores the model afterwards."""
        from ..engine.session import Session

        return Session(model, self)

    def settings(self) -> dict[str, Any]:
        """Name and fields, JSON-able."""
        return {"name": self.name, **dataclasses.asdict(self)}


def registered() -> dict[str, type[TokenReducer]]:
    """All methods by name."""
    from . import _load_all

    _load_all()
    return dict(sorted(REGISTRY.items()))


def get(name: str, **fields: Any) -> TokenReducer:
    """Build a method by name.

    Parameters
    ----------
    name : as listed by ``foveate.methods()``; ``name:preset`` uses a preset, e.g. ``"prumerge:released"``.
    **fields : hyper-parameters of the method.

    Raises
    ------
    InputError : unknown method, preset or field, or a value out of range.
    """
    known = registered()
    base, _, preset = name.partition(":")
    if base not in known:
        raise InputError(f"unknown method {base!r}; available: {', '.join(known)}")
    cls = known[base]
    if preset and preset not in presets(cls):
        raise InputError(f"{base!r} has no preset {preset!r}; available: {', '.join(presets(cls)) or 'none'}")
    allowed = [field.name for field in dataclasses.fields(cls)]
    unknown = [field for field in fields if field not in allowed]
    if unknown:
        raise InputError(f"{base!r} has no field {unknown[0]!r}; its fields: {', '.join(allowed)}")
    method: TokenReducer = (getattr(cls, preset) if preset else cls)(**fields)
    return method


def presets(cls: type[TokenReducer]) -> tuple[str, ...]:
    """Names of the presets of a method: its class methods ``paper`` and ``released``, where it has them."""
    return tuple(preset for preset in ("paper", "released") if inspect.ismethod(getattr(cls, preset, None)))
