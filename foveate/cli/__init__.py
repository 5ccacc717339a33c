"""The command line."""

from __future__ import annotations

import sys


def run() -> None:
    """Entry point of ``foveate``: also while libraries are still being imported, Ctrl-C ends it in one word."""
    try:
        from .main import run as run_command
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    run_command()
