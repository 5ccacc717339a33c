"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL inside vLLM: visual tokens that stay keep the (t, h, w) positions of the whole image."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

import foveate
from foveate.serving.placing import with_levels
from foveate.serving.plugin import qwen_request
from foveate.serving.plugin.embeds import check_grid, check_placed
from tests import families, zoo
from tests.family_prompts import END, IMAGE, START, VIDEO, Medium
from tests.vllm import plugin_engine as engine

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
WIDE, SQUARE, TALL, LINE = Medium((4, 16)), Medium((12, 12)), Medium((20, 6)), Medium((2, 24))
FILM = Medium((6, 16), frames=3)  # behind one longer in time than in space, transformers 5 counts on in another way than vLLM
ROWS: tuple[tuple[Sequence[Medium], Any], ...] = (  # media of a prompt, and what is kept of each picture
    ((SQUARE,), 12),
    ((WIDE,), 1),
    ((TALL, SQUARE), 7),
    ((SQUARE,), 0.5),
    ((LINE, WIDE, TALL), 3),
)
WITHOUT = "placed tokens where vLLM loads no vision encoder"
BESIDE = "placed tokens beside a video, or with nothing behind them"
CHECKS = (
    "pictures, and embeddings with their grid: as vLLM without the plugin",
    "placed tokens, different numbers in a batch",
    BESIDE,
    "the same embeddings at other places are another entry of the caches",
    "bad embeddings and places are refused, and the engine lives",
    WITHOUT,
)


def test_places_are_checked():
    positions, extents = torch.tensor([[0, 1, 2], [0, 5, 0], [0, 0, 0]]), torch.tensor([6, 1])
    check_placed(positions, extents, [2, 1], 100)
    for wrong, message in (
        ((positions.float(), extents, [2, 1], 100), "whole numbers"),
        ((positions, extents, [2, 2], 100), "image_positions"),
        ((positions, extents[:1], [2, 1], 100), "one per image"),
        ((positions, extents, [1, 2], 100), "outside"),
        ((-positions, extents, [2, 1], 100), "outside"),
        ((positions, extents, [2, 1], 6), "at most 6"),
        ((positions, extents * 0, [2, 1], 100), "at least 1"),
    ):
        with pytest.raises(foveate.InputError, match=message):
            check_placed(*wrong)


def test_grids_are_checked():
    assert check_grid(torch.tensor([[1, 4, 6], [1, 2, 2]]), 2) == [6, 1]
    for wrong in (
        [1, 4, 6],
        torch.tensor([[1, 4, 5]]),
        torch.tensor([[2, 4, 4]]),
        torch.tensor([[1, 0, 2]]),
        torch.zeros(0, 3).long(),
    ):
        with pytest.raises(foveate.InputError, match="image_grid_thw"):
            check_grid(wrong, 2)


def test_requests_of_no_images_are_refused():
    encoded = SimpleNamespace(report=SimpleNamespace(items=[]), embeds=[], deepstack=[])
    with pytest.raises(foveate.InputError, match="no images"):
        qwen_request(encoded)


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    return engine.run(__name__, tmp_path_factory.mktemp("qwen"))


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_inside_vllm(checked, family, check):
    if family == "qwen3_vl" and check == BESIDE:
        pytest.skip("its videos and placed images stand in prompts of their own")
    assert checked[f"{family}: {check}"] == "", checked[f"{family}: {check}"]


# -- in a process of its own ----------------------------------------------------------------------------------------------------


def with_processor(family: str, folder: Path) -> Path:
    """A small random model of a family, with heads as wide as vLLM takes on CPUs, and a processor whose words are numbers."""
    torch.manual_seed(0)
    kind, vision, text, fields = families.parts_of(family)
    rope = dict(rope_type="default", rope_theta=10000.0, mrope_section=[4, 6, 6])
    heads = dict(num_attention_heads=2, num_key_value_heads=1)
    if family == "qwen3_vl":
        heads["head_dim"], rope["mrope_interleaved"] = 32, True
    text = {**text, **heads, "rope_parameters": rope}  # type: ignore[dict-item]
    model = AutoModelForImageTextToText.from_config(kind(vision_config=vision, text_config=text, **fields))
    families.spread(model)
    model.generation_config.update(pad_token_id=zoo.PAD, eos_token_id=None, bos_token_id=1)
    model.save_pretrained(folder)
    marks = {IMAGE: "<|image_pad|>", VIDEO: "<|video_pad|>", START: "<|vision_start|>", END: "<|vision_end|>"}
    words = {marks.get(i, str(i)): i for i in range(zoo.VOCABULARY)}
    backend = Tokenizer(models.WordLevel(words, unk_token="3"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = dict(additional_special_tokens=list(marks.values()), pad_token="0", bos_token="1", eos_token="2", unk_token="3")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    sizes = dict(patch_size=families.PATCH, merge_size=2, temporal_patch_size=2, min_pixels=64, max_pixels=64 * 64)
    kind = {"qwen2_vl": Qwen2VLProcessor, "qwen2_5_vl": Qwen2_5_VLProcessor, "qwen3_vl": Qwen3VLProcessor}[family]
    videos = (Qwen3VLVideoProcessor if family == "qwen3_vl" else Qwen2VLVideoProcessor)(**sizes)
    kind(Qwen2VLImageProcessor(**sizes), tokenizer, videos, chat_template="").save_pretrained(folder)
    return folder


class Bench:
    """A model in transformers, and prompts for it."""

    def __init__(self, family: str, folder: Path) -> None:
        self.family, self.folder = family, folder
        self.model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype="float32").eval()

    def inputs(self, number: int, media: Sequence[Medium], *, behind: int = 4) -> dict[str, Any]:
        ids = families.prompt(self.family, media, 3 + number, 4, seed=number)
        pixels = [(medium, families.pixels(self.family, medium, 7 * number + i)) for i, medium in enumerate(media)]
        ids = ids[: len(ids) - 4 + behind]
        return families.inputs_of(self.family, [ids], [pixels])

    def prompt(self, inputs: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        """For vLLM: one placeholder for each medium."""
        ids = inputs["input_ids"][0].tolist()
        short = [token for i, token in enumerate(ids) if token not in (IMAGE, VIDEO) or ids[i - 1] != token]
        return dict(prompt_token_ids=short, multi_modal_data=data)

    def seen(self, picture: Image.Image) -> dict[str, Any]:
        """A prompt with a picture, as the processor makes it."""
        made = AutoProcessor.from_pretrained(self.folder).image_processor(images=[picture], return_tensors="pt")
        medium = Medium(tuple(made["image_grid_thw"][0, 1:].tolist()))
        return self.inputs(11, (medium,)) | dict(made)

    def placed(self, inputs: dict[str, Any], budget: Any) -> tuple[dict[str, Any], engine.Row]:
        """A prompt with placed tokens, and what transformers says with them."""
        with foveate.DivPrune(budget=budget)(self.model):
            true = engine.reference(self.model, inputs)
        return self.prompt(inputs, qwen_request(foveate.encode(self.model, "divprune", budget=budget, **inputs))), true

    def kept(self, ids: Tensor, true: Tensor, media: Sequence[Medium]) -> tuple[list[int], list[Any], Tensor]:
        """Every other token of each image placed: what is left of a prompt, its media as vLLM's workers see them, and the columns.

        ``true`` [3, S] are the positions of the whole prompt.
        """
        keep, features, before = torch.ones(len(ids), dtype=torch.bool), [], 0
        for medium, begin in zip(media, (ids == START).nonzero()[:, 0].tolist(), strict=True):
            grid = torch.tensor([max(1, medium.frames), *medium.size])
            first, size = begin + 1, int(grid.prod()) // 4
            data = dict(video_grid_thw=grid, second_per_grid_ts=torch.tensor(1.5 if self.family == "qwen2_5_vl" else 1.0))
            if not medium.frames:
                keep[first + 1 : first + size : 2] = False
                inside = true[:, first : first + size : 2] - true[:, begin, None] - 1
                data = dict(image_positions=inside.T, image_extents=torch.tensor(max(medium.size) // 2))
            fields = {name: SimpleNamespace(data=value) for name, value in data.items()}
            features.append(SimpleNamespace(modality=medium.kind, data=fields, mm_position=SimpleNamespace(offset=first - before)))
            before = int((~keep).sum())
        return ids[keep].tolist(), features[::-1], keep


def main(check: engine.Checks, folder: Path, family: str) -> None:
    own = with_processor(family, folder / family)
    bench = Bench(family, own)
    llm = engine.engine(own, enable_mm_embeds=True, disable_log_stats=False)
    whole = [(bench.inputs(n, media), media) for n, (media, _) in enumerate(ROWS)]

    def stock() -> None:
        prompts, true = [], []
        for inputs, _ in whole:
            true.append(engine.reference(bench.model, inputs))
            encoded = foveate.encode(bench.model, "divprune", budget=1.0, **inputs)
            embeds = torch.cat(with_levels(encoded.embeds, encoded.deepstack))
            prompts.append(bench.prompt(inputs, {"image": dict(image_embeds=embeds, image_grid_thw=inputs["image_grid_thw"])}))
        picture = Image.fromarray(torch.randint(256, (32, 48, 3), dtype=torch.uint8).numpy())
        true.append(engine.reference(bench.model, bench.seen(picture)))
        prompts.append(bench.prompt(bench.seen(picture), {"image": picture}))
        engine.same(engine.answers(llm, prompts), true)

    def placed() -> None:
        pairs = [bench.placed(inputs, budget) for (inputs, _), (_, budget) in zip(whole, ROWS, strict=True)]
        engine.same(engine.answers(llm, [prompt for prompt, _ in pairs]), [true for _, true in pairs])

    def beside() -> None:
        for behind in (4, -1):  # text, or nothing
            inputs = bench.inputs(5, (SQUARE, FILM, WIDE), behind=behind)
            (true,) = foveate.encode(bench.model, "divprune", budget=1.0, **inputs).inputs["position_ids"][1:].unbind(1)
            ids, features, keep = bench.kept(inputs["input_ids"][0], true, (SQUARE, FILM, WIDE))
            ((found, ahead),) = llm.apply_model(
                lambda model, ids=ids, features=features: model.get_mrope_input_positions(ids, features)
            )
            assert torch.equal(found, true[:, keep])
            assert ahead == int(true.max()) + 1 - len(ids)

    def caches() -> None:
        from vllm import SamplingParams

        prompt, true = bench.placed(bench.inputs(8, (Medium((32, 32)),)), 150)  # more than a block of the cache
        image = prompt["multi_modal_data"]["image"]
        moved = prompt | dict(multi_modal_data={"image": image | dict(image_extents=image["image_extents"] + 9)})
        sampling = SamplingParams(temperature=0, max_tokens=1)
        counts = [llm.generate([each], sampling, use_tqdm=False)[0].num_cached_tokens for each in (prompt, prompt, moved)]
        assert counts[1] > counts[2]
        engine.same(engine.answers(llm, [prompt, prompt]), [true, true])

    def bad() -> None:
        prompt, true = bench.placed(whole[0][0], 12)
        image = prompt["multi_modal_data"]["image"]
        broken = image["image_embeds"].clone()
        broken[0, 0] = float("nan")
        for changes, message in (
            (dict(image_embeds=broken), "NaN"),
            (dict(image_embeds=image["image_embeds"][:-1]), "11 image_embeds"),
            (dict(image_embeds=image["image_embeds"][:, :-1]), "shape"),
            (dict(image_embeds=image["image_embeds"][None]), "shape"),
            (dict(image_embeds=image["image_embeds"].long()), "floating"),
            (dict(image_grid_thw=torch.tensor([[1, 2, 23]])), "multiples"),
            (dict(image_positions=image["image_positions"] + 40), "outside"),
            (dict(image_extents=torch.tensor([100000])), "at most"),
            (dict(image_extents=None), "go together"),
        ):
            fields = {name: value for name, value in (image | changes).items() if value is not None}
            with pytest.raises(ValueError, match=message):
                engine.answers(llm, [prompt | dict(multi_modal_data={"image": fields})])
        engine.same(engine.answers(llm, [prompt]), [true])

    for name, run in zip(CHECKS[:-1], (stock, placed, beside, caches, bad), strict=True):
        if family == "qwen3_vl" and name == BESIDE:
            continue
        check(f"{family}: {name}", run)
    engine.stop(llm)
    llm = engine.engine(own, enable_mm_embeds=True, limit_mm_per_prompt={"image": 0, "video": 0})
    check(f"{family}: {WITHOUT}", placed)
    engine.stop(llm)


if __name__ == "__main__":
    found = engine.Checks(Path(sys.argv[1]))
    for name in FAMILIES:
        main(found, Path(sys.argv[1]), name)
