"""``python -m foveate`` is the command line."""

from .cli import run

run()
