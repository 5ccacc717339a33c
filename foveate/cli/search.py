"""``foveate search``: settings of methods that need a calibration set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from .common import POCKET, Imports, err, out, sayer, starting

EPILOG = "Example:  foveate search plan.json  |  foveate search heads.json --method yopo --share 0.5"


def search_command(
    plan: Annotated[Path, typer.Argument(help="The JSON file to write: plan= of g-search, heads= of yopo.")],
    method: Annotated[str, typer.Option(help="g-search, p-sigmoid or yopo.")] = "g-search",
    imports: Imports = None,
    model: Annotated[str, typer.Option(help="Hub id, folder, pocket or pocket-qwen.")] = POCKET,
    data: Annotated[
        Path | None, typer.Option(help='JSON lines such as {"image": "a.jpg", "question": "...", "answer": "..."}.')
    ] = None,
    examples: Annotated[int, typer.Option(min=1, help="How many of them; the paper uses a few hundred.")] = 200,
    epsilon: Annotated[float, typer.Option(min=0, help="g-search: accuracy that may be lost.")] = 0.002,
    steps: Annotated[int, typer.Option(min=1, help="g-search: keep rates are multiples of 1 / steps.")] = 16,
    budget: Annotated[float, typer.Option(min=0, max=1, help="p-sigmoid: mean keep rate over layers.")] = 0.5,
    share: Annotated[float, typer.Option(min=0, max=1, help="yopo: share of the heads that stay.")] = 0.5,
) -> None:
    """Search keep rates per decoder layer, or a head mask, on a calibration set."""
    from ..errors import InputError

    with starting():
        from ..loading import SPREAD, load
        from ..places import ready_files, write_text
        from ..tuning.calibration import Calibration
        from ..tuning.search import search_of

    search = search_of(method)
    if share <= 0:
        raise InputError(f"share={share}; expected a share of the heads above 0")
    ready_files(plan, reads=[data])
    if data is None and not model.startswith(POCKET):
        raise InputError("a model of your own is searched on data of your own: give --data, a JSON-lines file of examples")
    given = {"epsilon": epsilon, "steps": steps, "budget": budget, "share": share}
    with err.status(escape(f"loading {model}")) as status:
        loaded = load(model, device=SPREAD)
        made = Calibration.of_scenes(loaded, examples) if data is None else Calibration.of_file(loaded, data, examples)
        status.update("searching")
        options = {name: given[name] for name in search.options}
        document, found = search.run(made, options, lambda line: err.print(line, style="dim", markup=False))
    sayer(out)(found)
    write_text(plan, json.dumps({"method": method, **document}, indent=1) + "\n")
    sayer(err)(f"plan: {plan}")
