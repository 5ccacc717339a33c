"""The one builder of prompts: questions about pictures and videos as conversations, and batches of them, padded on the left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from .errors import InputError, first_line
from .families import FAMILIES
from .images import check_scaled
from .loading import Loaded, quiet_loading
from .video import Video

PLAIN_PROMPT = "USER: {shown}{question} ASSISTANT:"
NO_TEMPLATE = "the processor has no chat template; the prompt of LLaVA-1.5 is used"
AS_PICTURES = "this model takes no videos; the frames are given to it as pictures, in their order"
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
    contents : a digest of everything that the answer depends on, "" where nobody needs it.
    """

    conversation: list[dict[str, Any]]
    text: str
    images: list[Image.Image]
    videos: list[Video]
    contents: str = ""

    @property
    def shape(self) -> tuple[bool, bool]:
        """Prompts of one batch have the same."""
        return bool(self.images), bool(self.videos)


def takes_videos(processor: Any, model: Any) -> bool:
    """Whether a model reads a video as such, and the engine knows how; others read its frames as pictures."""
    family = FAMILIES.get(model.config.model_type)
    return family is not None and family.videos is not None and getattr(processor, "video_processor", None) is not None


def media_words(processor: Any) -> list[str]:
    """Words that stand for pictures and videos in prompts: what chat templates write, and what is there for each visual token."""
    names = ("image_token", "video_token")
    ids = (getattr(processor, f"{name}_id", None) for name in names)
    words = [getattr(processor, name, None) for name in names]
    words += [processor.tokenizer.convert_ids_to_tokens(number) for number in ids if isinstance(number, int)]
    return [*dict.fromkeys(word for word in words if isinstance(word, str))]


def video_part(video: Video) -> dict[str, Any]:
    """A video as a part of a message: its frames [F, H, W, 3]."""
    return {"type": "video", "video": np.stack([np.asarray(frame) for frame in video.frames])}


def question_about(processor: Any, model: Any, shown: Image.Image | Video, question: str) -> Prompt:
    """A question about one picture or video.

    Raises
    ------
    InputError : the question holds a word that stands for pictures.
    """
    for word in media_words(processor):
        if word in question:
            raise InputError(
                f"the question holds {word!r}, which stands for the picture. Leave it out: the picture is put in front."
            )
    images, videos = [shown] if isinstance(shown, Image.Image) else [*shown.frames], []
    if isinstance(shown, Video) and takes_videos(processor, model):
        images, videos = [], [shown]
    parts = [{"type": "image", "image": image} for image in images] + [video_part(video) for video in videos]
    return Prompt([{"role": "user", "content": [*parts, {"type": "text", "text": question}]}], question, images, videos)


def make_inputs(processor: Any, model: Any, shown: Image.Image | Video, question: str) -> tuple[dict[str, Any], str | None]:
    """Inputs for one picture or video and one question, and a note where the model brings no chat template of its own.

    Raises
    ------
    InputError : the processor cannot use them.
    """
    prompt = question_about(processor, model, shown, question)
    note = None if getattr(processor, "chat_template", None) else NO_TEMPLATE
    return _inputs(processor, model, [prompt], "the processor of this model cannot use the picture and the question"), note


def collate(loaded: Loaded, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Inputs of ``generate`` for prompts of the same ``shape``, padded on the left.

    Raises
    ------
    InputError : the processor cannot use them.
    """
    return _inputs(loaded.processor, loaded.model, prompts, f"the processor of {loaded.name!r} cannot use a prompt")


def _inputs(processor: Any, model: Any, prompts: Sequence[Prompt], failure: str) -> dict[str, Any]:
    """Inputs on the device and in the dtype of the model; ``failure`` is what to say where the processor raises."""
    for prompt in prompts:
        _check_sizes(processor, prompt)
    options: dict[str, Any] = {"padding": True} if len(prompts) > 1 else {}
    told = [as_sampled(video) for prompt in prompts for video in prompt.videos]
    if told:
        options["videos_kwargs"] = told[0] | {"video_metadata": [data for each in told for data in each["video_metadata"]]}
    try:
        with quiet_loading():  # what is too long for the model may fit once tokens are dropped
            if getattr(processor, "chat_template", None):
                inputs = processor.apply_chat_template(
                    [prompt.conversation for prompt in prompts],
                    add_generation_prompt=True,
                    tokenize=True,  # by the template, which knows whether it writes the first token itself
                    return_dict=True,
                    return_tensors="pt",
                    processor_kwargs=options,
                )
            else:
                inputs = _without_template(processor, prompts, options)
    except MemoryError:  # which is not the prompt's fault
        raise
    except Exception as error:  # processors raise what their tokenizers and image processors make of it
        raise InputError(f"{failure}: {first_line(error)}") from error
    inputs = inputs.to(model.device)
    for name in inputs.keys() & {"pixel_values", "pixel_values_videos"}:
        inputs[name] = inputs[name].to(model.dtype)
    return dict(inputs)


def _check_sizes(processor: Any, prompt: Prompt) -> None:
    """Refuse pictures and frames that the processor would blow up."""
    for number, image in enumerate(prompt.images, 1):
        check_scaled(image.size, f"picture {number}", getattr(processor, "image_processor", None), len(prompt.images) > 1)
    for number, video in enumerate(prompt.videos, 1):
        check_scaled(video.frames[0].size, f"a frame of video {number}", getattr(processor, "video_processor", None))


def _without_template(processor: Any, prompts: Sequence[Prompt], options: dict[str, Any]) -> Any:
    """Prompts of LLaVA-1.5, for processors that bring no chat template: all pictures or videos, then the question."""
    texts = []
    for prompt in prompts:
        words = [("image", len(prompt.images)), ("video", len(prompt.videos))]
        shown = "".join(f"{getattr(processor, f'{kind}_token', f'<{kind}>')}\n" * number for kind, number in words)
        texts.append(PLAIN_PROMPT.format(shown=shown, question=prompt.text))
    images, videos = [prompt.images for prompt in prompts], [video_part(v)["video"] for prompt in prompts for v in prompt.videos]
    visuals = ({"images": images} if prompts[0].images else {}) | ({"videos": videos} if videos else {})
    return processor(text=texts, **visuals, **options, return_tensors="pt")


def as_sampled(video: Video) -> dict[str, Any]:
    """Tells a processor that frames are chosen already, and when they are shown."""
    width, height = video.frames[0].size
    places = [round(second * video.fps) for second in video.seconds]  # where a steady rate would have put them
    metadata = {
        "total_num_frames": max(round(video.duration * video.fps), 1),
        "fps": video.fps or None,
        "duration": video.duration,
        "height": height,
        "width": width,
        "frames_indices": places,
    }
    return {"video_metadata": [metadata], "do_sample_frames": False}


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
