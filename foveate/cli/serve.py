"""``foveate serve``: OpenAI's chat API with fewer visual tokens, answered by vLLM."""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from ..errors import InputError, MissingExtraError
from .common import LOOPBACK, Config, Fields, Imports, PlanFile, asked_of, err, starting

if TYPE_CHECKING:
    from ..serving.encoding import PictureEncoder

SHUTDOWN = 20  # seconds that running requests have once the server is told to end
STALLED = 60  # seconds after which a client is lost that takes none of what it is sent
KEEP_ALIVE = 75  # seconds; longer than proxies and clients keep idle connections, which would use one that is being closed
EPILOG = (
    "Examples:  foveate serve --launch  |  foveate serve --model llava-hf/llava-1.5-7b-hf --launch --vllm-python bin/python  |  "
    "foveate serve --model llava-hf/llava-1.5-7b-hf --vllm-url http://127.0.0.1:8001 --method prumerge+ --budget 144"
)


def serve_command(
    model: Annotated[str, typer.Option(help="Hub id or folder; 'pocket' is the shipped model.")] = "pocket",
    method: Annotated[
        str | None, typer.Option(help="For requests that name none; 'full' keeps all visual tokens. Default: prumerge+.")
    ] = None,
    budget: Annotated[str | None, typer.Option(help="Visual tokens to keep: a count or a fraction. Default: its rule.")] = None,
    fields: Fields = None,
    config: Config = None,
    plan: PlanFile = None,
    imports: Imports = None,
    vllm_url: Annotated[str | None, typer.Option(help="Of a running vLLM that serves the export of the model.")] = None,
    vllm_key: Annotated[str | None, typer.Option(help="API key of that vLLM.", envvar="FOVEATE_VLLM_KEY")] = None,
    launch: Annotated[bool, typer.Option("--launch", help="Export the model if need be, and start vLLM on this machine.")] = False,
    vllm_python: Annotated[str | None, typer.Option(help="Python of the environment that vLLM is in, for --launch.")] = None,
    vllm_args: Annotated[str, typer.Option(help="Further arguments for the launched vLLM, as one text.")] = "",
    export: Annotated[Path | None, typer.Option(help="Folder of the export, for --launch; a cache of the user by default.")] = None,
    host: Annotated[str, typer.Option(help="Interface to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen at.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            help="That clients must give; better by the variable, since others see command lines.", envvar="FOVEATE_API_KEY"
        ),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Of the model, for clients; as --model by default.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Of the encoder and the export; as saved by default.")] = None,
    devices: Annotated[str | None, typer.Option(help="An encoder on each: cuda:0,cuda:1 or cpu,cpu.")] = None,
    batch: Annotated[int, typer.Option("--batch", "--batch-size", min=1, help="Pictures that an encoder takes at once.")] = 16,
    cache_mb: Annotated[int, typer.Option(min=0, help="Encoded pictures that are remembered, in MiB; 0: none.")] = 256,
    allow_host: Annotated[list[str] | None, typer.Option(help="From which pictures may be loaded; may be given again.")] = None,
    max_body_mb: Annotated[int, typer.Option(min=1, help="Largest body of a request, in MiB.")] = 32,
    max_pictures: Annotated[int, typer.Option(min=1, help="Pictures and videos in a request.")] = 8,
    max_pixels: Annotated[int, typer.Option(min=1, help="Pixels of a picture, or of a frame.")] = 25_000_000,
    max_frames: Annotated[int, typer.Option(min=1, help="Frames of a video that are taken.")] = 32,
    max_video_pixels: Annotated[int, typer.Option(min=1, help="Pixels of these together.")] = 100_000_000,
    max_video_seconds: Annotated[float, typer.Option(min=0.1, help="Seconds until a video is read.")] = 20.0,
    max_held_mb: Annotated[int, typer.Option(min=1, help="Bodies, pictures and embeddings of all requests, in MiB.")] = 2048,
    max_decoded_mb: Annotated[int, typer.Option(min=1, help="Pictures that are decoded at a time, in MiB.")] = 1024,
    max_requests: Annotated[int, typer.Option(min=1, help="Requests at once; more are turned away.")] = 256,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds until an answer must be complete.")] = 300.0,
) -> None:
    """OpenAI's chat API with fewer visual tokens: pictures are encoded and reduced here, vLLM reads their embeddings."""
    for variable, key in (("FOVEATE_API_KEY", api_key), ("FOVEATE_VLLM_KEY", vllm_key)):
        if key is None and variable in os.environ:  # which is empty: the command line takes that for none
            raise InputError(f"the variable {variable} is empty. Give it a key, or unset it.")
    if (vllm_url is None) == (not launch):
        raise InputError("give either --vllm-url of a running vLLM, or --launch to start one")
    if launch and vllm_key:
        raise InputError("--vllm-key is of a running vLLM; the launched one gets a key of its own")
    if not launch and (vllm_python or vllm_args or export):
        raise InputError("--vllm-python, --vllm-args and --export are for --launch")
    with starting():
        try:
            import uvicorn

            from ..serving.gateway.app import create_app
        except ImportError as error:
            raise MissingExtraError(error.name or "fastapi", "serve") from error
        from ..serving.export import ready_export
        from ..serving.gateway.gateway import GatewaySettings
        from ..serving.gateway.launch import LaunchError, VllmServer
        from ..serving.gateway.requests import Limits

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    for chatty in ("httpx", "httpcore"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    chosen, share, whole = asked_of(method, budget, fields, config, plan)
    limits = Limits(
        max_body_mb * 2**20,
        pictures=max_pictures,
        pixels=max_pixels,
        frames=max_frames,
        video_pixels=max_video_pixels,
        decoding=max_video_seconds,
        waiting=max_requests,
        seconds=timeout,
        held=max_held_mb * 2**20,
        decoded=max_decoded_mb * 2**20,
    )
    with err.status(escape(f"loading {model}")) as status:
        encoders = _encoders(model, dtype, devices)
        engine = None
        if launch:
            status.update("exporting the language model")
            folder = ready_export(model, export, dtype=dtype)
            engine = VllmServer(folder, python=vllm_python, arguments=shlex.split(vllm_args))
    settings = GatewaySettings(
        name=name or model,
        vllm_url=engine.url if engine else str(vllm_url),
        method=chosen,
        budget=share,
        config=whole,
        vllm_key=engine.key if engine else vllm_key,
        api_key=api_key,
        hosts={each.lower() for each in allow_host or ()},
        batch=batch,
        memory=cache_mb * 2**20,
        limits=limits,
    )
    app = create_app(settings, encoders, engine)
    if engine:
        err.print(f"vLLM starts at {engine.url}, for this gateway only; its log: {engine.log}", soft_wrap=True, markup=False)
    times: dict[str, Any] = {"timeout_keep_alive": KEEP_ALIVE, "timeout_graceful_shutdown": SHUTDOWN}
    # h11 bounds the heads of requests, which uvicorn's other reader of them does not
    how: dict[str, Any] = {"http": "h11", "ws": "none", "log_level": "warning"}
    server = uvicorn.Server(uvicorn.Config(app, host=host, port=port, **how, **times))
    try:
        taken = server.config.bind_socket()  # where that fails, it is before vLLM takes minutes to start
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # of Linux; the connections of a socket have its options
            taken.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, STALLED * 1000)
    except SystemExit:  # it has said why
        raise InputError(f"{host}:{port} cannot be listened at. Give another --port or --host.") from None
    if not api_key and host not in LOOPBACK:
        err.print("there is no key (FOVEATE_API_KEY): whoever reaches this address may ask", soft_wrap=True, markup=False)
    err.print(f"gateway: http://{host}:{taken.getsockname()[1]}/v1  model: {settings.name}", soft_wrap=True, markup=False)
    # what vLLM says of its failure is told without uvicorn's traceback of it
    logging.getLogger("uvicorn.error").addFilter(lambda record: LaunchError.__name__ not in record.getMessage())
    try:
        with contextlib.suppress(KeyboardInterrupt):
            server.run(sockets=[taken])
    except SystemExit:
        if engine and engine.failure:
            raise engine.failure from None
        raise


def _encoders(model: str, dtype: str | None, devices: str | None) -> list[PictureEncoder]:
    """An encoder for each device."""
    from ..loading import load_encoder
    from ..serving.encoding import PictureEncoder

    places = [place.strip() for place in devices.split(",")] if devices else [None]
    first = PictureEncoder(load_encoder(model, dtype=dtype, device=places[0]))
    return [first, *(first.copied(str(place)) for place in places[1:])]
