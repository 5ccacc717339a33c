"""``foveate``: the command line. Each command imports what it needs when it runs."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from typer import Abort

from . import app as playground
from . import (
    ask,
    batch,
    bench,
    compare,
    cost,
    demo,
    env,
    export,
    figure,
    law,
    methods,
    models,
    new_method,
    search,
    serve,
    show,
    train,
    tune,
)
from . import eval as evaluation
from .common import err, out, resumes
from .document import Command

app = typer.Typer(
    name="foveate",
    help="Fewer visual tokens for vision-language models.",
    epilog="Examples:  foveate demo  |  foveate ask foveate-demo/scene-1-plain.png 'what color is the star ?' --compare",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
)
INTERRUPTED = 130
_state = {"debug": False}


def _version(wanted: bool) -> None:
    if wanted:
        from .. import __version__

        out.print(f"foveate {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Fewer visual tokens for vision-language models: faster prefill, smaller caches, the same answers where it works."""
    _state["debug"] = debug


app.command("demo", cls=Command, epilog=demo.EPILOG)(demo.demo_command)
app.command("ask", cls=Command, epilog=ask.EPILOG)(ask.ask_command)
app.command("app", cls=Command, epilog=playground.EPILOG)(playground.app_command)
app.command("show", cls=Command, epilog=show.EPILOG)(show.show_command)
app.command("methods", cls=Command, epilog=methods.EPILOG)(methods.methods_command)
app.command("search", cls=Command, epilog=search.EPILOG)(search.search_command)
app.command("compare", cls=Command, epilog=compare.EPILOG)(compare.compare_command)
app.command("cost", cls=Command, epilog=cost.EPILOG)(cost.cost_command)
app.command("figure", cls=Command, epilog=figure.EPILOG)(figure.figure_command)
app.command("law", cls=Command, epilog=law.EPILOG)(law.law_command)
app.command("bench", cls=Command, epilog=bench.EPILOG)(bench.bench_command)
app.command("eval", cls=Command, epilog=evaluation.EPILOG)(evaluation.eval_command)
app.command("models", cls=Command, epilog=models.EPILOG)(models.models_command)
app.command("export", cls=Command, epilog=export.EPILOG)(export.export_command)
app.command("serve", cls=Command, epilog=serve.EPILOG)(serve.serve_command)
app.command("batch", cls=Command, epilog=batch.EPILOG)(batch.batch_command)
app.command("train", cls=Command, epilog=train.EPILOG)(train.train_command)
app.command("tune", cls=Command, epilog=tune.EPILOG)(tune.tune_command)
app.command("new-method", cls=Command, epilog=new_method.EPILOG)(new_method.new_method_command)
app.command("env", cls=Command, epilog=env.EPILOG)(env.env_command)


def run() -> None:
    """Entry point: errors are one or two lines on stderr; the exit code is 2 for bad input and 1 for what nobody expected."""
    from ..errors import FoveateError

    code = 1
    if hasattr(sys.stdout, "reconfigure"):  # what it cannot write, as bytes of file names that are no text, becomes an escape
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = app(standalone_mode=False) or 0
    except (KeyboardInterrupt, Abort):
        code = INTERRUPTED
    except Exception as error:
        if _state["debug"]:
            raise
        if isinstance(error, FoveateError):
            message, code = str(error), 2
        elif hasattr(error, "format_message"):  # of the command line itself; typer brings its own click or uses the installed one
            message, code = error.format_message(), getattr(error, "exit_code", 2)
            context = getattr(error, "ctx", None)
            asked = "foveate" if context is None else context.command_path
            message = message if "Usage:" in message or not message else f"{message} ({asked} --help shows how)"
        elif isinstance(error, OSError):
            message, code = f"{error.filename or 'a file'}: {error.strerror or error}. Make room, or choose another place.", 2
        else:
            where = "foveate --debug with the same command shows where"
            message = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')} ({where})"
        if message:  # without a command, the help has been shown
            err.print(message if "Usage:" in message else f"error: {message}", style="red", markup=False, soft_wrap=True)
    if code == INTERRUPTED:  # typer makes it of Ctrl-C, too
        err.print(f"interrupted{resumes()}", style="yellow", markup=False, soft_wrap=True)
    sys.exit(code)


if __name__ == "__main__":
    run()
