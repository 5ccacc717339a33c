"""Models that write text between the visual tokens of a picture: no chat template, and the answers of transformers in a batch."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import pytest
from PIL import Image
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import AyaVisionProcessor, Idefics3Processor, PixtralProcessor, PreTrainedTokenizerFast
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

from foveate.pocket.scenes import draw_scene
from foveate.serving.batch.engines import TransformersEngine
from foveate.serving.batch.rows import AnswerSettings, Source
from foveate.serving.batch.vllm_engine import VllmEngine
from foveate.serving.export import described, export
from tests import families, zoo

from .asked import QUESTIONS, alone, written

SIDE = 84  # pixels of a tile
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}PICTURE{% else %}{{ content['text'] }}{% endif %} {% endfor %}{% endfor %}assistant:"
)
FRAMES = {  # the placeholder, and what stands around and between those of a picture
    "mistral3": ("[IMG]", ["[IMG_BREAK]", "[IMG_END]"]),
    "idefics3": (
        "<image>",
        [
            *("<fake_token_around_image>", "<global-img>", "<end_of_utterance>"),
            *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
        ],
    ),
    "aya_vision": (
        "<|IMG_PATCH|>",
        ["<image>", "<|START_OF_IMG|>", "<|END_OF_IMG|>", "TILE_GLOBAL", *(f"TILE_{number}" for number in range(1, 7))],
    ),
}


def tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """Of words, with the placeholder at the id that the small models have."""
    placeholder, around = FRAMES[kind]
    words = ["<pad>", "<s>", "</s>", "<unk>", "user:", placeholder, "assistant:", *around]
    words += [word for word in dict.fromkeys(" ".join(QUESTIONS).split()) if word not in words]
    assert words[zoo.IMAGE] == placeholder
    assert len(words) <= zoo.VOCABULARY
    found = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    found.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    found.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in (*words[:4], placeholder, *around)])
    return PreTrainedTokenizerFast(tokenizer_object=found, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>")


def processor(kind: str) -> Any:
    own = tokenizer(kind)
    template = TEMPLATE.replace("PICTURE", "[IMG]" if kind == "mistral3" else "<image>")
    if kind == "mistral3":
        pixels = PixtralImageProcessorPil(size={"longest_edge": 2 * SIDE}, patch_size={"height": 14, "width": 14})
        return PixtralProcessor(pixels, own, patch_size=14, spatial_merge_size=2, chat_template=template)
    if kind == "idefics3":
        tiles = Idefics3ImageProcessorPil(size={"longest_edge": 2 * SIDE}, max_image_size={"longest_edge": SIDE})
        return Idefics3Processor(tiles, own, image_seq_len=9, chat_template=template)
    side = 6 * zoo.PATCH
    square = {"height": side, "width": side}
    crops = GotOcr2ImageProcessorPil(size=square, crop_to_patches=True, max_patches=4)
    return AyaVisionProcessor(crops, own, patch_size=zoo.PATCH, img_size=side, downsample_factor=2, chat_template=template)


@pytest.fixture(scope="module", params=sorted(FRAMES))
def folder(request: pytest.FixtureRequest) -> Path:
    found = families.saved(request.param)
    try:
        processor(request.param).save_pretrained(found)
    except ImportError as error:  # Pixtral's wants torchvision, whose wheel does not load beside a torch for CPUs
        pytest.skip(str(error).strip().splitlines()[0])
    return found


def test_a_batch_with_vllm(vllm: Any, folder: Path, tmp_path: Path) -> None:
    """Whole, with two methods, two pictures, and without pictures; pictures of several shapes."""
    export(str(folder), tmp_path / "text")
    told = described(tmp_path / "text")
    assert "foveate batch" in told.no_chat
    assert told.logit_difference == 0
    for number, size in enumerate([(192, 192), (192, 96), (100, 180)]):
        scene = draw_scene(Random(number)).image
        Image.fromarray(scene).resize(size).save(tmp_path / f"{number}.png")
    documents: list[dict[str, Any]] = [{"id": f"p{n}", "image": f"{n}.png", "question": QUESTIONS[n]} for n in range(3)]
    documents += [
        {"id": "full", "image": "1.png", "question": QUESTIONS[0], "method": "full"},
        {"id": "two", "images": ["1.png", "2.png"], "question": QUESTIONS[1]},
        {"id": "spatial", "images": ["0.png", "1.png"], "question": QUESTIONS[2], "method": "spatial", "budget": 4},
        {"id": "text", "question": QUESTIONS[0]},
    ]
    source, wanted = Source(written(tmp_path, documents)), AnswerSettings("divprune", 0.5, max_new_tokens=8)
    expected = alone(TransformersEngine(str(folder), wanted), source, wanted)
    assert not [row for row in expected.values() if "error" in row], expected
    found = alone(VllmEngine(str(folder), wanted, tmp_path / "text"), source, wanted)
    assert found == expected
    kept = {name: [picture["visual_tokens"] for picture in row["usage"]["pictures"]] for name, row in found.items()}
    before = {name: [picture["visual_tokens_before"] for picture in row["usage"]["pictures"]] for name, row in found.items()}
    assert kept["full"] == before["full"]
    assert sum(kept["two"]) < sum(before["two"])
    assert kept["text"] == []
    assert len({row["answer"] for row in found.values()}) > 3


def test_words_of_visual_tokens_are_refused(folder: Path, tmp_path: Path) -> None:
    """Both the one that templates write for a picture, and the one that becomes visual tokens."""
    placeholder, around = FRAMES[folder.name]
    words = [placeholder, *(word for word in around if word == "<image>")]
    rows = [{"id": word, "image": "0.png", "question": f"what is {word} ?"} for word in words]
    Image.new("RGB", (90, 90)).save(tmp_path / "0.png")
    wanted = AnswerSettings("divprune", 0.5)
    found = alone(TransformersEngine(str(folder), wanted), Source(written(tmp_path, rows)), wanted)
    assert all(repr(word) in found[word]["error"]["message"] for word in words)
