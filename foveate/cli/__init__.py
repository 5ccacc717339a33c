"""The command line."""

from __future__ import annotations

import logging
import os
import sys

CHATTY = ("torch.utils._pytree", "torchao", "torch.distributed.elastic")  # tell their users what those cannot change


def quiet() -> None:
    """Keep what other libraries say of themselves off the terminal; their errors still come. Users' own settings count."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("foveate").addHandler(logging.NullHandler())  # commands print the warnings of reports themselves


def run() -> None:
    """Entry point of ``foveate``: also while libraries are still being imported, Ctrl-C ends it in one word."""
    quiet()
    try:
        from .main import run as run_command
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    run_command()
