"""The pages of the reference: every public name once, and the command line."""

from __future__ import annotations

import inspect
from typing import Any

import foveate

GROUPS = {
    "front": ("The front door", "What most programs need."),
    "methods": ("Methods", "What each does, needs and gains is on the pages of the papers, in the tab *The papers*."),
    "contracts": (
        "To write a method",
        "The base classes, what they see and what they return ([how to](../contributing.md#adding-a-method)).",
    ),
    "errors": ("Errors", "All derive from `FoveateError`. Each says what was wrong, what was expected, and what to do."),
}
ALIASES = {"TokenReducer": "ProjectorReducer", "Merge": "Regroup"}  # older names
BASES = ("Method", "FrontReducer", "ProjectorReducer", "EncoderReducer", "DecoderReducer", "PixelReducer", "Trained", "ModelShape")


def group_of(name: str) -> str:
    """The page of a public name."""
    value, home = getattr(foveate, name), foveate._HOME[name]
    if home == "errors":
        return "errors"
    if name in (*BASES, *ALIASES) or home in ("tokens", "cuts"):
        return "contracts"
    listed = inspect.isclass(value) and issubclass(value, foveate.Method)
    return "methods" if listed else "front"


def reference_page(group: str) -> str:
    """A page of the reference, which mkdocstrings fills."""
    title, about = GROUPS[group]
    names = [name for name in foveate.__all__ if group_of(name) == group]
    lines = [f"# {title}", "", about, ""]
    for name in sorted(names, key=lambda name: (name not in BASES, name[0].isupper(), name.lower())):
        if name in ALIASES:
            lines += [f"## `{name}`", "", f"The older name of [`{ALIASES[name]}`][foveate.{_path(ALIASES[name])}].", ""]
        else:
            lines += [f"::: foveate.{_path(name)}", *_options(getattr(foveate, name)), ""]
    return "\n".join(lines)


def _path(name: str) -> str:
    """Where a public name is defined, below the package."""
    return f"{foveate._HOME[name]}.{name}"


def _options(value: Any) -> list[str]:
    """Methods say all in their docstring: their members are the contract, which has a page of its own."""
    is_method = inspect.isclass(value) and issubclass(value, foveate.Method) and value.__name__ not in BASES
    return ["    options:", "      members: [paper, released]"] if is_method else []


def commands_page() -> str:
    """The options of all commands, as their ``--help`` tells them."""
    from typer.cli import get_docs_for_click
    from typer.main import get_command

    from foveate.cli.main import app

    command = get_command(app)
    context = command.context_class(command, info_name="foveate")
    return str(get_docs_for_click(obj=command, ctx=context, name="foveate", title="The command line"))
