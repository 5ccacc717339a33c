"""The contract of a method: what the engine asks of it, and what it may ask of the engine."""

from __future__ import annotations

import copy
import dataclasses
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

from torch import Tensor
from typing_extensions import Self

from ..cuts import Cut, Pattern, PromptTokens
from ..errors import InputError
from ..tokens import BlockTokens, Budget, EncoderLayer, Escort, Reduction, Regroup, VisualTokens, check_budget, resolve_budget
from .budgets import budgeted, shared
from .fields import check_declared, check_fields
from .registry import REGISTRY, UNLISTED
from .saved import Saved
from .tunable import Tunable

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..engine.session import Session
    from .trained import Trained


FirstTokens: TypeAlias = Callable[[int, Tensor], Tensor]  # a decoder layer and states [B, D] -> [B, D]


@dataclass(kw_only=True)
class Method(Saved, Tunable):
    """Base of all methods: a dataclass whose fields are the hyper-parameters.

    A subclass registers itself by the name in its class statement: ``class Mine(ProjectorReducer, name="mine", paper="...")``.
    Most methods derive from ``EncoderReducer``, ``ProjectorReducer`` or ``DecoderReducer``, by the place where they act. One that
    acts in two places derives from this class and names its two parts.

    Parameters
    ----------
    budget : visual tokens to keep of each image. An int is a count, a float in (0, 1] a fraction, None the method's own rule. A
        budget of all tokens leaves the model exactly as it is, also where the method merges.
    positions : "compact" numbers what is left of the prompt anew, "original" keeps the positions of the full prompt.
    """

    name: ClassVar[str] = ""
    stage: ClassVar[str] = ""
    reference: ClassVar[str] = ""
    adaptive: ClassVar[bool] = True
    reconstruction: ClassVar[str] = ""  # what of it no paper or code told; goes into every report
    searched: ClassVar[str] = ""  # the kind of search that finds its setting on a calibration set (foveate.tuning.search)
    found_by_search: ClassVar[str] = ""  # the field that takes the file of such a search
    instead_of_budget: ClassVar[tuple[str, ...]] = ()  # fields that also say how many tokens stay, where they have a value

    budget: Budget = None
    positions: Literal["compact", "original"] = "compact"

    def __init_subclass__(
        cls,
        *,
        name: str = "",
        paper: str = "",
        adaptive: bool = True,
        reconstruction: str = "",
        listed: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init_subclass__(**kwargs)
        if not name:
            cls.name = vars(cls).get("name", cls.__name__)  # never that of its parent, which is another method
            return
        known = {**REGISTRY, **UNLISTED}
        if name in known and known[name].__qualname__ != cls.__qualname__:
            raise InputError(f"a method named {name!r} is already registered ({known[name].__module__}); choose another name")
        cls.name, cls.reference, cls.adaptive, cls.reconstruction = name, paper, adaptive, reconstruction
        (REGISTRY if listed else UNLISTED)[name] = cls

    def __post_init__(self) -> None:
        check_declared(type(self))
        check_budget(self.budget)
        if self.budget is not None:
            self.budget = int(self.budget) if isinstance(self.budget, Integral) else float(self.budget)
        if self.budget is None and self.needs_budget():
            raise InputError(f"{self.name!r} has no rule of its own for how many tokens to keep. Give a budget, an int or a float.")
        check_fields(self)

    def needs_budget(self) -> bool:
        """Whether a budget has to be given, because the method has no rule of its own."""
        return not self.adaptive

    def check_layers(self) -> None:
        """Raise ``InputError`` unless the field ``layers`` is None or holds different layers in ascending order."""
        layers = getattr(self, "layers", None)
        if layers is not None and (not layers or list(layers) != sorted(set(layers))):
            raise InputError(f"{self.name}: layers={layers}; expected different decoder layers in ascending order, such as (2, 8)")

    @property
    def keeps_all(self) -> bool:
        """Whether the budget is all tokens, however many there are."""
        return isinstance(self.budget, float) and self.budget == 1.0

    def covers(self, tokens: int) -> bool:
        """Whether the budget is at least the ``tokens`` of an image. The method then does nothing."""
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

    def first_tokens(self, tokens: int | None = None) -> FirstTokens | None:
        """What a prompt's first token becomes before each decoder layer while a prompt with pictures is read. None = it stays.

        Parameters
        ----------
        tokens : visual tokens of the pictures; None = it is asked for pictures of any size.
        """
        return None

    def trained(self) -> tuple[Trained, ...]:
        """The parts that have weights of their own."""
        return ()

    def __call__(self, model: PreTrainedModel) -> Session:
        """``with method(model) as session:`` applies the method inside the block and restores the model afterwards."""
        import foveate  # whose front door knows the engine; methods do not

        return foveate.Session(model, self)

    # -- the same method with other numbers

    def with_fields(self, **fields: Any) -> Self:
        """A copy with other values of some fields, which are checked. Trained weights are shared with the copy.

        Raises
        ------
        InputError : there is no such field, or a value is out of range.
        """
        known = [field.name for field in dataclasses.fields(self)]
        unknown = next((name for name in fields if name not in known), None)
        if unknown is not None:
            raise InputError(f"{self.name!r} has no field {unknown!r}; its fields: {', '.join(known)}")
        changed = copy.copy(self)
        for name, value in fields.items():
            setattr(changed, name, value)
        changed.__post_init__()
        return changed

    def with_budget(self, budget: Budget) -> Self:
        """A copy with another budget. Other fields that say how many tokens stay get their defaults.

        Raises
        ------
        InputError : the method cannot have this budget.
        """
        others = {field.name: field.default for field in dataclasses.fields(self) if field.name in self.instead_of_budget}
        return self.with_fields(budget=budget, **others)

    def with_share(self, share: float) -> Self:
        """A copy that keeps more the larger ``share`` is, from nothing (0) to everything (1); ``at_budget`` searches over it."""
        return self.with_budget(share)

    def layer_tokens(self, total: int, layers: int) -> list[float] | None:
        """How many visual tokens of a picture each decoder layer runs.

        Parameters
        ----------
        total : visual tokens of the picture before reduction.
        layers : of the decoder.

        Returns
        -------
        One number per layer. None if that depends on the picture.

        Raises
        ------
        InputError : the method cannot act on such a decoder.
        """
        front = self.before_decoder()
        entering = resolve_budget(front.budget, total)
        if entering is None:
            return None
        each: list[float] = [entering] * layers
        for reducer, acts in zip(self.inside_decoder(), self.acting(total), strict=True):
            left = reducer.layer_tokens(entering, layers) if acts else each
            if left is None:
                return None
            each = [min(pair) for pair in zip(each, left, strict=True)]
        return each

    def at_budget(self, tokens: float, total: int, layers: int, at: Literal["mean", "last"] = "mean") -> Self:
        """The method with the budget that makes decoder layers run ``tokens`` visual tokens of a picture.

        Methods count their budgets in different places: what enters the decoder, what is left after a cut, the mean over layers.
        This makes them comparable.

        Parameters
        ----------
        tokens : visual tokens on average over decoder layers, which is what the decoder pays for; or in its last layer.
        total : visual tokens of a picture before reduction.
        layers : of the decoder.
        at : "mean" over layers, or the "last" layer.

        Raises
        ------
        InputError : the method cannot do that. The message says what it can do.
        """
        return budgeted(self, tokens, total, layers, at)

    def at_share(self, share: float, layers: int, at: Literal["mean", "last"] = "mean") -> Self:
        """As ``at_budget``, for pictures of any size: decoder layers run a ``share`` of their visual tokens, in (0, 1]."""
        return shared(self, share, layers, at)

    def repeats(self) -> tuple[Self, ...]:
        """The settings whose results are averaged when the method is measured: the method itself, or several seeds of it."""
        return (self,)

    def per_image(self) -> Self:
        """A copy that decides for each picture alone, where the method could let a picture depend on its batch."""
        return self

    def settings(self) -> dict[str, Any]:
        """Name and fields, JSON-able."""
        return {"name": self.name, **dataclasses.asdict(self)}

    def notes(self) -> list[str]:
        """Remarks for every report of the method."""
        return [f"{self.name}: {self.reconstruction}"] if self.reconstruction else []


@dataclass(kw_only=True)
class FrontReducer(Method):
    """A method, or a part of one, that acts before the decoder.

    Parameters
    ----------
    temporal : for videos. Tokens whose cosine similarity to the same cell of the frame before is above this value are dropped
        first; the method and its budget then see what is left. None = nothing is dropped. Efficient video sampling (arXiv
        2510.14624) compares in the same way, and drops a fixed share of the tokens of a video.
    """

    reads_projected: ClassVar[bool] = False  # asks for the features after the projector, too
    reads_question: ClassVar[bool] = False  # asks for the question
    reads_question_state: ClassVar[bool] = False  # and for what the decoder makes of it alone, at the price of that pass
    reads_cls: ClassVar[bool] = False  # scores by the [CLS] token of the encoder, where it has one
    without_cls: ClassVar[str] = "the mean attention that each token receives stands for that of [CLS]"
    whole_video: ClassVar[bool] = False  # decides over all frames of a video at once; else over each frame by itself
    joins_encoder: ClassVar[bool] = False  # runs tokens of its own through the encoder, beside the patches

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
        """The encoder layers, of ``depth`` ones, whose queries and keys the method reads; empty if it reads none.

        Each is an index, "last", or "aligned" (the layer that makes the features).
        """
        return ()


@dataclass(kw_only=True)
class ProjectorReducer(FrontReducer):
    """A method that reduces visual tokens between the vision encoder and the projector; it implements ``reduce``."""

    stage: ClassVar[str] = "before the projector"

    def picture(self, grid: tuple[int, int]) -> tuple[int, int] | None:
        """Rows and columns of a smaller picture to encode instead. None = the picture stays, and ``reduce`` is called."""
        return None

    def reduce(self, tokens: VisualTokens) -> Reduction:
        """Choose which tokens stay, and merge. Row b of a batch must equal the same image alone."""
        raise TypeError(f"{type(self).__name__} does not implement reduce(tokens)")


TokenReducer = ProjectorReducer  # its name before version 1


@dataclass(kw_only=True)
class KeepAll(ProjectorReducer, name="full", listed=False):
    """Keeps every visual token: the model stays as it is, and the report says what that costs."""

    budget: Budget = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.keeps_all:
            raise InputError(f"method {self.name!r} keeps all visual tokens and takes no budget")


@dataclass(kw_only=True)
class EncoderReducer(FrontReducer):
    """A method that reduces patches inside the blocks of the vision encoder, between attention and MLP.

    It implements ``plan`` and ``shrink``. [CLS] always stays and does not count as a patch.

    Parameters
    ----------
    order : order of the tokens for the decoder: "raster", by their cells, or "encoder", as the encoder left them.
    """

    stage: ClassVar[str] = "inside the vision encoder"
    escorts: ClassVar[bool] = False  # one more token runs along, and is the last that the decoder gets of a picture
    order: Literal["raster", "encoder"] = "raster"

    def plan(self, depth: int, patches: int) -> dict[int, int]:
        """The blocks to act in, of the ``depth`` ones that make the features, each with the most patches it may leave."""
        raise TypeError(f"{type(self).__name__} does not implement plan(depth, patches)")

    def counts_sizes(self) -> bool:
        """Whether attention weighs a token by the number of patches it stands for (proportional attention of ToMe)."""
        return False

    def escort(self, token: Escort) -> Tensor:
        """[B, C] what the token that runs along becomes before a layer, where the method ``escorts``."""
        raise TypeError(f"{type(self).__name__} does not implement escort(token)")

    def shrink(self, tokens: BlockTokens) -> Regroup:
        """Leave ``tokens.goal`` patches or fewer. Row b of a batch must equal the same image alone."""
        raise TypeError(f"{type(self).__name__} does not implement shrink(tokens)")


@dataclass(kw_only=True)
class DecoderReducer(Method):
    """A method that drops visual tokens between decoder layers while the prompt is read. It implements ``cuts`` and ``cut``.

    Layers before the first cut run and cache all tokens; layer 0 always does.
    """

    stage: ClassVar[str] = "inside the decoder"
    trains: ClassVar[bool] = False  # gradients run through ``hidden``, queries and keys into what ``cut`` mixes
    reads: ClassVar[Literal["previous", "own", "nothing"]] = "previous"  # whose queries and keys ``cut`` gets
    removes_text: ClassVar[bool] = False  # only then may ``cut`` leave out text, and never the protected one

    positions: Literal["compact", "original"] = "original"

    def before_decoder(self) -> FrontReducer:
        return KeepAll()

    def inside_decoder(self) -> tuple[DecoderReducer, ...]:
        return (self,)

    def layer_tokens(self, total: int, layers: int) -> list[float] | None:
        return [total] * layers if self.covers(total) else self.left(total, layers)

    def left(self, total: int, layers: int) -> list[float] | None:
        """What ``layer_tokens`` returns for a budget below all tokens."""
        return None

    def cuts(self, layers: int) -> tuple[int, ...]:
        """The decoder layers before which the method acts, each at least 1 and below ``layers``."""
        raise TypeError(f"{type(self).__name__} does not implement cuts(layers)")

    def pattern(self, layers: int) -> Pattern | None:
        """Which parts of the computation are left out for visual tokens; None = none."""
        return None

    def cut(self, tokens: PromptTokens) -> Cut:
        """Choose which tokens stay before layer ``tokens.layer``. Row b of a batch must equal the same prompt alone."""
        raise TypeError(f"{type(self).__name__} does not implement cut(tokens)")


def __getattr__(name: str) -> Any:
    """What was in this file before version 1."""
    if name in ("Compose", "get", "presets", "registered", "REGISTRY"):
        import foveate

        return getattr(foveate if name == "Compose" else importlib.import_module("foveate.methods.registry"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
