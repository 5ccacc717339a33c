"""Several methods together, each in its place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from typing_extensions import Self

from ..errors import InputError
from ..tokens import Budget
from .base import DecoderReducer, FirstTokens, FrontReducer, KeepAll, Method

if TYPE_CHECKING:
    from .trained import Trained


@dataclass(kw_only=True)
class Compose(Method, name="compose", listed=False):
    """Several methods together: at most one that acts before the decoder, and any number inside it, at different layers.

    In ``Compose(PruMergePlus(), FastV(budget=0.5))`` the budget of FastV counts what PruMerge+ has left.
    """

    stage: ClassVar[str] = "before the projector and inside the decoder"

    methods: tuple[Method, ...] = ()

    def __init__(self, *methods: Method, **fields: Any) -> None:
        if fields:
            raise InputError(f"a composition has no field {next(iter(fields))!r} of its own. Give it to one of its methods.")
        wrong = [method for method in methods if not isinstance(method, Method)]
        if not methods or wrong:
            raise InputError(f"Compose takes methods, such as foveate.PruMergePlus(), and got {wrong or 'none'}")
        fronts = [method.before_decoder() for method in methods]
        fronts = [front for front in fronts if not isinstance(front, KeepAll)]
        if len(fronts) > 1:
            names = " and ".join(front.name for front in fronts)
            raise InputError(f"{names} both act before the decoder; Compose takes one method there")
        self.methods, self._front = methods, fronts[0] if fronts else KeepAll()
        self.budget, self.positions = None, self._front.positions

    def before_decoder(self) -> FrontReducer:
        return self._front

    def inside_decoder(self) -> tuple[DecoderReducer, ...]:
        return tuple(reducer for method in self.methods for reducer in method.inside_decoder())

    def first_tokens(self, tokens: int | None = None) -> FirstTokens | None:
        found = [change for method in self.methods if (change := method.first_tokens(tokens)) is not None]
        return found[0] if found else None

    def trained(self) -> tuple[Trained, ...]:
        return tuple(part for method in self.methods for part in method.trained())

    def acting(self, tokens: int) -> list[bool]:
        return [acts for method in self.methods for acts in method.acting(tokens)]

    def settings(self) -> dict[str, Any]:
        return {"name": self.name, "methods": [method.settings() for method in self.methods]}

    def described(self) -> dict[str, Any]:
        return {"method": self.name, "methods": [method.described() for method in self.methods]}

    @classmethod
    def joined(cls, methods: list[Method]) -> Method:
        return cls(*methods)

    def notes(self) -> list[str]:
        return [note for method in self.methods for note in method.notes()]

    def with_fields(self, **fields: Any) -> Self:
        raise InputError(f"a composition has no field {next(iter(fields), '')!r} of its own; build its methods anew")

    def with_budget(self, budget: Budget) -> Self:
        """The same methods, with a budget for the one before the decoder, or else for the first one inside it."""
        return self._changed(lambda method: method.with_budget(budget))

    def with_share(self, share: float) -> Self:
        return self._changed(lambda method: method.with_share(share))

    def _changed(self, change: Callable[[Method], Method]) -> Self:
        before = [not isinstance(method.before_decoder(), KeepAll) for method in self.methods]
        chosen = before.index(True) if any(before) else 0
        changed = type(self)(*(change(method) if i == chosen else method for i, method in enumerate(self.methods)))
        changed.made_for = self.made_for
        return changed

    def per_image(self) -> Self:
        found = type(self)(*(method.per_image() for method in self.methods))
        found.made_for = self.made_for
        return found
