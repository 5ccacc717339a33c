"""``foveate new-method``: a method and its test, both of which work, to begin with."""

from __future__ import annotations

import importlib.util
import keyword
import re
from pathlib import Path
from typing import Annotated

import typer

from .common import out, sayer

EPILOG = "Example:  foveate new-method edges && python -m pytest test_edges.py"
IMPORTED = ("ProjectorReducer", "Reduction", "VisualTokens")  # by the method, so that no class may be called so
PATH, RUN = "from pathlib import Path\n\n", "from foveate.methods.registry import import_file\n"
METHOD = '''"""{title}: say here what it is, and of which paper."""

from __future__ import annotations

from dataclasses import dataclass

from foveate.methods.base import ProjectorReducer
from foveate.tokens import Reduction, VisualTokens, resolve_budget


@dataclass(kw_only=True)
class {cls}(ProjectorReducer, name="{name}", paper="https://arxiv.org/abs/0000.00000", adaptive=False):
    """The tokens with the longest features. Replace this with one sentence on what yours keeps.

    Parameters
    ----------
    power : norm that is taken. Fields are hyper-parameters: they are checked, saved, and set with ``--set power=1``.
    """

    power: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_range(power=1)

    def reduce(self, tokens: VisualTokens) -> Reduction:
        """Row b of a batch must equal the same picture alone: no loop over the batch, and nothing shared by its rows."""
        count = resolve_budget(self.budget, tokens.number) or tokens.number
        scores = tokens.features.float().norm(p=self.power, dim=-1)  # [B, N]
        index = scores.argsort(dim=1, descending=True, stable=True)[:, :count].sort(dim=1).values  # [B, M], in raster order
        return Reduction(index, scores=scores)
'''
TEST = r'''"""{title}, against a slow loop, and on the pocket model. Write the loop from the paper, not from the code."""

from __future__ import annotations

{path}import pytest
import torch
from PIL import Image

import foveate
{run}from foveate.tokens import VisualTokens

{load}TEXT = "<s> user: <image> what color is the star ? assistant:"


def slow(features: torch.Tensor, count: int) -> list[int]:
    """What stays of one picture [N, C]."""
    lengths = [sum(float(value) ** 2 for value in token) for token in features]
    return sorted(sorted(range(len(lengths)), key=lambda place: -lengths[place])[:count])


@pytest.fixture(scope="module")
def pocket():
    return foveate.load_pocket()


def prompt(processor, *pictures):
    return processor(images=list(pictures), text=[TEXT] * len(pictures), return_tensors="pt", padding=True)


def test_it_keeps_what_the_loop_keeps():
    torch.manual_seed(0)
    features = torch.randn(3, 12, 5)
    found = foveate.get("{name}", budget=4).reduce(VisualTokens(features, (3, 4)))
    assert found.index.tolist() == [slow(picture, 4) for picture in features]


def test_all_tokens_leave_the_model_as_it_is(pocket):
    model, processor = pocket
    inputs = prompt(processor, Image.effect_noise((192, 192), 60).convert("RGB"))
    plain = model(**inputs).logits
    with foveate.get("{name}", budget=1.0)(model):
        assert torch.equal(model(**inputs).logits, plain)


def test_a_picture_of_a_batch_is_what_it_is_alone(pocket):
    model, processor = pocket
    first, second = (Image.effect_noise((192, 192), spread).convert("RGB") for spread in (20, 90))
    kept = [
        foveate.Pictures(model, **inputs).reduce("{name}", budget=50).report.images[-1].kept
        for inputs in (prompt(processor, first, second), prompt(processor, second))
    ]
    assert len(kept[0]) == 50
    assert kept[0] == kept[1]


def test_fields_are_checked():
    with pytest.raises(foveate.InputError, match=r"power=0\.5"):
        foveate.get("{name}", budget=4, power=0.5)
'''


def new_method_command(
    name: Annotated[str, typer.Argument(help="Of the method: small letters, digits and hyphens, such as my-edges.")],
    folder: Annotated[
        Path | None,
        typer.Option(help="Where both files go. Default: foveate/methods and tests/methods in a checkout of foveate, else here."),
    ] = None,
) -> None:
    """Write a method and its test, both of which work, to begin with."""
    method, test = write_method(name, folder)
    say = sayer(out)
    say(f"the method: {method}")
    say(f"its test:   {test}")
    inside = folder is None and _in_checkout()
    say(f"run it:     python -m pytest {test}")
    say(f"use it:     foveate ask PICTURE QUESTION{'' if inside else f' --import {method}'} --method {name} --budget 144")


def write_method(name: str, folder: Path | None) -> tuple[Path, Path]:
    """The two files.

    Raises
    ------
    InputError : the name is none, or is taken, or a file is there already.
    """
    from ..errors import FoveateError, InputError, shown
    from ..methods.registry import registered
    from ..places import ready_file, write_text

    module = name.replace("-", "_")
    cls = "".join(part.capitalize() for part in name.split("-"))
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name) or keyword.iskeyword(module):
        raise InputError(f"{shown(name)} is no name of a method. Use small letters, digits and hyphens, such as my-edges.")
    if keyword.iskeyword(cls) or cls in IMPORTED or module == "conftest":
        raise InputError(f"{name!r} means something else, to Python, pytest or the method's file. Choose another name.")
    if name in registered():
        raise InputError(f"there is a method {name!r} already. Choose another name.")
    inside = folder is None and _in_checkout()
    if not inside and importlib.util.find_spec(module) is not None:
        raise InputError(f"{module}.py would hide the Python module {module!r}. Choose another name.")
    here = folder or Path()
    method = Path("foveate/methods", f"{module}.py") if inside else here / f"{module}.py"
    test = Path("tests/methods", f"test_{module}.py") if inside else here / f"test_{module}.py"
    for place in (method, test):
        if ready_file(place).exists():
            raise InputError(f"{place} is there already. Choose another name, or move it away.")
    fields = {"name": name, "title": name, "cls": cls}
    # a file of the package registers itself; any other one has to be run
    path, run, load = ("", "", "") if inside else (PATH, RUN, f'import_file(Path(__file__).with_name("{module}.py"))\n')
    write_text(method, METHOD.format(**fields))
    try:
        write_text(test, TEST.format(**fields, path=path, run=run, load=load))
    except FoveateError:
        method.unlink()  # a method without its test would be in the way next time
        raise
    return method, test


def _in_checkout() -> bool:
    return Path("foveate/methods/base.py").is_file() and Path("tests/methods").is_dir()
