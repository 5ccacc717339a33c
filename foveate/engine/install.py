"""What is put on a model while a method is attached: a few attributes of the instance, nothing on its class or its modules."""

from __future__ import annotations

import copy
import functools
import types
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel
from typing_extensions import Self

from ..errors import UnsupportedModelError
from .generation import merged_with_callbacks
from .model.anatomy import innermost
from .model.seams import MERGE_CALLBACKS, REPLICATE, WRAPPED_FORWARD

if TYPE_CHECKING:
    from .session import Session

_ATTRIBUTE = "_foveate"


class Installation:
    """``generate`` and ``forward`` of one model, shared by nested sessions; the innermost one acts.

    Attributes of the instance, because ``forward`` is also called without the module's hooks (by PEFT up to 0.20), and because
    copies of the model get their own.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model: Any = model
        self.sessions: list[Session] = []
        self.previous: dict[str, Any] = {}
        self.ours: dict[str, Any] = {}
        forward = WRAPPED_FORWARD if WRAPPED_FORWARD in model.__dict__ else "forward"
        self._forward = forward
        for name in ("generate", forward, MERGE_CALLBACKS, REPLICATE):
            self.previous[name] = model.__dict__.pop(name, None)
        model.__dict__[_ATTRIBUTE] = self
        self._redirect()  # after the line above: what is pickled is read in this order

    def _redirect(self) -> None:
        for name in self.previous:
            self.ours[name] = self.model.__dict__[name] = _redirected(self.model, name)

    def __getstate__(self) -> dict[str, Any]:
        """A pickle finds methods by their names, and the names mean the class's own in a model that is not read yet."""
        return {name: value for name, value in vars(self).items() if name != "ours"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, ours={})
        self._redirect()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        made = memo[id(self)] = type(self).__new__(type(self))
        vars(made).update(copy.deepcopy(vars(self), memo))
        return made

    def remove(self) -> None:
        del self.model.__dict__[_ATTRIBUTE]
        for name, before in self.previous.items():
            if self.model.__dict__.get(name) is not self.ours[name]:  # somebody has put something else there since
                continue
            if before is None:
                del self.model.__dict__[name]
            else:
                self.model.__dict__[name] = before

    def replaced(self) -> bool:
        """Whether somebody has put another ``forward`` in the place of ours."""
        return self.model.__dict__.get(self._forward) is not self.ours[self._forward]

    def original(self, name: str) -> Any:
        """The method as it was."""
        before = self.previous[name]
        return functools.partial(getattr(type(self.model), name), self.model) if before is None else before


def installed_on(model: Any) -> Installation | None:
    """What is on a model, None if no method is attached."""
    found: Installation | None = model.__dict__.get(_ATTRIBUTE)
    return found


def detach(model: Any) -> None:
    """Detach whatever is attached to a model; nothing is attached to most models, and nothing happens then."""
    installed = installed_on(innermost(model))
    while installed is not None and installed.sessions:
        installed.sessions[-1].detach()


def _redirected(model: PreTrainedModel, name: str) -> types.MethodType:
    """A method of the model that asks the innermost session; without one, it is the class's own."""
    of_class = getattr(type(model), "forward" if name == WRAPPED_FORWARD else name)

    @functools.wraps(of_class)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        installed = getattr(self, _ATTRIBUTE, None)
        if installed is None or installed.ours.get(name) is None or installed.ours[name].__func__ is not call:
            return of_class(self, *args, **kwargs)  # kept by somebody from the time when a method was attached
        original = installed.original(name)
        if name == "generate":
            return installed.sessions[-1].generate(original, args, kwargs)
        if name == MERGE_CALLBACKS:
            return merged_with_callbacks(original, *args, **kwargs)
        if name == REPLICATE:
            raise UnsupportedModelError(
                "nn.DataParallel copies the model on every call; use DistributedDataParallel or accelerate."
            )
        return installed.sessions[-1].forward(original, args, kwargs)

    return types.MethodType(call, model)
