"""LLaVA inside vLLM with the plugin says what transformers with foveate says, whatever mix of budgets and embeddings comes."""

from __future__ import annotations

import functools
import json
import shutil
import sys
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig

import foveate
from foveate.methods.baselines import Resize
from foveate.methods.registry import registered
from foveate.pocket import WEIGHTS
from foveate.pocket.scenes import draw_scene
from foveate.serving.plugin.settings import kept, method_of
from tests.vllm import plugin_engine as engine

METHOD, BUDGET, CELLS = "prumerge+", 144, 576
QUESTIONS = ("what color is the circle ?", "how many shapes are there ?", "what is written ?")
INSIDE = "acts inside"


def config(**fields: Any) -> Any:
    return SimpleNamespace(foveate=fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(method="prumerge+"), "foveate serve"),
        (dict(method="inflection"), "foveate serve"),
        (dict(method="fastv", budget=0.5), INSIDE),
        (dict(method="aim", budget=0.5), INSIDE),
        (dict(method="evit", budget=0.5), INSIDE),
        (dict(method="tome", budget=144), INSIDE),
        (dict(method="cdpruner", budget=144), "question"),
        (dict(method="resize", budget=144), "smaller pictures"),
        (dict(method="nothing", budget=144), "unknown method"),
        (dict(method="prumerge+", budget=0), "budget=0"),
        (dict(method="prumerge+", budget=144, positions="original"), "positions"),
        (dict(budget=144), "names no method"),
    ],
)
def test_what_cannot_be_done_inside_vllm_is_refused(fields, message):
    with pytest.raises(foveate.InputError, match=message):
        method_of(config(**fields))


def test_budgets():
    method = method_of(config(method="prumerge+", budget=144))
    assert [kept(method, budget, CELLS) for budget in (None, 40, 0.25, 1, 1.0, 9999)] == [144, 40, 144, 1, 576, 576]
    assert method_of(SimpleNamespace()) is None
    assert kept(None, None, CELLS) is None
    with pytest.raises(foveate.InputError, match="no method"):
        kept(None, 40, CELLS)
    for budget in (0, -3, 1.5, "40", True, [40]):
        with pytest.raises(foveate.InputError, match="budget"):
            kept(method, budget, CELLS)


CHECKS = (
    "no method: as vLLM without the plugin",
    "no method: budgets are refused",
    "no method: embeddings of several lengths in a batch",
    "budgets of server and requests in a batch",
    "several images in a prompt",
    "all tokens: as vLLM without the plugin",
    "embeddings of several lengths in a batch",
    "bad embeddings and budgets are refused, and the engine lives",
    "another budget of the same image is another entry of the caches",
    "every method keeps and merges what foveate.encode does",
    "refused when the server starts",
    "SigLIP",
    "CLIP with [CLS] in the prompt",
)


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    return engine.run(__name__, tmp_path_factory.mktemp("llava"))


@pytest.mark.parametrize("check", CHECKS)
def test_inside_vllm(checked, check):
    assert checked[check] == "", checked[check]


# -- in a process of its own ----------------------------------------------------------------------------------------------------


def published(source: Path, folder: Path) -> Path:
    """A checkpoint with the keys of published ones: transformers 5 leaves out a part of those of CLIP and SigLIP."""
    shutil.copytree(source, folder, dirs_exist_ok=True)
    weights = load_file(folder / "model.safetensors")
    renamed = {name.replace("vision_tower.", "vision_tower.vision_model."): weight for name, weight in weights.items()}
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def random_model(folder: Path, **changes: Any) -> Path:
    """A small random model with the decoder and the processor of the pocket model, and another vision encoder."""
    torch.manual_seed(0)
    settings = LlavaConfig.from_pretrained(WEIGHTS).to_dict() | changes
    model = LlavaForConditionalGeneration(LlavaConfig(**settings)).float()
    own = LlavaForConditionalGeneration.from_pretrained(WEIGHTS, dtype="float32")
    model.model.language_model.load_state_dict(own.model.language_model.state_dict())
    model.lm_head.load_state_dict(own.lm_head.state_dict())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "vision_tower" in name and parameter.ndim > 1:
                parameter.normal_(std=0.1)
            if "projector" in name:
                parameter.normal_(std=0.1)
    model.save_pretrained(folder / "own")
    for file in ("tokenizer.json", "tokenizer_config.json", "processor_config.json", "chat_template.jinja"):
        shutil.copy(WEIGHTS / file, folder / "own")
    processor = json.loads((folder / "own/processor_config.json").read_text())
    strategy, kind = settings["vision_feature_select_strategy"], settings["vision_config"]["model_type"]
    cls = int(kind == "clip_vision_model")  # processors count it and take it off again where the strategy is the default
    processor |= dict(patch_size=settings["vision_config"]["patch_size"])
    processor |= dict(vision_feature_select_strategy=strategy, num_additional_image_tokens=cls)
    (folder / "own/processor_config.json").write_text(json.dumps(processor))
    return folder / "own"


class Bench:
    """A model in transformers, and prompts for it."""

    def __init__(self, folder: Path) -> None:
        self.model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype="float32").eval()
        self.processor: Any = AutoProcessor.from_pretrained(folder)

    @staticmethod
    @functools.cache
    def image(number: int) -> Image.Image:
        return Image.fromarray(draw_scene(Random(number)).image)

    def text(self, number: int, images: int = 1) -> str:
        return "<s> user: " + "<image> " * images + QUESTIONS[number % len(QUESTIONS)] + " assistant:"

    def inputs(self, number: int, images: int = 1) -> dict[str, Any]:
        pictures = [self.image(number + i) for i in range(images)]
        return dict(self.processor(images=pictures, text=self.text(number, images), return_tensors="pt", add_special_tokens=False))

    def prompt(self, number: int, budget: float | None = None, images: int = 1) -> dict[str, Any]:
        """For vLLM, with token ids: a tokenizer may begin texts in its own way."""
        ids = self.processor.tokenizer(self.text(number, images), add_special_tokens=False)["input_ids"]
        prompt: dict[str, Any] = dict(
            prompt_token_ids=ids, multi_modal_data={"image": [self.image(number + i) for i in range(images)]}
        )
        return prompt if budget is None else prompt | dict(mm_processor_kwargs={"foveate_budget": budget})

    def with_embeds(self, number: int, embeds: Any) -> dict[str, Any]:
        return self.prompt(number) | dict(multi_modal_data={"image": embeds})

    def expected(self, number: int, method: str, budget: float | None, images: int = 1) -> engine.Row:
        with foveate.get(method, budget=budget)(self.model):
            return engine.reference(self.model, self.inputs(number, images))

    def encoded(self, number: int, method: str, **fields: Any) -> list[torch.Tensor]:
        return foveate.encode(self.model, method, **self.inputs(number), **fields).embeds


def main(folder: Path) -> None:
    check = engine.Checks(folder)
    pocket = published(WEIGHTS, folder / "pocket")
    bench = Bench(WEIGHTS)
    stock, adaptive = without_plugin(pocket, bench), [bench.expected(number, METHOD, None) for number in range(4)]
    lengths = [bench.encoded(number, METHOD)[0] for number in range(4)]
    assert len({len(each) for each in lengths}) > 1
    several = [bench.with_embeds(number, [embeds]) for number, embeds in enumerate(lengths)]
    plain(check, pocket, bench, stock, several, adaptive)
    reducing(check, pocket, bench, stock, several, adaptive)
    others(check, folder, pocket)


def without_plugin(pocket: Path, bench: Bench) -> list[engine.Row]:
    """Answers of vLLM's own class."""
    from vllm import ModelRegistry

    ModelRegistry.register_model("Stock", "vllm.model_executor.models.llava:LlavaForConditionalGeneration")
    llm = engine.engine(pocket, hf_overrides={"architectures": ["Stock"]})
    found = engine.answers(llm, [bench.prompt(number) for number in range(4)])
    engine.stop(llm)
    return found


def refused(llm: Any, prompt: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        engine.answers(llm, [prompt])


def plain(check: engine.Checks, pocket: Path, bench: Bench, stock: Any, several: Any, adaptive: Any) -> None:
    llm = engine.engine(pocket, enable_mm_embeds=True)
    prompts = [bench.prompt(number) for number in range(4)]
    check("no method: as vLLM without the plugin", lambda: engine.same(engine.answers(llm, prompts), stock, 0.0) and None)
    check("no method: budgets are refused", lambda: refused(llm, bench.prompt(0, 40), "no method"))
    check(
        "no method: embeddings of several lengths in a batch", lambda: engine.same(engine.answers(llm, several), adaptive) and None
    )
    engine.stop(llm)


def reducing(check: engine.Checks, pocket: Path, bench: Bench, stock: Any, several: Any, adaptive: Any) -> None:
    options = dict(hf_overrides={"foveate": {"method": METHOD, "budget": BUDGET}}, enable_mm_embeds=True)
    llm = engine.engine(pocket, **options, disable_log_stats=False)

    def batch() -> None:
        budgets = (None, 40, 0.5, 576, 1, 300, 40)
        found = engine.answers(llm, [bench.prompt(number, budget) for number, budget in enumerate(budgets)])
        true = [bench.expected(number, METHOD, BUDGET if budget is None else budget) for number, budget in enumerate(budgets)]
        engine.same(found, true)

    def images() -> None:
        found = engine.answers(llm, [bench.prompt(number, 60, images=number + 2) for number in range(2)])
        engine.same(found, [bench.expected(number, METHOD, 60, images=number + 2) for number in range(2)])

    def whole() -> None:
        engine.same(engine.answers(llm, [bench.prompt(number, 1.0) for number in range(4)]), stock, 1e-5)

    def embeds() -> None:
        engine.same(engine.answers(llm, [*several, bench.prompt(1, 40)]), [*adaptive, bench.expected(1, METHOD, 40)])
        pair = bench.prompt(0, images=2) | dict(multi_modal_data={"image": [bench.encoded(n, METHOD)[0] for n in range(2)]})
        engine.same(engine.answers(llm, [pair]), [bench.expected(0, METHOD, None, images=2)])
        three = bench.with_embeds(2, bench.encoded(2, METHOD)[0][None])
        engine.same(engine.answers(llm, [three]), [adaptive[2]])

    def bad() -> None:
        good = bench.encoded(3, METHOD)[0]
        broken = good.clone()
        broken[3, 5] = float("nan")
        tall = good.clone()
        tall[0, 0] = float("inf")
        wrong = {
            "NaN": (broken, tall),
            "shape": (good[:, :-1], good[:0], good[:, :0]),
            "floating": (good.long(), good > 0),
        }
        for shape in (good[None, None], good[None, None, None]):
            refused(llm, bench.with_embeds(3, shape), "neither a picture")
        for message, every in wrong.items():
            for embeds in every:
                refused(llm, bench.with_embeds(3, [embeds]), message)
                refused(llm, bench.with_embeds(3, embeds[None]), message)
        for budget in (0, 1.5, "many", True):
            refused(llm, bench.prompt(0, budget), "budget")
        engine.same(engine.answers(llm, [several[3]]), [adaptive[3]])

    def caches() -> None:
        from vllm import SamplingParams

        def cached(budget: float) -> tuple[int, int]:
            (result,) = llm.generate([bench.prompt(20, budget)], SamplingParams(temperature=0, max_tokens=1), use_tqdm=False)
            return len(result.prompt_token_ids), result.num_cached_tokens

        text = len(bench.prompt(20)["prompt_token_ids"]) - 1
        block = llm.llm_engine.vllm_config.cache_config.block_size
        (first, none), (again, most), (other, few) = cached(200), cached(200), cached(230)
        assert (first, again, other) == (text + 200, text + 200, text + 230)
        assert none == few == 0
        assert most == (first - 1) // block * block > 0
        engine.same(
            engine.answers(llm, [bench.prompt(20, 230), bench.prompt(20, 200)]), [bench.expected(20, METHOD, b) for b in (230, 200)]
        )
        assert len({json.dumps(cached(budget)[0]) for budget in (1, 1.0)}) == 2

    check("budgets of server and requests in a batch", batch)
    check("several images in a prompt", images)
    check("all tokens: as vLLM without the plugin", whole)
    check("embeddings of several lengths in a batch", embeds)
    check("bad embeddings and budgets are refused, and the engine lives", bad)
    check("another budget of the same image is another entry of the caches", caches)
    check("every method keeps and merges what foveate.encode does", lambda: every_method(llm, bench, 100))
    engine.stop(llm)


def every_method(llm: Any, bench: Bench, budget: int) -> None:
    """The tokens of two images at once, of all methods that can act inside vLLM."""
    pixels = torch.cat([bench.inputs(number)["pixel_values"] for number in range(2)])
    names = 0
    for name, kind in registered().items():
        try:
            front = kind(budget=0.5).before_decoder()
        except foveate.InputError:  # it has no budget, or no weights
            continue
        if not isinstance(front, foveate.ProjectorReducer) or front.reads_question or isinstance(front, Resize):
            continue
        if type(front) is not kind:  # a part of a method that acts in several places
            continue
        names += 1
        fields = dict(budget=budget) | (dict(important=1.0) if name == "vispruner" else {})  # its other half follows from rounding
        method = method_of(config(method=name, **fields))
        (found,) = llm.apply_model(lambda model, method=method: model.reducing(method, pixels))
        for number in range(2):
            (true,) = bench.encoded(number, name, **fields)
            assert true.shape == found[number].shape, name
            assert len(true) >= budget, name
            worst = float((found[number] - true).abs().max())
            assert worst <= 1e-4 * float(true.abs().max()), f"{name}: {worst:.2e}"
    assert names >= 14


def others(check: engine.Checks, folder: Path, pocket: Path) -> None:
    def start() -> None:
        for fields, message in (
            (dict(method="prumerge+"), "foveate serve"),
            (dict(method="fastv", budget=0.5), "inside the decoder"),
        ):
            with pytest.raises(Exception, match=message):
                engine.engine(pocket, hf_overrides={"foveate": fields})

    def other(name: str, budget: int, **changes: Any) -> None:
        own = random_model(folder / name, **changes)
        bench = Bench(own)
        llm = engine.engine(
            published(own, folder / f"{name}-published"), hf_overrides={"foveate": dict(method="visionzip", budget=budget)}
        )
        found = engine.answers(llm, [bench.prompt(0), bench.prompt(1, 1.0), bench.prompt(2, 9)])
        engine.same(found, [bench.expected(n, "visionzip", b) for n, b in enumerate((budget, 1.0, 9))])
        every_method(llm, bench, 20)
        engine.stop(llm)

    vision = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4, image_size=192, patch_size=16)
    siglip = SiglipVisionConfig(**vision).to_dict()
    clip = LlavaConfig.from_pretrained(WEIGHTS).vision_config.to_dict() | dict(patch_size=16)
    check("refused when the server starts", start)
    check(
        "SigLIP", lambda: other("siglip", 30, vision_config=siglip, vision_feature_select_strategy="full", vision_feature_layer=-1)
    )
    check("CLIP with [CLS] in the prompt", lambda: other("full", 30, vision_config=clip, vision_feature_select_strategy="full"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
