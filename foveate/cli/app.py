"""``foveate app``: the playground in the browser."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from ..errors import InputError, MissingExtraError
from .common import LOOPBACK, Imports, err, starting

SHIPPED = ("pocket", "pocket-qwen")
SHUTDOWN = 3  # seconds that running questions have once the server is told to end
EPILOG = (
    "Examples:  foveate app  |  foveate app --model llava-hf/llava-1.5-7b-hf  |  "
    "FOVEATE_API_KEY=... foveate app --host 0.0.0.0 --port 7860"
)


def app_command(
    model: Annotated[
        list[str] | None,
        typer.Option(help="Hub id or folder; may be given again. Default: both pocket models."),
    ] = None,
    imports: Imports = None,
    host: Annotated[str, typer.Option(help="Interface to listen at; others than this machine's own need a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen at; 0 takes a free one.")] = 7860,
    api_key: Annotated[
        str | None,
        typer.Option(
            help="That browsers must give as the password; better by the variable, since others see command lines.",
            envvar="FOVEATE_API_KEY",
        ),
    ] = None,
    max_upload_mb: Annotated[int, typer.Option(min=1, help="Largest file that is taken, in MiB.")] = 20,
) -> None:
    """A page in the browser: one question, answered with all visual tokens and with up to three methods, side by side."""
    if api_key == "":
        raise InputError("--api-key is empty. Give it a key, or leave it out.")
    if api_key is None and "FOVEATE_API_KEY" in os.environ:  # which is empty: the command line takes that for none
        raise InputError("the variable FOVEATE_API_KEY is empty. Give it a key, or unset it.")
    if not api_key and host not in LOOPBACK:
        raise InputError(f"--host {host} lets others ask, and there is no key. Set the variable FOVEATE_API_KEY.")
    with starting():
        try:
            import gradio  # noqa: F401
            import uvicorn
        except ImportError as error:
            raise MissingExtraError(error.name or "gradio", "app") from error
        from ..app.comparison import Playground
        from ..app.server import create_app

    names = [*dict.fromkeys(model or SHIPPED)]
    with tempfile.TemporaryDirectory(prefix="foveate-app-") as uploads:
        with err.status(escape(f"loading {', '.join(names)}")):
            own = LOOPBACK if host in LOOPBACK else ()
            app = create_app(Playground(names), Path(uploads), hosts=own, key=api_key, upload_mb=max_upload_mb)
        # h11 bounds the heads of requests; pages keep a connection open, for which the end does not wait
        how: dict[str, Any] = {"http": "h11", "ws": "none", "log_level": "warning", "timeout_graceful_shutdown": SHUTDOWN}
        server = uvicorn.Server(uvicorn.Config(app, host=host, port=port, **how))
        try:
            taken = server.config.bind_socket()
        except SystemExit:  # it has said why
            raise InputError(f"{host}:{port} cannot be listened at. Give another --port or --host.") from None
        shown = f"[{host}]" if ":" in host else host
        err.print(f"playground: http://{shown}:{taken.getsockname()[1]}/  Ctrl-C ends it.", soft_wrap=True, markup=False)
        server.run(sockets=[taken])
