"""docs/security.md says the limits that the code has."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest

from foveate import errors, heads
from foveate.cli import serve
from foveate.serving import pictures
from foveate.serving.gateway import gateway
from foveate.serving.gateway.limits import Limits

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "security.md").read_text()
ROWS = [
    (set_by, default) for _, set_by, default, _ in re.findall(r"^\| (.+?) \| `([^`]+)` \| (.+?) \| (.+?) \|$", PAGE, re.MULTILINE)
]
FIELDS = {
    "--max-body-mb": "body_bytes",
    "--max-pictures": "pictures",
    "--max-pixels": "pixels",
    "--max-frames": "frames",
    "--max-video-pixels": "video_pixels",
    "--max-video-seconds": "decoding",
    "--max-requests": "waiting",
    "--max-held-mb": "held",
    "--max-decoded-mb": "decoded",
    "--timeout": "seconds",
}
CONSTANTS = {
    **{"STALLED": serve.STALLED, "SHUTDOWN": serve.SHUTDOWN, "SHOWN": errors.SHOWN, "CHECKED": gateway.CHECKED},
    **{"PIECES": heads.PIECES, "SCANS": heads.SCANS, "NUMBERS": heads.NUMBERS, "TILE": heads.TILE},
}


def options() -> dict[str, Any]:
    given = inspect.signature(serve.serve_command).parameters
    return {f"--{name.replace('_', '-')}": parameter.default for name, parameter in given.items()}


@pytest.mark.parametrize(("set_by", "default"), ROWS)
def test_defaults_are_those_of_the_code(set_by: str, default: str) -> None:
    number = float(default.split()[0])
    if set_by.startswith("--"):
        assert options()[set_by] == number
    elif set_by in CONSTANTS:
        assert number == CONSTANTS[set_by]
    else:
        assert getattr(Limits(), set_by.removeprefix("Limits.")) == number


def test_all_limits_are_told() -> None:
    told = {FIELDS.get(set_by, set_by.removeprefix("Limits.")) for set_by, _ in ROWS}
    assert told >= set(vars(Limits()))
    assert told >= {*CONSTANTS, "--cache-mb"}


@pytest.mark.parametrize("option", FIELDS)
def test_options_have_the_defaults_of_the_limits(option: str) -> None:
    factor = 2**20 if option.endswith("-mb") else 1
    assert options()[option] * factor == getattr(Limits(), FIELDS[option])


def test_what_opening_a_picture_takes() -> None:
    told = re.search(r"(\d+) bytes a pixel, (\d+) with transparency, (\d+) with more", PAGE)
    assert told
    assert tuple(map(int, told.groups())) == (pictures.PLAIN, pictures.CLEAR, pictures.DEEP)


def test_it_is_found() -> None:
    assert "docs/security.md" in (ROOT / "README.md").read_text()
    for page in ("serving.md", "batch.md"):
        assert "security.md" in (ROOT / "docs" / page).read_text()
