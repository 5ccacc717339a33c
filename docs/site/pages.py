"""Run by mkdocs-gen-files: pages that are made of docstrings, results, notebooks and files of the repository."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import mkdocs_gen_files

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import cards  # noqa: E402
import leaderboard  # noqa: E402
import links  # noqa: E402
import models  # noqa: E402
import reference  # noqa: E402


def write(page: str, text: str) -> None:
    with mkdocs_gen_files.open(page, "w") as file:
        file.write(text)


def from_notebook(path: Path) -> str:
    """A notebook as a page: its texts and its code."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    parts = []
    for cell in cells:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
    where = f"{links.REPOSITORY}/docs/notebooks/{path.name}"
    return "\n\n".join([parts[0], f"[The notebook itself]({where}) runs as it is, on one core.", *parts[1:]]) + "\n"


for place in cards.PAGES:
    write(f"papers/{place}.md", cards.cards_page(place))
for slug in models.PAGES:
    write(f"models/{slug}.md", models.model_page(slug))
write("leaderboard.md", leaderboard.leaderboard())
for group in reference.GROUPS:
    write(f"api/{group}.md", reference.reference_page(group))
write("api/cli.md", reference.commands_page())
for notebook in sorted((HERE.parent / "notebooks").glob("*.ipynb")):
    write(f"notebooks/{notebook.stem}.md", from_notebook(notebook))
for source, page in links.PAGES.items():
    if page != "index.md":
        text = (links.ROOT / source).read_text(encoding="utf-8")
        write(page, links.rewritten(text, page, source))
