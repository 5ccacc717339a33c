"""One file per paper. Importing a file registers its method; nothing else needs to know of it.

Called as a function, ``foveate.methods()``, it is the table of methods.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .registry import MethodInfo


class _Table(ModuleType):
    """A package that is a function of the same name, too."""

    def __call__(self) -> list[MethodInfo]:
        """All methods, by name: what each does, where it acts, what it reads, its paper."""
        from .registry import methods

        return methods()


sys.modules[__name__].__class__ = _Table
