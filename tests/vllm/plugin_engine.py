"""Starts vLLM with the plugin in a process of its own, for several checks at once, and compares it with transformers."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
ENVIRONMENT = dict(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    OMP_NUM_THREADS="1",
    VLLM_NO_USAGE_STATS="1",
    VLLM_HOST_IP="127.0.0.1",
    VLLM_LOGGING_LEVEL="WARNING",
    HF_HUB_OFFLINE="1",
    PYTHONPATH=os.pathsep.join(map(str, (ROOT, ROOT / "tests/vllm/shim", Path(sys.prefix) / "torchvision"))),
)
TOLERANCE = 1e-4
NEW = 8

Row = tuple[list[int], list[dict[int, float]]]  # of a prompt: tokens that followed, and log-probabilities of some tokens at each


def run(module: str, folder: Path) -> dict[str, str]:
    """What became of each check of a module: "" where it passed, else where it failed."""
    found = folder / "checks.json"
    done = subprocess.run(
        [sys.executable, "-m", module, str(folder)],
        cwd=ROOT,
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
    )
    assert found.exists(), f"{done.stdout[-4000:]}\n{done.stderr[-8000:]}"
    return json.loads(found.read_text())


class Checks:
    """Runs checks and writes down what became of them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.found = folder, dict[str, str]()

    def __call__(self, name: str, check: Callable[[], None]) -> None:
        begin = time.perf_counter()
        try:
            check()
            self.found[name] = ""
        except (Exception, pytest.fail.Exception):
            self.found[name] = traceback.format_exc()
        print(f"{name}: {time.perf_counter() - begin:.1f} s", file=sys.stderr)
        (self.folder / "checks.json").write_text(json.dumps(self.found))


def engine(folder: Path, **options: Any) -> Any:
    """A vLLM that computes in float32."""
    from vllm import LLM

    settings = dict(dtype="float32", max_model_len=2048, max_num_seqs=16, max_num_batched_tokens=4096, enforce_eager=True)
    return LLM(str(folder), **(settings | dict(limit_mm_per_prompt={"image": 4}, disable_log_stats=True) | options))


def stop(llm: Any) -> None:
    """Give its memory back, for the next one in this process."""
    from vllm.distributed import cleanup_dist_env_and_memory

    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()


def answers(llm: Any, prompts: Sequence[dict[str, Any]]) -> list[Row]:
    """What vLLM says to prompts in one batch."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=NEW, logprobs=5, ignore_eos=True, detokenize=False)
    found = []
    for result in llm.generate(list(prompts), sampling, use_tqdm=False):
        output = result.outputs[0]
        found.append((list(output.token_ids), [{i: one.logprob for i, one in step.items()} for step in output.logprobs]))
    return found


@torch.no_grad()
def reference(model: Any, inputs: dict[str, Any]) -> Row:
    """What transformers says to one prompt."""
    ids = inputs["input_ids"]
    made = model.generate(
        **inputs, max_new_tokens=NEW, do_sample=False, output_logits=True, return_dict_in_generate=True, eos_token_id=None
    )
    logs = torch.stack(made.logits)[:, 0].float().log_softmax(-1)
    return made.sequences[0, ids.shape[1] :].tolist(), [dict(enumerate(step)) for step in logs.tolist()]


def same(found: Sequence[Row], expected: Sequence[Row], tolerance: float = TOLERANCE) -> float:
    """The largest difference of log-probabilities; raises where tokens differ, or by more than ``tolerance``."""
    worst = 0.0
    for number, ((tokens, logs), (true, all_logs)) in enumerate(zip(found, expected, strict=True)):
        assert tokens == true, f"prompt {number}: {tokens}, expected {true}"
        assert len(tokens) == NEW
        for step, reference_step in zip(logs, all_logs, strict=True):
            worst = max(worst, *(abs(log - reference_step[token]) for token, log in step.items() if token in reference_step))
    assert worst <= tolerance, f"log-probabilities differ by {worst:.2e}"
    print(f"{len(found)} prompts: log-probabilities differ by {worst:.1e} at most", file=sys.stderr)
    return worst
