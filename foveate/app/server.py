"""The playground and its rules: who may ask, by which name, how much, and that nobody names a file or an address."""

from __future__ import annotations

import base64
import binascii
import hmac
import json
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from .blocks import build
from .cards import STYLE
from .comparison import Playground

JSON_BYTES = 2**20  # of a request that is no upload
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; frame-ancestors 'none'"
)
HEADERS = (
    (b"content-security-policy", POLICY.encode()),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
)
UPLOAD = "/gradio_api/upload"
DIRECT = ("/gradio_api/call/", "/gradio_api/run/", "/gradio_api/api/")  # where programs call functions by name; the page queues
QUEUE = "/gradio_api/queue/join"
FORM = 2**16  # bytes of a form beside its file
Asgi = Any  # an application, or one of its arguments


class Guard:
    """Refuses requests before Gradio sees them.

    Parameters
    ----------
    app : what is asked next.
    key : that must be given as the password of HTTP basic authentication, with any user name, or as a bearer token; None = none.
    hosts : names by which the server may be asked, so that pages of other sites cannot; empty = any.
    uploads : folder that uploaded files are in.
    upload : bytes of a file, at most.
    functions : numbers of the page's functions; None = any may be asked for.
    """

    def __init__(
        self,
        app: Asgi,
        key: str | None,
        hosts: Collection[str],
        uploads: Path,
        upload: int = 2**20,
        functions: Collection[int] | None = None,
    ) -> None:
        self.app, self.key, self.hosts, self.uploads = app, key, frozenset(hosts), uploads.resolve()
        self.upload, self.functions = upload, functions

    async def __call__(self, scope: Asgi, receive: Asgi, send: Asgi) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        if self.hosts and _host(headers.get("host", "")) not in self.hosts:
            await _refuse(send, 421, "this server is asked by another name than its own. Open the address that it printed.")
            return
        if self.key is not None and not self._has_key(headers.get("authorization", "")):
            await _refuse(send, 401, "give the key as the password; any user name will do.")
            return
        if scope["method"] == "POST" and scope["path"] == UPLOAD:
            length = headers.get("content-length", "")
            if not length.isdecimal() or int(length) > self.upload + FORM:  # one file at a time, however many parts the form has
                await _refuse(send, 413, f"the file is too large: at most {self.upload // 2**20} MiB are taken.")
                return
        elif scope["method"] == "POST":
            body = await _body(receive)
            problem = (413, "the request is too large") if body is None else self._problem(scope["path"], body)
            if problem:
                await _refuse(send, *problem)
                return
            if scope["path"].startswith(DIRECT):  # all functions are private, and Gradio fails at names that it does not know
                await _refuse(send, 404, "there is nothing to call here: this page is for people.")
                return
            receive = _again(body or b"", receive)

        async def with_headers(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], *HEADERS]}
            await send(message)

        await self.app(scope, receive, with_headers)

    def _has_key(self, authorization: str) -> bool:
        kind, _, value = authorization.partition(" ")
        given = value
        if kind.lower() == "basic":
            try:
                given = base64.b64decode(value, validate=True).decode().partition(":")[2]
            except (binascii.Error, UnicodeDecodeError):
                return False
        return kind.lower() in ("basic", "bearer") and hmac.compare_digest(given.encode(), (self.key or "").encode())

    def _problem(self, place: str, body: bytes) -> tuple[int, str] | None:
        """Why a request is refused, if it is: what it names as a file must have been uploaded here, and what it calls be there."""
        try:
            document = json.loads(body) if body.strip() else None
        except (ValueError, RecursionError):
            return 400, "the request is no JSON"
        for path in _paths(document):
            if not isinstance(path, str) or "://" in path or not self._uploaded(path):
                return 400, "no paths and no addresses are taken: upload the file."
        called = document.get("fn_index") if isinstance(document, dict) else None
        if place == QUEUE and self.functions is not None and not (isinstance(called, int) and called in self.functions):
            return 404, "there is no such function on this page: load it again."
        return None

    def _uploaded(self, path: str) -> bool:
        try:
            return self.uploads in Path(path).resolve().parents
        except (OSError, ValueError):
            return False


def _paths(document: Any) -> Iterator[Any]:
    """All that a request names as the path of a file."""
    left = [document]
    while left:
        each = left.pop()
        if isinstance(each, dict):
            yield from (each[name] for name in ("path", "file") if each.get(name) is not None)
            left += each.values()
        elif isinstance(each, list):
            left += each


def _host(value: str) -> str:
    """The name in a header of a host, without its port."""
    name = value.strip().lower()
    return name[1:].partition("]")[0] if name.startswith("[") else name.partition(":")[0]


async def _body(receive: Asgi) -> bytes | None:
    """All of a body; None where it is too large, or its sender has gone."""
    found = bytearray()
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        found += message.get("body", b"")
        if len(found) > JSON_BYTES:
            return None
        if not message.get("more_body"):
            return bytes(found)


def _again(body: bytes, receive: Asgi) -> Asgi:
    """Receives a body that has been read, once."""
    given = False

    async def call() -> dict[str, Any]:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return call


async def _refuse(send: Asgi, status: int, why: str) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8"), *HEADERS]
    if status == 401:
        headers.append((b"www-authenticate", b'Basic realm="foveate", charset="UTF-8"'))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": why.encode()})


def create_app(playground: Playground, uploads: Path, *, hosts: Collection[str], key: str | None, upload_mb: int) -> Guard:
    """The page and its rules as an ASGI application.

    Parameters
    ----------
    playground : the models.
    uploads : a folder for uploaded files.
    hosts : names by which the page may be asked; empty = any.
    key : of those who may ask, or None.
    upload_mb : largest file, in MiB.
    """
    import gradio as gr

    os.environ |= {"GRADIO_TEMP_DIR": str(uploads), "GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}
    blocks = build(playground)
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])  # the reader's own
    outer = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    look: dict[str, Any] = {"theme": theme, "css": STYLE, "footer_links": []}
    off: dict[str, Any] = {"ssr_mode": False, "pwa": False, "mcp_server": False, "run_history": False}
    gr.mount_gradio_app(outer, blocks, "/", max_file_size=upload_mb * 2**20, **look, **off)
    blocks.has_launched = True  # only then does Gradio itself check where files are
    return Guard(outer, key, hosts, uploads, upload_mb * 2**20, frozenset(blocks.fns))
