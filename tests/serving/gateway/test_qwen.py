"""Models whose visual tokens have (t, h, w) positions: what the engine gets is what the whole model would read, in its places."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoTokenizer
from typer.testing import CliRunner

import foveate
from foveate.chat import Prompt, collate
from foveate.cli.main import app
from foveate.errors import InputError
from foveate.families import FAMILIES
from foveate.frames import build_processor, build_video_processor
from foveate.loading import Loaded, load_encoder, prepared
from foveate.serving.encoding import PictureEncoder, method_of
from foveate.serving.export import described, export
from foveate.serving.gateway.launch import VllmServer
from foveate.serving.handover import HANDOVERS, ImageEmbeds
from foveate.serving.placing import places_of
from tests import families
from tests.serving_fakes import FakeEngine, data_url, metric, parts_of, shown, tensor

from .asked import ASKED, picture, pocket, post, said, started
from .processors import TEMPLATE, tokenizer

SIZES = ((200, 160), (140, 300), (192, 192))
PICTURES = [picture(number, size) for number, size in enumerate(SIZES)]


@pytest.fixture(scope="module")
def encoder() -> PictureEncoder:
    return PictureEncoder(load_encoder("pocket-qwen"))


@pytest.fixture
def gateway(engine: FakeEngine, encoder: PictureEncoder) -> Iterator[str]:
    with started(engine, encoder, method="divprune", budget=0.25) as url:
        yield url


def asked(*numbers: int, text: str = ASKED, **options: Any) -> dict[str, Any]:
    content = [*(shown(data_url(PICTURES[number])) for number in numbers), said(text)]
    return {"messages": [{"role": "user", "content": content}], **options}


def whole(method: str, budget: Any, *numbers: int) -> Any:
    """What foveate.encode gives for the whole model, and its settings."""
    model, processor = pocket("pocket-qwen")
    content = [*({"type": "image", "image": PICTURES[number]} for number in numbers), said(ASKED)]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    return foveate.encode(model, method_of(method, budget), **inputs), model.config


@pytest.mark.parametrize(
    ("method", "budget"), [("divprune", 0.2), ("prumerge", None), ("fovea", 0.1), ("cdpruner", 20), ("resize", 0.3), ("full", None)]
)
def test_the_engine_gets_what_the_whole_model_would_read(gateway: str, engine: FakeEngine, method: str, budget: Any) -> None:
    answer = post(gateway, asked(0, 1, foveate={"method": method, "budget": budget}))
    assert answer.status_code == 200, answer.text
    true, config = whole(method, budget, 0, 1)
    sent = [part["image_embeds"] for part in parts_of(engine.seen[-1]["messages"]) if part["type"] == "image_embeds"]
    assert len(sent) == 2
    positions, ids = true.inputs["position_ids"][1:, 0], true.inputs["input_ids"][0]
    begin = 0
    for part, embeds in zip(sent, true.embeds, strict=True):
        found = {name: tensor(value) for name, value in part.items()}
        torch.testing.assert_close(found["image_embeds"], embeds, atol=2e-5, rtol=1e-4)
        assert found["image_grid_thw"].tolist() == [1, 2, 2 * len(embeds)]
        begin += ids[begin:].tolist().index(config.image_token_id)
        end = begin + len(embeds)
        start = int(positions[0, begin - 1]) + 1  # after <|vision_start|>
        assert torch.equal(found["image_positions"].T + start, positions[:, begin:end])
        assert int(found["image_extents"]) + start == int(positions[0, end])  # where <|vision_end|> stands
        begin = end
    usage, counts = answer.json()["usage"], [len(each) for each in true.embeds]
    assert usage["foveate"]["visual_tokens"] == sum(counts)
    assert [each["visual_tokens"] for each in usage["foveate"]["pictures"]] == counts
    assert usage["foveate"]["visual_tokens_before"] == sum(true.report.before)
    assert usage["prompt_tokens"] == len(ids)
    assert metric(gateway, "foveate_prompt_mismatches_total") == 0


def newest() -> Loaded:
    """A small random Qwen3-VL."""
    sizes = {"patch_size": families.PATCH, "merge_size": 2, "temporal_patch_size": 2, "min_pixels": 256, "max_pixels": 64 * 64}
    template = TEMPLATE.replace("<image>", "<img><image></img>")
    made = build_processor(
        transformers.Qwen3VLProcessor,
        image_processor=transformers.Qwen2VLImageProcessorPil(**sizes),
        tokenizer=tokenizer(),
        video_processor=build_video_processor("Qwen3VLVideoProcessor", patch_size=families.PATCH, merge_size=2),
        chat_template=template,
    )
    return prepared("newest", families.load("qwen3_vl"), made)


def test_features_of_deeper_layers_go_along(engine: FakeEngine) -> None:
    """Qwen3-VL: side by side with each token, as vLLM reads them."""
    loaded = newest()
    with started(engine, PictureEncoder(loaded), method="divprune", budget=5) as url:
        answer = post(url, asked(0, 1, text="w40 w41"))
        assert answer.status_code == 200, answer.text
        video = {"type": "video", "video": [data_url(PICTURES[0])] * 4}
        refused = post(url, {"messages": [{"role": "user", "content": [video, said("w40")]}]})
        assert (refused.status_code, "without videos" in refused.text) == (400, True)
    content = [*({"type": "image", "image": PICTURES[number]} for number in (0, 1)), said("w40 w41")]
    inputs = collate(loaded, [Prompt([{"role": "user", "content": content}], "", [*PICTURES[:2]], [], "")])
    true = foveate.encode(loaded.model, "divprune", budget=5, **inputs)
    sent = [part["image_embeds"] for part in parts_of(engine.seen[-1]["messages"]) if part["type"] == "image_embeds"]
    assert len(true.deepstack[0]) == 3
    for part, embeds, levels in zip(sent, true.embeds, true.deepstack, strict=True):
        found = tensor(part["image_embeds"])
        assert found.shape == (5, 4 * embeds.shape[1])
        torch.testing.assert_close(found, torch.cat([embeds, *levels], 1), atol=2e-5, rtol=1e-4)


def test_pictures_of_earlier_turns_are_remembered(gateway: str, engine: FakeEngine) -> None:
    for _ in range(2):
        post(gateway, asked(2))
    assert metric(gateway, "foveate_encoder_batch_count") == 1
    assert metric(gateway, "foveate_pictures_remembered_total") == 1
    one, other = (seen["messages"] for seen in engine.seen[-2:])
    assert one == other
    post(gateway, asked(2, foveate={"budget": 0.5}))
    post(gateway, asked(1, 2))
    assert metric(gateway, "foveate_encoder_batch_count") == 3


@pytest.mark.parametrize("behave", ["well", "stock"])
def test_an_engine_without_the_plugin_is_told_at_the_start(
    encoder: PictureEncoder, behave: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It would put visual tokens in wrong places without a word."""
    engine = FakeEngine()
    engine.behave = behave
    with caplog.at_level(logging.ERROR), started(engine, encoder, method="full") as url:
        answer = post(url, asked(0))
    assert ("Install foveate" in caplog.text) == (behave == "stock")
    if behave == "stock":
        assert answer.status_code == 502
        assert "--enable-mm-embeds" in answer.json()["error"]["message"]
        assert not [seen for seen in engine.seen if seen["max_tokens"] != 1]  # no request of a client
    else:
        assert answer.status_code == 200


def test_words_of_pictures_are_refused(gateway: str) -> None:
    for word in ("<|image_pad|>", "<|video_pad|>"):
        answer = post(gateway, asked(0, text=f"what is {word} ?"))
        assert (answer.status_code, "stands for pictures" in answer.text) == (400, True)
    assert post(gateway, asked(0, text="<prompt_embeds> ?")).status_code == 200  # a word like others here


def test_the_export_is_the_whole_model(tmp_path: Path) -> None:
    told = export("pocket-qwen", tmp_path / "whole")
    assert (told.handover, told.architecture, told.no_chat) == ("image_embeds", "Qwen2_5_VLForConditionalGeneration", "")
    assert told.conversations >= 5
    assert described(tmp_path / "whole") == told
    assert AutoConfig.from_pretrained(tmp_path / "whole").model_type == "qwen2_5_vl"
    assert "<|image_pad|>" in AutoTokenizer.from_pretrained(tmp_path / "whole").chat_template
    again = load_encoder(str(tmp_path / "whole"), dtype="float32").model
    model = load_encoder("pocket-qwen").model
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), again.parameters(), strict=True))
    server = VllmServer(tmp_path / "whole", python=_with(tmp_path, plugin=True))
    assert [*ImageEmbeds.arguments] == [each for each in server.command if each in ImageEmbeds.arguments]
    assert "--enable-prompt-embeds" not in server.command
    with pytest.raises(InputError, match="foveate is not installed"):
        VllmServer(tmp_path / "whole", python=_with(tmp_path, plugin=False))


def test_the_command_says_how_to_serve_it(tmp_path: Path) -> None:
    found = CliRunner().invoke(app, ["export", "pocket-qwen", str(tmp_path / "whole")])
    assert found.exit_code == 0, found.output
    said_ = found.output.replace("\n", " ")
    assert '--enable-mm-embeds --limit-mm-per-prompt \'{"image": 0, "video": 0}\'' in said_
    assert "--enable-prompt-embeds" not in said_


def _with(folder: Path, *, plugin: bool) -> str:
    """A Python that finds a vLLM that is none, and foveate or not."""
    package = folder / "found" / "vllm"
    package.mkdir(parents=True, exist_ok=True)
    (package / "__init__.py").touch()
    options = "" if plugin else "-S "
    script = folder / f"python{plugin}"
    script.write_text(f'#!/bin/sh\nPYTHONPATH={folder / "found"} exec {sys.executable} {options}"$@"\n')
    script.chmod(0o755)
    assert subprocess.run([script, "-c", "import vllm"], check=False).returncode == 0
    return str(script)


def test_every_family_has_a_way() -> None:
    assert {family.handover for family in FAMILIES.values()} == {*HANDOVERS}


def test_places_need_text_around() -> None:
    visual, positions = torch.tensor([False, True, True, True, False]), torch.arange(5).expand(3, -1)
    (found,) = places_of(visual, positions, [3])
    assert (found.positions[:, 0].tolist(), found.extent) == ([0, 1, 2], 3)
    for wrong, counts in ((visual, [1, 2]), (visual[:4], [3])):
        with pytest.raises(InputError, match="no text"):
            places_of(wrong, positions[:, : len(wrong)], counts)
