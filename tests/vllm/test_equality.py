"""T9: vLLM writes what transformers writes from the same kept tokens, and its log-probabilities are the same to 1e-4."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from foveate.chat import Prompt, collate
from foveate.evaluation.pocket import picture, questions
from foveate.loading import load_encoder
from foveate.pocket import load_pocket
from foveate.serving.encoding import PictureEncoder, method_of, pictures_of
from foveate.serving.export import export

from .stack import VLLM

SCRIPT = Path(__file__).with_name("embeds_engine.py")
NEW = 5  # an answer and what comes behind its end; farther behind, rounding in 32 bits grows beyond 1e-4 on either side
# counts from 1 to 576 in one batch; several pictures; a method that reads the question, and one inside the encoder
ASKED = [
    ("prumerge+", None, 1),
    ("prumerge", None, 1),
    ("spatial", 1, 1),
    ("prumerge+", 144, 2),
    ("full", None, 1),
    ("cdpruner", 40, 1),
    ("tome", 0.25, 1),
    ("divprune", 17, 3),
]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("equality") / "lm"
    export("pocket", folder)
    return folder


def conversations() -> list[list[dict[str, Any]]]:
    documents = questions("pocket_vqav2", 12, 2403)
    found = []
    for number, (_, _, pictures) in enumerate(ASKED):
        mine = documents[number : number + pictures]
        shown = [{"type": "image", "image": picture(document)[0]} for document in mine]
        found.append([{"role": "user", "content": [*shown, {"type": "text", "text": mine[0]["question"]}]}])
    return found


@pytest.fixture(scope="module")
def prompts() -> list[dict[str, Any]]:
    """Prompts for vLLM: pictures encoded without a decoder."""
    encoder, found = PictureEncoder(load_encoder("pocket")), []
    for (method, budget, _), conversation in zip(ASKED, conversations(), strict=True):
        (made,) = encoder.encode([conversation], method_of(method, budget))
        found.append({"ids": made.ids, "visual": made.visual, "embeds": torch.cat(made.embeds)})
    return found


@pytest.fixture(scope="module")
def reference() -> list[dict[str, Any]]:
    """What the whole model says, with the method attached to it."""
    model, _ = load_pocket()
    loaded, found = load_encoder("pocket"), []
    for (method, budget, _), conversation in zip(ASKED, conversations(), strict=True):
        inputs = collate(loaded, [Prompt(conversation, "", pictures_of(conversation), [], "")])
        config = model.generation_config
        config.eos_token_id = None  # all write the same number of tokens
        with method_of(method, budget)(model) as session:
            told = {"output_logits": True, "return_dict_in_generate": True}
            out = model.generate(**inputs, generation_config=config, max_new_tokens=NEW, do_sample=False, **told)
        logits = torch.stack(out.logits, 1)[0].double().log_softmax(-1)
        tokens = out.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        before, after = sum(session.report.before), sum(session.report.after)
        found.append({"tokens": tokens, "logprobs": logits, "prompt": inputs["input_ids"].shape[1] - before + after})
    return found


def run(
    folder: Path, batches: list[list[dict[str, Any]]], options: dict[str, Any], tmp_path: Path, **environment: str
) -> list[Any]:
    torch.save(batches, tmp_path / "prompts.pt")
    given = [str(folder), str(tmp_path / "prompts.pt"), str(tmp_path / "results.json"), json.dumps(options)]
    one = {} if "tensor_parallel_size" in options else {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    done = subprocess.run(
        [VLLM, str(SCRIPT), *given], env={**os.environ, **one, **environment}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads((tmp_path / "results.json").read_text())


def check(found: list[Any], reference: list[dict[str, Any]]) -> float:
    """The largest difference of log-probabilities."""
    worst = 0.0
    for got, expected in zip(found, reference, strict=True):
        assert got["prompt"] == expected["prompt"]
        assert got["tokens"] == expected["tokens"]
        assert len(got["top"]) == NEW
        for step, own in zip(got["top"], expected["logprobs"], strict=True):
            assert len(step) >= 10
            differences = [abs(value - float(own[int(token)])) for token, value in step.items()]
            worst = max(worst, *differences)
    assert worst <= 1e-4
    return worst


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="one batch"),
        pytest.param({"max_num_batched_tokens": 64, "max_num_seqs": 4}, id="chunked prefill"),
        pytest.param({"tensor_parallel_size": 2}, id="two ranks"),
    ],
)
def test_same_tokens_and_log_probabilities(
    exported: Path, prompts: list[dict[str, Any]], reference: list[dict[str, Any]], options: dict[str, Any], tmp_path: Path
) -> None:
    bound = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"} if "tensor_parallel_size" in options else {}
    check(run(exported, [prompts], options, tmp_path, **bound), reference)


def test_prefixes_are_shared_by_what_is_in_them(
    exported: Path, prompts: list[dict[str, Any]], reference: list[dict[str, Any]], tmp_path: Path
) -> None:
    """The same picture with the same budget is read from the cache, with another budget or another picture never."""
    encoder, (first, *_) = PictureEncoder(load_encoder("pocket")), conversations()
    budgets = (200, 150, 160)
    made = [encoder.encode([first], method_of("prumerge+", budget))[0] for budget in budgets]
    others = [{"ids": one.ids, "visual": one.visual, "embeds": torch.cat(one.embeds)} for one in made]
    again = [prompts[0], others[0], prompts[3], prompts[0], others[1], others[2], others[0]]
    # the same ids, and one embedding that differs
    altered = {**others[0], "embeds": others[0]["embeds"].clone()}
    altered["embeds"][3] += 0.5
    found = run(exported, [[each] for each in [*again, altered]], {"enable_prefix_caching": True, "block_size": 32}, tmp_path)
    cached = [each["cached"] for each in found]
    length = [len(each["ids"]) for each in again]
    assert cached == [0, 0, 0, length[3] // 32 * 32, 0, 0, length[6] // 32 * 32, 0]
    check([found[0], found[2], found[3]], [reference[0], reference[3], reference[0]])
    assert found[6]["tokens"] == found[1]["tokens"]
