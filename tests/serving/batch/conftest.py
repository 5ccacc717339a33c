"""Pictures and engines of the tests of ``foveate batch``."""

from __future__ import annotations

import sys
from pathlib import Path
from random import Random
from types import ModuleType, SimpleNamespace

import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer

from foveate.pocket.scenes import draw_scene
from foveate.serving.batch import engines
from foveate.serving.batch.engines import TransformersEngine
from foveate.serving.batch.rows import AnswerSettings
from foveate.serving.export import export


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """A folder of scenes, with a white picture."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(4):
        Image.fromarray(draw_scene(Random(number), split="test", level=number % 3).image).save(folder / f"{number}.png")
    Image.new("RGB", (192, 192), "white").save(folder / "white.png")
    return folder


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "text"
    export("pocket", folder)
    return folder


@pytest.fixture(scope="module")
def engine() -> TransformersEngine:
    return TransformersEngine("pocket", AnswerSettings())


@pytest.fixture
def shared(monkeypatch, engine):
    """The command line with a model that is loaded once."""
    monkeypatch.setattr(engines, "load", lambda name: engine.loaded)


class FakeLLM:
    """Greedy answers of an export to mixed prompts; refuses a word, breaks at another, and does not finish a third."""

    def __init__(self, model: str, dtype: str, enable_prompt_embeds: bool):
        assert enable_prompt_embeds
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.calls, self.left = [], False
        self.llm_engine = SimpleNamespace(
            model_config=SimpleNamespace(max_model_len=4096, hf_config=self.model.config), has_unfinished_requests=lambda: self.left
        )

    def generate(self, prompts, options, use_tqdm):
        assert not use_tqdm
        assert len(prompts) == len(options)
        self.calls.append(len(prompts))
        return [self.one(prompt, option) for prompt, option in zip(prompts, options, strict=True)]

    def one(self, prompt, option):
        ids = torch.tensor([prompt["prompt_token_ids"]])
        words = self.tokenizer.convert_ids_to_tokens(ids[0])
        if "king" in words:
            raise ValueError("a prompt that is refused")
        if "wing" in words:
            raise RuntimeError("out of order")
        embeds = self.model.get_input_embeddings()(ids)
        if "prompt_embeds" in prompt:
            known = torch.tensor(prompt["prompt_is_token_ids"])
            given = prompt["prompt_embeds"]
            assert given.shape == embeds.shape[1:]
            assert not given[known].any()
            embeds = torch.where(known[:, None], embeds[0], given)[None]
        out = self.model.generate(inputs_embeds=embeds, do_sample=False, max_new_tokens=option.max_tokens)[0].tolist()
        text = self.tokenizer.decode(out, skip_special_tokens=True)
        reason = "abort" if "moon" in words else "stop" if out[-1] == self.model.generation_config.eos_token_id else "length"
        return SimpleNamespace(outputs=[SimpleNamespace(text=text, token_ids=out, finish_reason=reason)])


@pytest.fixture
def vllm(monkeypatch):
    module = ModuleType("vllm")
    module.LLM, module.SamplingParams = FakeLLM, SimpleNamespace
    monkeypatch.setitem(sys.modules, "vllm", module)
    for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_LOGGING_LEVEL"):
        monkeypatch.setenv(name, "0")
    return module
