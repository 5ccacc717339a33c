"""Runs prompts with embeddings in a vLLM of its own process: python embeds_engine.py EXPORT PROMPTS RESULTS OPTIONS."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch


def main(folder: str, prompts: str, results: str, options: dict[str, Any]) -> None:
    from vllm import LLM, SamplingParams

    engine = LLM(
        folder, enable_prompt_embeds=True, dtype="float32", enforce_eager=True, max_model_len=2048, max_logprobs=20, **options
    )
    found = []
    for together in torch.load(prompts):
        asked = []
        for prompt in together:
            whole = torch.zeros(len(prompt["ids"]), prompt["embeds"].shape[1])
            visual = torch.tensor(prompt["visual"])
            whole[visual] = prompt["embeds"]
            asked.append({"prompt_embeds": whole, "prompt_token_ids": prompt["ids"], "prompt_is_token_ids": (~visual).tolist()})
        wanted = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True, logprobs=10, detokenize=False)
        for output in engine.generate(asked, wanted, use_tqdm=False):
            (one,) = output.outputs
            top = [{int(token): float(entry.logprob) for token, entry in step.items()} for step in one.logprobs]
            told = {
                "tokens": [*one.token_ids],
                "top": top,
                "cached": output.num_cached_tokens,
                "prompt": len(output.prompt_token_ids),
            }
            found.append(told)
    with open(results, "w") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main(*sys.argv[1:4], json.loads(sys.argv[4]))
