"""``foveate serve --launch`` with a pocket model, as a user starts it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import httpx
import psutil

from foveate.serving.gateway.launch import free_port

ENGINE = "--enforce-eager --max-model-len 1024 --max-num-seqs 16"
PATIENCE = 400  # seconds for a start of vLLM, which takes 20 on a machine that nobody else uses
VLLM = os.environ.get("FOVEATE_TEST_VLLM", sys.executable)  # Python of the environment with the vLLM that is tested


class Stack:
    """A gateway with the vLLM that it has started.

    Parameters
    ----------
    folder : for its log and the export.
    options : further ones of the command line.
    engine : further ones of vLLM.
    """

    def __init__(self, folder: Path, *options: str, engine: str = "") -> None:
        port, arguments = free_port(), f"{ENGINE} {engine}"
        self.url, self.log = f"http://127.0.0.1:{port}", folder / "gateway.log"
        with self.log.open("wb") as written:
            self.process = psutil.Popen(
                [
                    *(sys.executable, "-c", "from foveate.cli.main import run; run()", "serve", "--port", str(port), *options),
                    *("--launch", "--vllm-python", VLLM, "--export", str(folder / "text"), "--vllm-args", arguments),
                ],
                env={**os.environ, "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                stdout=written,
                stderr=written,
            )

    def healthy(self) -> bool:
        """Whether the gateway and vLLM answer."""
        try:
            return httpx.get(f"{self.url}/health", timeout=10).status_code == 200
        except httpx.HTTPError:
            return False

    def wait(self) -> None:
        """Until both do."""
        end = time.monotonic() + PATIENCE
        while not self.healthy():
            assert self.process.poll() is None, self.log.read_text()[-4000:]
            assert time.monotonic() < end, self.log.read_text()[-4000:]
            time.sleep(0.3)

    def engine(self) -> psutil.Process:
        """The process of vLLM."""
        (found,) = self.process.children()
        return found

    def metrics(self) -> dict[str, float]:
        """Of the gateway."""
        lines = httpx.get(f"{self.url}/metrics", timeout=10).text.splitlines()
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if line[:1] != "#"}

    def stop(self) -> None:
        """End it as a user does, or for good."""
        if self.process.poll() is not None:
            return
        everything = [self.process, *self.process.children(recursive=True)]
        self.process.terminate()
        for process in psutil.wait_procs(everything, 40)[1]:
            process.kill()


S = TypeVar("S", bound=Stack)


@contextlib.contextmanager
def running(stack: S) -> Iterator[S]:
    """From the time that it answers on; it is stopped at the end."""
    try:
        stack.wait()
        yield stack
    finally:
        stack.stop()
