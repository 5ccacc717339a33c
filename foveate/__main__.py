"""``python -m foveate`` is the command line."""

from .cli.main import run

run()
