"""What a benchmark asks, as a conversation of transformers; and batches of them, padded on the left."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..answering import PLAIN_PROMPT, as_sampled, media_words, quiet_loading, takes_videos
from ..errors import InputError, first_line
from ..fingerprint import digest
from ..images import as_rgb, open_picture
from ..loading import Loaded
from ..video import Video, open_video

OPTIONS = ("temperature", "top_p", "top_k", "num_beams", "repetition_penalty", "length_penalty", "do_sample")  # of generate
LONGEST = 1024  # new tokens where a task does not say, as lmms-eval has it


@dataclass(frozen=True)
class Prompt:
    """One question.

    Attributes
    ----------
    conversation : messages for a chat template.
    text : of all messages.
    images : of all messages, in order; the frames of videos, where the model takes none.
    videos : of all messages, in order.
    contents : a digest of everything that the answer depends on.
    """

    conversation: list[dict[str, Any]]
    text: str
    images: list[Image.Image]
    videos: list[Video]
    contents: str

    @property
    def shape(self) -> tuple[bool, bool]:
        """Prompts of one batch have the same."""
        return bool(self.images), bool(self.videos)


class Reader:
    """Makes prompts of the messages of lmms-eval.

    Parameters
    ----------
    loaded : the model that they are for.
    frames : of a video.
    """

    def __init__(self, loaded: Loaded, frames: int) -> None:
        self.frames, self.videos = frames, takes_videos(loaded.processor, loaded.model)
        self.placeholders = media_words(loaded.processor)

    def read(self, messages: Sequence[Mapping[str, Any]]) -> Prompt:
        """Open all pictures and videos of the messages.

        Raises
        ------
        InputError : a file cannot be read, there is sound, or a text holds a placeholder.
        """
        found, marks, texts = [], [], []
        images: list[Image.Image] = []
        videos: list[Video] = []
        for message in messages:
            parts: list[dict[str, Any]] = []
            for content in message["content"]:
                kind = content["type"]
                if kind == "text":
                    self._check_text(content["text"])
                    texts.append(content["text"])
                    parts.append({"type": "text", "text": content["text"]})
                elif kind == "image":
                    images.append(_picture(content["url"]))
                    parts.append({"type": "image", "image": images[-1]})
                elif kind == "video":
                    video = open_video(_path(content["url"]), self.frames)
                    if self.videos:
                        videos.append(video)
                        parts.append({"type": "video", "video": np.stack([np.asarray(frame) for frame in video.frames])})
                    else:
                        images += video.frames
                        parts += [{"type": "image", "image": frame} for frame in video.frames]
                else:
                    raise InputError(f"the task shows {kind}, and foveate takes pictures and videos. Choose another task.")
            found.append({"role": message["role"], "content": parts})
            marks.append(f"{message['role']} {[part['type'] for part in parts]}")
        shown = [image for video in videos for image in video.frames] + images
        pixels = [digest(str(image.size), image.tobytes()) for image in shown]
        return Prompt(found, "\n".join(texts), images, videos, digest(*marks, *texts, *pixels))

    def _check_text(self, text: str) -> None:
        for token in self.placeholders:
            if token in text:
                raise InputError(f"a question holds {token!r}, which stands for a picture in the prompts of this model: {text!r}")


def _picture(shown: Any) -> Image.Image:
    return as_rgb(shown) if isinstance(shown, Image.Image) else open_picture(_path(shown)).image


def _path(shown: Any) -> Path:
    if not isinstance(shown, str | os.PathLike):
        raise InputError(f"a task shows {type(shown).__name__} where the path of a picture or video was expected")
    return Path(shown)


def collate(loaded: Loaded, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Inputs of ``generate`` for prompts of the same ``shape``, padded on the left.

    Raises
    ------
    InputError : the processor cannot use them.
    """
    model, processor = loaded.model, loaded.processor
    options: dict[str, Any] = {"padding": True}
    videos = [video for prompt in prompts for video in prompt.videos]
    if videos:
        each = [as_sampled(video) for video in videos]
        options["videos_kwargs"] = each[0] | {"video_metadata": [data for video in each for data in video["video_metadata"]]}
    try:
        with quiet_loading():
            if getattr(processor, "chat_template", None):
                inputs = processor.apply_chat_template(
                    [prompt.conversation for prompt in prompts],
                    add_generation_prompt=True,
                    tokenize=True,
                    return_dict=True,
                    return_tensors="pt",
                    processor_kwargs=options,
                )
            else:
                inputs = _without_template(processor, prompts, options)
    except Exception as error:  # processors raise what their tokenizers and image processors make of it
        raise InputError(f"the processor of {loaded.name!r} cannot use a prompt: {first_line(error)}") from error
    inputs = inputs.to(model.device)
    for name in inputs.keys() & {"pixel_values", "pixel_values_videos"}:
        inputs[name] = inputs[name].to(model.dtype)
    return dict(inputs)


def _without_template(processor: Any, prompts: Sequence[Prompt], options: dict[str, Any]) -> Any:
    """Prompts of LLaVA-1.5, for processors that bring no chat template: all pictures, then the question."""
    if any(prompt.videos for prompt in prompts):
        raise InputError("a video needs a chat template. Save one with the processor.")
    token = getattr(processor, "image_token", "<image>")
    texts = [PLAIN_PROMPT.format(shown=f"{token}\n" * len(prompt.images), question=prompt.text) for prompt in prompts]
    images = [prompt.images for prompt in prompts] if prompts[0].images else None
    return processor(text=texts, images=images, return_tensors="pt", **options)


def generation(kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Options of ``generate`` from those of a task, and strings that end an answer.

    What other models of lmms-eval read there and ``generate`` does not know, such as ``image_aspect_ratio``, is left out.
    """
    options = {name: kwargs[name] for name in OPTIONS if kwargs.get(name) is not None}
    sampled = options.pop("do_sample", None)
    warm = (options.get("temperature") or 0) > 0
    options["do_sample"] = warm if sampled is None else bool(sampled) and warm
    if not options["do_sample"]:
        for name in ("temperature", "top_p", "top_k"):
            options[name] = None  # over what the model's own generation config says
    options["max_new_tokens"] = int(kwargs.get("max_new_tokens") or kwargs.get("max_gen_toks") or LONGEST)
    until = kwargs.get("until") or []
    return options, [until] if isinstance(until, str) else [*until]


def spent(report: Any, mask: torch.Tensor) -> list[tuple[int, int, list[int], int]]:
    """Per prompt of a batch: its pictures and videos, visual tokens before, visual tokens in each decoder layer, tokens of text.

    Parameters
    ----------
    report : of the call.
    mask : [B, S] of the prompts as they came.
    """
    found = []
    for row, length in enumerate(mask.sum(1).tolist()):
        mine = [number for number, of in enumerate(report.rows) if of == row]
        before = sum(report.before[number] for number in mine)
        layers = [sum(report.after[number] for number in mine)] * report.decoder_layers
        for cut in sorted(report.cuts, key=lambda cut: cut.layer):
            left = int((cut.image[row * report.copies] >= 0).sum())
            layers[cut.layer :] = [left] * (len(layers) - cut.layer)
        found.append((len(mine), before, layers, length - before))
    return found
