"""A hook of mkdocs: links of a page to files beside the documentation, which the site does not hold.

A page that is made of such a file is linked; any other file leads to the repository, if it is there at all.
"""

from __future__ import annotations

import logging
import posixpath
import re
from pathlib import Path
from typing import Any

REPOSITORY = "https://github.com/foveate/foveate/blob/main"
ROOT = Path(__file__).parent.parent.parent
LINK = re.compile(r"\]\((?!https?:|#|mailto:)([^)#\s]+)(#[^)\s]*)?\)")
PAGES = {  # files of the repository that are pages here
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "foveate/pocket/README.md": "models/pocket.md",
    "foveate/pocket/native/README.md": "models/pocket-qwen.md",
    "README.md": "index.md",
}
log = logging.getLogger("mkdocs.plugins.links")


def rewritten(text: str, page: str, source: str | None = None) -> str:
    """The text of a page with its links set.

    Parameters
    ----------
    text, page : Markdown, and where it lies in the documentation, such as "results/comparison.md".
    source : the file of the repository that the page is made of, from which its links lead on; None = the page itself.
    """
    folder = posixpath.dirname(source or f"docs/{page}")

    def set_link(found: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, found[1]))
        anchor = found[2] or ""
        if target in PAGES:
            return f"]({posixpath.relpath(PAGES[target], posixpath.dirname(page) or '.')}{anchor})"
        if target.startswith("docs/"):
            inside = target.removeprefix("docs/").replace(".ipynb", ".md")
            return f"]({posixpath.relpath(inside, posixpath.dirname(page) or '.')}{anchor})"
        if not (ROOT / target).exists():
            log.warning("%s links to %s, which is not there", page, target)
        return f"]({REPOSITORY}/{target}{anchor})"

    return LINK.sub(set_link, text)


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Called by mkdocs for each page; pages that were made for the site have their links set already."""
    return rewritten(markdown, page.file.src_uri)
