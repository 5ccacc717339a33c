"""Docstrings as mkdocstrings reads them: ours say ``name : what it is`` on one line, and their Returns are sentences."""

from __future__ import annotations

import inspect
import re
from typing import Any

import griffe

SECTION = re.compile(r"^(Parameters|Attributes|Raises|Returns|Yields)\n-+\n", re.MULTILINE)
ENTRY = re.compile(r"^(\*{0,2}[\w`., *]+?) : (.*)$")


def numpydoc(text: str, returns: str = "") -> str:
    """The same docstring in numpydoc's own form: what an entry is stands on the lines below its name.

    Parameters
    ----------
    text : a docstring without indentation.
    returns : the annotation of what is returned; Returns are left as they are without one.
    """
    parts = SECTION.split(text)
    done = [parts[0]]
    for title, body in zip(parts[1::2], parts[2::2], strict=True):
        done.append(f"{title}\n{'-' * len(title)}\n")
        done.append(_sentences(body, returns) if title in ("Returns", "Yields") else _entries(body))
    return "".join(done)


def _entries(body: str) -> str:
    lines = []
    for line in body.splitlines():
        found = ENTRY.match(line)
        lines += [found[1], f"    {found[2]}"] if found else [line]
    return "\n".join(lines) + "\n"


def _sentences(body: str, returns: str) -> str:
    if not returns:
        return body
    lines = "\n".join(f"    {line}" for line in body.strip().splitlines())
    return f"{returns}\n{lines}\n\n"


class OurDocstrings(griffe.Extension):
    """Rewrites each docstring when it is read."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called by griffe for each object."""
        if obj.docstring:
            returns = str(getattr(obj, "returns", "") or "")
            obj.docstring.value = numpydoc(inspect.cleandoc(obj.docstring.value), returns)
