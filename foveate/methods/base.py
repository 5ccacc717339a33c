"""The contract of a method, and the registry that methods enter by being defined."""

from __future__ import annotations

import dataclasses
import inspect
import math
import types
from dataclasses import dataclass
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

from ..cuts import Cut, Pattern, PromptTokens
from ..errors import InputError
from ..tokens import BlockTokens, Budget, EncoderLayer, Merge, Reduction, VisualTokens, check_budget

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..engine.session import Session

_KINDS: dict[Any, tuple[str, tuple[type, ...]]] = {
    int: ("a whole number", (Integral,)),
    float: ("a number", (Real,)),
    bool: ("True or False", (bool,)),
}
REGISTRY: dict[str, type[Method]] = {}


def _unwrapped(hint: Any, value: Any) -> Any:
    """``X`` where a field is ``X | None`` and has a value; anything for None."""
    if get_origin(hint) in (Union, types.UnionType) and type(None) in get_args(hint):
        kinds = [kind for kind in get_args(hint) if kind is not type(None)]
        return Any if value is None or len(kinds) > 1 else kinds[0]
    return hint


@dataclass(kw_only=True)
class Method:
    """What every method is: a dataclass whose fields are its hyper-parameters.

    A subclass registers itself by naming itself in its class statement: ``class Mine(TokenReducer, name="mine", paper="...")``.
    Most derive from ``EncoderReducer``, ``TokenReducer`` or ``DecoderReducer``, by the place where they act; one that acts in two
    places derives from this class and says what it is made of.

    Parameters
    ----------
    budget : visual tokens kept per image: None = the method's own adaptive rule, an int = a count, a float in (0, 1] = a
        fraction. A budget that covers all tokens leaves the model exactly as it is, for merging methods too.
    positions : "compact" renumbers what is left of the prompt, "original" lets kept tokens keep their places.
    """

    name: ClassVar[str] = ""
    stage: ClassVar[str] = ""
    reference: ClassVar[str] = ""
    adaptive: ClassVar[bool] = True
    reconstruction: ClassVar[str] = ""  # what of it no paper or code told; goes into every report

    budget: Budget = None
    positions: Literal["compact", "original"] = "compact"

    def __init_subclass__(
        cls, *, name: str = "", paper: str = "", adaptive: bool = True, reconstruction: str = "", **kwargs: Any
    ) -> None:
        super().__init_subclass__(**kwargs)
        if not name:
            return
        if name in REGISTRY and REGISTRY[name].__qualname__ != cls.__qualname__:
            raise InputError(f"a method named {name!r} is already registered ({REGISTRY[name].__module__}); choose another name")
        cls.name, cls.reference, cls.adaptive, cls.reconstruction = name, paper, adaptive, reconstruction
        REGISTRY[name] = cls

    def __post_init__(self) -> None:
        check_budget(self.budget)
        if self.budget is not None:
            self.budget = int(self.budget) if isinstance(self.budget, Integral) else float(self.budget)
        if self.budget is None and self.needs_budget():
            raise InputError(f"{self.name!r} has no rule of its own for how many tokens to keep. Give budget=, an int or a float.")
        hints = get_type_hints(type(self))
        for field in dataclasses.fields(self):
            hint, value = _unwrapped(hints[field.name], getattr(self, field.name)), getattr(self, field.name)
            if get_origin(hint) is tuple and get_args(hint)[-1:] == (...,):
                self._check_tuple(field.name, value, get_args(hint)[0])
            if get_origin(hint) is Literal and value not in get_args(hint):
                raise InputError(f"{self.name}: {field.name}={value!r}; choose one of {', '.join(map(repr, get_args(hint)))}")
            kind, allowed = _KINDS.get(hint, ("", ()))
            if hint in _KINDS and (not isinstance(value, allowed) or isinstance(value, bool) != (hint is bool)):
                raise InputError(f"{self.name}: {field.name}={value!r}; expected {kind}")
            if hint is float and not math.isfinite(value):
                raise InputError(f"{self.name}: {field.name}={value!r}; expected a finite number")

    def _check_tuple(self, field: str, value: Any, element: Any) -> None:
        kind, allowed = _KINDS.get(element, ("", (object,)))
        if not isinstance(value, list | tuple) or any(not isinstance(each, allowed) or isinstance(each, bool) for each in value):
            raise InputError(f"{self.name}: {field}={value!r}; expected several of {kind or element}, such as (2, 8)")
        setattr(self, field, tuple(value))

    def needs_budget(self) -> bool:
        """Whether there is no rule for how many tokens to keep."""
        return not self.adaptive

    def check_layers(self) -> None:
        """Raise ``InputError`` unless the field ``layers`` is None or holds different layers in ascending order."""
        layers = getattr(self, "layers", None)
        if layers is not None and (not layers or list(layers) != sorted(set(layers))):
            raise InputError(f"{self.name}: layers={layers}; expected different decoder layers in ascending order, such as (2, 8)")

    @property
    def keeps_all(self) -> bool:
        """Whether the budget asks for everything, however much that is."""
        return isinstance(self.budget, float) and self.budget == 1.0

    def covers(self, tokens: int) -> bool:
        """Whether the budget asks for all ``tokens`` of an image: the model then stays as it is."""
        if isinstance(self.budget, int):
            return self.budget >= tokens
        return self.keeps_all

    def acting(self, tokens: int) -> list[bool]:
        """For each part of ``inside_decoder()`` whether it acts on images of ``tokens`` visual tokens."""
        return [not self.covers(tokens) and not reducer.covers(tokens) for reducer in self.inside_decoder()]

    def check_range(self, **least: float) -> None:
        """Raise ``InputError`` where a field is below the given value."""
        for field, bound in least.items():
            if getattr(self, field) < bound:
                raise InputError(f"{self.name}: {field}={getattr(self, field)}; it must be at least {bound}")

    def before_decoder(self) -> FrontReducer:
        """What acts in the vision encoder, or between it and the projector."""
        raise TypeError(f"{type(self).__name__} does not implement before_decoder()")

    def inside_decoder(self) -> tuple[DecoderReducer, ...]:
        """What acts between decoder layers."""
        return ()

    def __call__(self, model: PreTrainedModel) -> Session:
        """``with method(model) as session:`` applies the method inside the block and restores the model afterwards."""
        from ..engine.session import Session

        return Session(model, self)

    def settings(self) -> dict[str, Any]:
        """Name and fields, JSON-able."""
        return {"name": self.name, **dataclasses.asdict(self)}

    def notes(self) -> list[str]:
        """What every report of the method has to say."""
        return [f"{self.name}: {self.reconstruction}"] if self.reconstruction else []


@dataclass(kw_only=True)
class FrontReducer(Method):
    """What reduces visual tokens before the decoder sees any.

    Parameters
    ----------
    temporal : in videos, tokens are dropped whose cosine similarity with the same place of the frame before is higher; the method
        and its budget see what is left. None = none are. After efficient video sampling (arXiv 2510.14624), which compares pixels
        and drops a fixed share of them.
    """

    reads_projected: ClassVar[bool] = False  # asks for the features behind the projector, too
    reads_question: ClassVar[bool] = False  # asks for the question
    reads_cls: ClassVar[bool] = False  # scores by the [CLS] token of the encoder, where it has one
    without_cls: ClassVar[str] = "the mean attention that each token receives stands for that of [CLS]"

    temporal: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temporal is not None and not -1 <= self.temporal <= 1:
            raise InputError(f"{self.name}: temporal={self.temporal}; expected a cosine similarity, such as 0.9")

    def before_decoder(self) -> FrontReducer:
        return self

    def text_encoder(self) -> str | None:
        """Hub id or folder of the CLIP model whose text encoder reads the question; None = the decoder's input embeddings."""
        return None

    def encoder_layers(self, depth: int) -> tuple[EncoderLayer, ...]:
        """Layers of an encoder of ``depth`` layers whose queries and keys the method needs: an index, "last", or "aligned"
        (the layer that made the features). Empty: the method reads no attention.
        """
        return ()


@dataclass(kw_only=True)
class TokenReducer(FrontReducer):
    """A method that reduces visual tokens between the vision encoder and the projector; it implements ``reduce``."""

    stage: ClassVar[str] = "before the projector"

    def picture(self, grid: tuple[int, int]) -> tuple[int, int] | None:
        """The grid of a smaller picture to encode instead of one of ``grid``; None = the picture stays, and ``reduce`` is asked."""
        return None

    def reduce(self, tokens: VisualTokens) -> Reduction:
        """Choose and merge. Row b of a batch must equal the same image alone."""
        raise TypeError(f"{type(self).__name__} does not implement reduce(tokens)")


@dataclass(kw_only=True)
class EncoderReducer(FrontReducer):
    """A method that reduces patches inside the blocks of the vision encoder, between attention and MLP; it implements ``plan`` and
    ``shrink``. [CLS] always stays, and is none of the patches.

    Parameters
    ----------
    order : in which the decoder gets what is left: "raster", by the place of each token, or as the "encoder" left it.
    """

    stage: ClassVar[str] = "inside the vision encoder"
    order: Literal["raster", "encoder"] = "raster"

    def plan(self, depth: int, patches: int) -> dict[int, int]:
        """The blocks to act in, of the ``depth`` ones that make the features, and how many patches each leaves, at most."""
        raise TypeError(f"{type(self).__name__} does not implement plan(depth, patches)")

    def check_per_block(self, field: str, least: int) -> tuple[int, ...]:
        """The numbers of a field that holds one for all blocks, or one for each; raise ``InputError`` if they are none."""
        value = getattr(self, field)
        self._check_tuple(field, (value,) if isinstance(value, Integral) else value, int)
        found: tuple[int, ...] = getattr(self, field)
        if any(number < least for number in found):
            raise InputError(f"{self.name}: {field}={found}; each must be at least {least}")
        if self.budget is not None and found:
            raise InputError(f"{self.name}: budget={self.budget} and {field}={found}; give one of them")
        return found

    def for_each_block(self, field: str, numbers: tuple[int, ...], blocks: list[int]) -> tuple[int, ...]:
        """One number for each of ``blocks``; raise ``InputError`` if there are others."""
        if len(numbers) not in (1, len(blocks)):
            raise InputError(f"{self.name}: {field} has {len(numbers)} numbers; expected one, or {len(blocks)}, one for each block")
        return numbers * len(blocks) if len(numbers) == 1 else numbers

    def counts_sizes(self) -> bool:
        """Whether later blocks attend to a token as often as it has patches (proportional attention of ToMe)."""
        return False

    def shrink(self, tokens: BlockTokens) -> Merge:
        """Choose and merge, to ``tokens.goal`` patches at most. Row b of a batch must equal the same image alone."""
        raise TypeError(f"{type(self).__name__} does not implement shrink(tokens)")


@dataclass(kw_only=True)
class DecoderReducer(Method):
    """A method that drops visual tokens between decoder layers, while the prompt is read; it implements ``cuts`` and ``cut``.

    Layers before the first cut see all tokens, and their caches hold all of them. Decoder layer 0 always does.
    """

    stage: ClassVar[str] = "inside the decoder"
    reads: ClassVar[Literal["previous", "own", "nothing"]] = "previous"  # whose queries and keys ``cut`` gets
    removes_text: ClassVar[bool] = False  # only then may ``cut`` leave out text, and never the protected one

    positions: Literal["compact", "original"] = "original"

    def before_decoder(self) -> FrontReducer:
        return TokenReducer(budget=1.0)

    def inside_decoder(self) -> tuple[DecoderReducer, ...]:
        return (self,)

    def cuts(self, layers: int) -> tuple[int, ...]:
        """The decoder layers, of ``layers``, before which the method acts; from 1 on."""
        raise TypeError(f"{type(self).__name__} does not implement cuts(layers)")

    def pattern(self, layers: int) -> Pattern | None:
        """What the layers leave out of the computation of visual tokens; None = nothing."""
        return None

    def cut(self, tokens: PromptTokens) -> Cut:
        """What stays before layer ``tokens.layer``. Row b of a batch must equal the same prompt alone."""
        raise TypeError(f"{type(self).__name__} does not implement cut(tokens)")


@dataclass(kw_only=True)
class Compose(Method):
    """Several methods together: at most one token reducer, and decoder reducers at different layers.

    ``Compose(PruMergePlus(), FastV(budget=0.5))``: budgets of decoder reducers count what the token reducer left.
    """

    name: ClassVar[str] = "compose"
    stage: ClassVar[str] = "before the projector and inside the decoder"

    methods: tuple[Method, ...] = ()

    def __init__(self, *methods: Method) -> None:
        wrong = [method for method in methods if not isinstance(method, Method)]
        if not methods or wrong:
            raise InputError(f"Compose takes methods, such as foveate.PruMergePlus(), and got {wrong or 'none'}")
        fronts = [method.before_decoder() for method in methods]
        fronts = [front for front in fronts if type(front) is not TokenReducer]
        if len(fronts) > 1:
            names = " and ".join(front.name for front in fronts)
            raise InputError(f"{names} both act before the decoder; Compose takes one method there")
        self.methods, self._front = methods, fronts[0] if fronts else TokenReducer(budget=1.0)
        self.budget, self.positions = None, self._front.positions

    def before_decoder(self) -> FrontReducer:
        return self._front

    def inside_decoder(self) -> tuple[DecoderReducer, ...]:
        return tuple(reducer for method in self.methods for reducer in method.inside_decoder())

    def acting(self, tokens: int) -> list[bool]:
        return [acts for method in self.methods for acts in method.acting(tokens)]

    def settings(self) -> dict[str, Any]:
        return {"name": self.name, "methods": [method.settings() for method in self.methods]}

    def notes(self) -> list[str]:
        return [note for method in self.methods for note in method.notes()]


def registered() -> dict[str, type[Method]]:
    """All methods by name."""
    from . import _load_all

    _load_all()
    return dict(sorted(REGISTRY.items()))


def get(name: str, **fields: Any) -> Method:
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
    method: Method = (getattr(cls, preset) if preset else cls)(**fields)
    return method


def presets(cls: type[Method]) -> tuple[str, ...]:
    """Names of the presets of a method: its class methods ``paper`` and ``released``, where it has them."""
    return tuple(preset for preset in ("paper", "released") if inspect.ismethod(getattr(cls, preset, None)))
