"""``foveate export``: the language model of a vision-language model, for vLLM."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from .common import Config, Fields, PlanFile, err, method_of, out, starting
from .document import JsonFile, ready_json, tell

if TYPE_CHECKING:
    from ..methods.base import Method
    from ..serving.export import Exported

EPILOG = "Example:  foveate export llava-hf/llava-1.5-7b-hf llava-1.5-7b-text"


def export_command(
    model: Annotated[str, typer.Argument(help="Hub id or folder; 'pocket' is the shipped model.")],
    folder: Annotated[Path, typer.Argument(help="The folder to write.")],
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; as saved by default.")] = None,
    method: Annotated[str | None, typer.Option(help="A method with weights of its own, which are exported, too.")] = None,
    fields: Fields = None,
    config: Config = None,
    plan: PlanFile = None,
    json_file: JsonFile = None,
) -> None:
    """Write the language model of a vision-language model as a folder that vLLM serves, with pictures as embeddings."""
    from ..errors import InputError

    with starting():
        from ..serving.export import export

    if json_file is not None and folder.resolve() in json_file.resolve().parents:
        raise InputError(f"--json {json_file} is inside the export, whose files are its own. Choose another place.")
    ready_json(json_file, reads=[method, config, plan])
    chosen = None if method is None and config is None and plan is None else method_of(method, None, fields, config, plan)
    if chosen is None and fields:
        raise InputError("--set belongs to --method. Name one.")
    with err.status(escape(f"exporting {model}")):
        told = export(model, folder, dtype=dtype, method=chosen)
    tell(asdict(told), json_file, lambda: show(told, model, folder, chosen, plan))


def show(told: Exported, model: str, folder: Path, chosen: Method | None, plan: Path | None) -> None:
    """Print what was written, and how it is served."""
    from ..serving.export import METHOD
    from ..serving.handover import HANDOVERS

    chats = f"{told.conversations} conversations give its tokens" if not told.no_chat else f"no chat template: {told.no_chat}"
    served = f"--dtype {told.dtype} --chat-template-content-format openai --host 127.0.0.1 --port 8001"
    out.print(
        f"{told.architecture}, {told.parameters / 1e6:,.1f} million parameters, {told.dtype}, in {folder}\n"
        f"logits differ by {told.logit_difference:.2g} from the model's own; {chats}\n"
        f"serve it:  vllm serve {folder} {shlex.join(HANDOVERS[told.handover].arguments)} {served}",
        markup=False,
        soft_wrap=True,
    )
    if plan is not None:
        gateway = f"foveate serve --model {model} --plan {plan} --vllm-url http://127.0.0.1:8001"
        out.print(f"with its plan:  {gateway}", markup=False, soft_wrap=True)
    elif chosen is not None:
        gateway = (
            f"foveate serve --model {model} --method {chosen.name} --set weights={folder / METHOD} --vllm-url http://127.0.0.1:8001"
        )
        out.print(f"with its method:  {gateway}", markup=False, soft_wrap=True)
