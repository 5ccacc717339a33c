"""Modules that have moved: their old names are still found, with a ``DeprecationWarning``; ``python -m`` works, too."""

from __future__ import annotations

import importlib
import sys
import types
import warnings
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import Any

_ROOMS = {
    "foveate": {"search": "tuning.search"},
    "foveate.methods": {
        **{name: f"methods.tools.{name}" for name in ("scoring", "selection", "merging", "inflection", "schedule")},
        "shrinking": "methods.tools.plans",
    },
    "foveate.engine": {"families": "families"},
    "foveate.evaluation": {"loading": "loading", "ledger": "fingerprint"},
    "foveate.pocket": {
        "comparison": "lab.compare",
        "evaluate": "lab.evaluate",
        "inside": "lab.studies.inside",
        "merging": "lab.studies.merging",
        "store": "lab.store",
        "tuned": "lab.studies.tuned",
    },
    "foveate.serving": {
        **{name: f"serving.gateway.{name}" for name in ("app", "upstream", "launch")},
        **{name: f"serving.batch.{name}" for name in ("rows", "results", "offline", "engines", "vllm_engine", "ray_batch")},
    },
}
MOVED = {f"{room}.{old}": f"foveate.{new}" for room, names in _ROOMS.items() for old, new in names.items()}


class _Finder(MetaPathFinder, Loader):
    """Gives the module at its new place to whoever imports it by its old name."""

    def __init__(self) -> None:
        self._specs: dict[str, ModuleSpec | None] = {}

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in MOVED else None

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        new = MOVED[spec.name]
        warnings.warn(f"{spec.name} is {new} now; the old name goes in version 2", DeprecationWarning, stacklevel=2)
        module = importlib.import_module(new)
        self._specs[spec.name] = module.__spec__
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        if module.__spec__ is not None:  # import has put the old name there
            module.__spec__ = self._specs.pop(module.__spec__.name)

    def get_code(self, fullname: str) -> types.CodeType:
        """What ``python -m`` of the old name runs."""
        said = f"python -m {fullname} is python -m {MOVED[fullname]} now; the old name goes in version 2"
        warnings.warn(said, FutureWarning, stacklevel=2)  # which everybody sees
        lines = ("import runpy", f"runpy.run_module({MOVED[fullname]!r}, run_name='__main__', alter_sys=True)")
        return compile("\n".join(lines), fullname, "exec")


def install() -> None:
    """Let old names be found."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
