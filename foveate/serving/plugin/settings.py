"""Which method a server reduces with, and how many visual tokens a request keeps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import InputError
from ...methods.base import Method, ProjectorReducer
from ...methods.registry import get
from ...tokens import Budget, resolve_budget

SETTING = "foveate"  # of the model's config
REQUESTED = "foveate_budget"  # of the processor's arguments
HOW = '--hf-overrides \'{"foveate": {"method": "prumerge+", "budget": 144}}\''
GATEWAY = "Use 'foveate serve', which encodes pictures before vLLM counts their tokens."


def method_of(config: Any) -> ProjectorReducer | None:
    """The method that the config of a model asks for in its field ``foveate``: ``method``, ``budget`` and fields of the method.

    Returns
    -------
    None where the config says nothing.

    Raises
    ------
    InputError : no such method, no budget, or a method that needs what is not there inside vLLM.
    """
    given = getattr(config, SETTING, None)
    if given is None:
        return None
    if not isinstance(given, Mapping) or not isinstance(given.get("method"), str):
        raise InputError(f"foveate={given!r} names no method. Start the server with {HOW}.")
    fields = {name: value for name, value in given.items() if name != "method"}
    return _checked(get(given["method"], **fields))


def _checked(method: Method) -> ProjectorReducer:
    front = method.before_decoder()
    reason = ""
    if method.inside_decoder():
        reason = "acts inside the decoder, which is vLLM's own"
    elif not isinstance(front, ProjectorReducer):
        reason = "acts inside the vision encoder, which is vLLM's own"
    elif front.reads_question:
        reason = "reads the question, which vLLM's encoder does not know"
    elif front.joins_encoder:
        reason = "runs tokens of its own through the vision encoder, which is vLLM's own"
    elif type(front).picture is not ProjectorReducer.picture:
        reason = "makes smaller pictures, which vLLM's encoder does not take"
    if reason or not isinstance(front, ProjectorReducer):
        raise InputError(f"{method.name} {reason}. Use a method between encoder and projector, such as 'prumerge+'. {GATEWAY}")
    if front.budget is None:
        raise InputError(
            f"{front.name} without a budget decides how many tokens stay when it sees the image, and vLLM has to know it before. "
            f'Give "budget", an int or a float; 1.0 keeps all tokens of requests that bring no budget of their own. {GATEWAY}'
        )
    if front.positions != "compact":
        raise InputError(f"{front.name}: positions={front.positions!r}; vLLM numbers tokens one after the other. Leave it out.")
    return front


def kept(method: ProjectorReducer | None, requested: Budget, cells: int) -> int | None:
    """Visual tokens to keep of an image of ``cells``.

    Parameters
    ----------
    method : of the server.
    requested : budget of the request; None = that of the server.

    Returns
    -------
    None where the server has no method.

    Raises
    ------
    InputError : the budget is none, or there is no method to keep it.
    """
    if method is None:
        if requested is not None:
            raise InputError(f"{REQUESTED}={requested!r}, and this server has no method to reduce with. Start it with {HOW}.")
        return None
    return resolve_budget(method.budget if requested is None else requested, cells)
