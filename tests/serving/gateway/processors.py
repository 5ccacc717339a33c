"""Processors for the small random models of ``tests/families.py`` that a gateway can serve, with real image processors."""

from __future__ import annotations

from typing import Any

import transformers
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from foveate.loading import Loaded, prepared
from tests import families, zoo
from tests.family_prompts import BREAK, END, START, VIDEO

KINDS = ("llava", "vipllava", "llava_next", "llava_next_video", "llava_onevision", "video_llava", "internvl")
KINDS += ("qianfan_ocr", "lighton_ocr")
NAMED = {zoo.PAD: "<pad>", 1: "<s>", zoo.EOS: "</s>", zoo.IMAGE: "<image>", VIDEO: "<video>", START: "<img>", END: "</img>"}
NAMED |= {BREAK: "<break>"}
TEMPLATE = (
    "<s>{% for message in messages %} {{ message['role'] }} {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
)


def tokenizer() -> Any:
    vocabulary = {NAMED.get(number, f"w{number}"): number for number in range(zoo.VOCABULARY)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="w30"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s+"), "removed")
    extra = {"image_token": "<image>", "video_token": "<video>"}
    extra |= {"context_image_token": "<image>", "start_image_token": "<img>", "end_image_token": "</img>"}
    extra |= {"image_break_token": "<break>", "image_end_token": "</img>"}
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, extra_special_tokens=extra, **special, **extra)


def square(side: int) -> dict[str, Any]:
    pixels = side * zoo.PATCH
    return {"size": {"shortest_edge": pixels}, "crop_size": {"height": pixels, "width": pixels}}


def image_processor(kind: str) -> Any:
    match kind:
        case "llava" | "vipllava":
            return transformers.CLIPImageProcessorPil(**square(8 if kind == "llava" else 6))
        case "llava_next" | "llava_next_video":
            points = (families.NEXT if kind == "llava_next" else families.NEXT_VIDEO).pinpoints
            return transformers.LlavaNextImageProcessorPil(**square(6), image_grid_pinpoints=points)
        case "llava_onevision":
            side = {"height": 5 * zoo.PATCH, "width": 5 * zoo.PATCH}
            return transformers.LlavaOnevisionImageProcessorPil(size=side, image_grid_pinpoints=families.ONEVISION.pinpoints)
        case "video_llava":
            return transformers.VideoLlavaImageProcessor(**square(4))
        case "internvl" | "qianfan_ocr":
            side = {"height": 84, "width": 84}
            return transformers.GotOcr2ImageProcessorPil(size=side, crop_to_patches=True, min_patches=1, max_patches=4)
        case "lighton_ocr":
            return transformers.PixtralImageProcessorPil(size={"longest_edge": 168}, patch_size=28)
    raise KeyError(kind)


def without_videos(kind: type) -> Any:
    """A processor that also comes without a processor of videos, which needs torchvision."""

    def check(self: Any, name: str, given: Any) -> Any:
        return None if given is None else kind.check_argument_for_proper_class(self, name, given)

    return type(kind.__name__, (kind,), {"check_argument_for_proper_class": check})


def processor(kind: str) -> Any:
    images, words = image_processor(kind), tokenizer()
    match kind:
        case "llava" | "vipllava":
            return transformers.LlavaProcessor(images, words, zoo.PATCH, "default", TEMPLATE, num_additional_image_tokens=1)
        case "llava_next":
            return transformers.LlavaNextProcessor(images, words, zoo.PATCH, "default", TEMPLATE, num_additional_image_tokens=1)
        case "llava_next_video":
            made = without_videos(transformers.LlavaNextVideoProcessor)
            return made(None, images, words, TEMPLATE, zoo.PATCH, "default", num_additional_image_tokens=1)
        case "llava_onevision":
            return without_videos(transformers.LlavaOnevisionProcessor)(images, words, None, 25, "full", TEMPLATE)
        case "video_llava":
            return without_videos(transformers.VideoLlavaProcessor)(
                images, None, words, zoo.PATCH, "default", chat_template=TEMPLATE, num_additional_image_tokens=1
            )
        case "internvl":
            return without_videos(transformers.InternVLProcessor)(images, words, None, image_seq_length=9, chat_template=TEMPLATE)
        case "qianfan_ocr":
            return transformers.QianfanOCRProcessor(images, words, image_seq_length=9, chat_template=TEMPLATE)
        case "lighton_ocr":
            return transformers.LightOnOcrProcessor(images, words, zoo.PATCH, 2, chat_template=TEMPLATE)
    raise KeyError(kind)


def loaded(kind: str) -> Loaded:
    return prepared(kind, families.load(kind), processor(kind))
