"""Starts a vLLM for the gateway, on this machine only, and stops it with the gateway."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from ...errors import FoveateError, InputError
from ..export import described
from ..handover import HANDOVERS, PLUGINS

log = logging.getLogger("foveate.serving")
HOST = "127.0.0.1"
PATIENCE = 15.0  # seconds that an engine has to end
DEAF = 5.0  # seconds without an open port after which an engine that had one is taken for lost
STARTED = "-- started by foveate serve"  # a line of the log
CAUSES = 3  # errors of a log that are told
LONGEST_PAUSE = 30.0  # seconds between two starts of an engine that keeps dying


class LaunchError(FoveateError):
    """vLLM does not start; the message has the errors that are in its log, or else its end."""


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as opened:
        opened.bind((HOST, 0))
        return int(opened.getsockname()[1])


class VllmServer:
    """A vLLM server on the loopback interface, with a key of its own; started anew when it dies.

    Parameters
    ----------
    folder : an export of ``foveate export``.
    python : of the environment that vLLM is installed in; None = this one.
    arguments : further ones of vLLM's server.
    patience : seconds until it must answer.

    Attributes
    ----------
    url, key : for the gateway.
    failure : why it did not start, None where it did.

    Raises
    ------
    InputError : the folder is no export, or one without a chat template, or there is no such Python, no vLLM in it, or no plugin
        where vLLM needs it.
    """

    def __init__(self, folder: Path, *, python: str | None = None, arguments: Sequence[str] = (), patience: float = 1800.0) -> None:
        told = described(folder)
        if told.no_chat:
            raise InputError(f"{folder} has no chat template: {told.no_chat}")
        handover = HANDOVERS[told.handover]
        self.python, self.patience = python or sys.executable, patience
        self.port, self.key = free_port(), secrets.token_urlsafe(24)
        self.url = f"http://{HOST}:{self.port}"
        self.command = [
            *(self.python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)),
            *("--host", HOST, "--port", str(self.port), "--dtype", told.dtype),
            *("--chat-template-content-format", "openai", *handover.arguments, *arguments),
        ]
        self.log = Path(tempfile.mkdtemp(prefix="foveate-vllm-")) / "vllm.log"
        self.failure: LaunchError | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._check(handover.plugin)

    def _check(self, plugin: bool) -> None:
        if not self._true("importlib.util.find_spec('vllm')"):
            raise InputError(
                f"vLLM is not installed for {self.python}. Install it there (pip install vllm), name the Python of its environment "
                "with --vllm-python, or start it yourself and give --vllm-url."
            )
        if plugin and not self._true(f"importlib.metadata.entry_points(group='{PLUGINS}', name='foveate')"):
            raise InputError(
                f"foveate is not installed for {self.python}, and for this model vLLM needs its plugin, which says where visual "
                f"tokens stand. Install it there: {self.python} -m pip install foveate."
            )

    def _true(self, what: str) -> bool:
        """Whether an expression is true in the Python of vLLM."""
        looking = f"import importlib.metadata, importlib.util, sys; sys.exit(not {what})"
        try:
            return subprocess.run([self.python, "-c", looking], capture_output=True, check=False).returncode == 0  # noqa: S603
        except OSError as error:
            raise InputError(f"{self.python} cannot be run: {error.strerror}") from error

    async def __aenter__(self) -> VllmServer:
        self._start()
        try:
            await self._until_ready()
        except BaseException as error:
            self.failure = error if isinstance(error, LaunchError) else None
            await self._stop()
            raise
        self._watch = asyncio.create_task(self._watching())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._watch.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._watch
        await self._stop()

    def _start(self) -> None:
        own = {"VLLM_API_KEY": self.key, "VLLM_HOST_IP": HOST}
        with self.log.open("ab") as written:
            written.write(f"{STARTED}\n".encode())
            written.flush()
            self._process = subprocess.Popen(  # noqa: S603
                self.command,
                stdout=written,
                stderr=written,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **own},
                start_new_session=True,
            )
        log.info("vLLM starts at %s; its log is %s", self.url, self.log)

    async def _until_ready(self) -> None:
        import httpx

        end = time.monotonic() + self.patience
        async with httpx.AsyncClient(timeout=2.0, trust_env=False) as client:
            while time.monotonic() < end:
                if self._ended():
                    raise LaunchError(f"vLLM ended while it started. {self.told()}")
                with contextlib.suppress(httpx.HTTPError):
                    if (await client.get(f"{self.url}/health")).status_code == 200:
                        log.info("vLLM is ready")
                        return
                await asyncio.sleep(0.5)
        raise LaunchError(f"vLLM did not answer within {self.patience:g} s. {self.told()}")

    async def _watching(self) -> None:
        """Start vLLM again when it has died or is dying, after pauses that grow while it keeps doing so."""
        pause, heard = 1.0, time.monotonic()
        while True:
            await asyncio.sleep(0.5)
            if not self._ended() and await self._listens():
                heard = time.monotonic()
            if not self._ended() and time.monotonic() - heard < DEAF:
                continue
            what = "died" if self._ended() else "takes no connections any more"
            log.error("vLLM %s; it is started again in %g s. %s", what, pause, self.told())
            await self._stop()  # what it may have left running
            await asyncio.sleep(pause)
            self._start()
            try:
                await self._until_ready()
                pause = 1.0
            except LaunchError as error:
                log.error("%s", error)
                pause = min(2 * pause, LONGEST_PAUSE)
            heard = time.monotonic()

    async def _listens(self) -> bool:
        """Whether its port is open. One that is told to end closes it, and may then wait for requests that are never answered."""
        try:
            _, writer = await asyncio.open_connection(HOST, self.port)
        except OSError:
            return False
        writer.close()
        return True

    def _ended(self) -> bool:
        return self._process is None or self._process.poll() is not None

    async def _stop(self) -> None:
        """End the server and all that it has started."""
        process = self._process
        if process is None:
            return
        for told in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, told)
            end = time.monotonic() + PATIENCE
            while time.monotonic() < end and (process.poll() is None or _alive(process.pid)):
                await asyncio.sleep(0.1)

    def told(self, lines: int = 30) -> str:
        """The first errors since the last start in the log, which led to the others; or else its end."""
        text = self.log.read_text(errors="replace").rpartition(STARTED)[2] if self.log.exists() else ""
        causes = dict.fromkeys(re.findall(r"\b[A-Z]\w*(?:Error|Exception): .+", text))
        if causes:
            return "\n".join([f"Its log {self.log} says:", *list(causes)[:CAUSES]])
        return "\n".join([f"The end of its log {self.log}:", *text.splitlines()[-lines:]])


def _alive(group: int) -> bool:
    """Whether a process group still has members."""
    try:
        os.killpg(group, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True
