"""What a benchmark asks, as a conversation of transformers; and batches of them, padded on the left."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..chat import Prompt, media_words, takes_videos, video_part
from ..errors import InputError
from ..fingerprint import digest
from ..images import as_rgb, open_picture
from ..loading import Loaded
from ..video import Video, open_video


class MessageReader:
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
                        parts.append(video_part(video))
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
