"""One question about one picture or video, with all visual tokens or with fewer, and what that cost."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from .analysis.flops import prefill_flops
from .engine.model.families import FAMILIES
from .errors import InputError, first_line
from .images import open_picture
from .methods.base import Method, get
from .methods.baselines import Sequential
from .report import Report
from .video import SUFFIXES, Video, open_video
from .viz.frames import by_frame, first_as_seen, frames_as_seen, save_strip
from .viz.overlay import save_figure

PLAIN_PROMPT = "USER: {shown}{question} ASSISTANT:"
FRAMES = 8  # of a video, as many as Video-LLaVA takes
AS_PICTURES = "this model takes no videos; the frames are given to it as pictures, in their order"


@dataclass(frozen=True)
class Answer:
    """What a model said, and what it cost.

    Attributes
    ----------
    text : the answer.
    visual_tokens : in the prompt.
    prompt : all tokens of it.
    layers : visual tokens that each decoder layer runs.
    prefill : seconds, median of the runs.
    flops : of the decoder's prefill.
    report : of the run; None where all tokens were kept.
    """

    text: str
    visual_tokens: int
    prompt: int
    layers: list[int]
    prefill: float
    flops: int
    report: Report | None

    @property
    def mean_tokens(self) -> float:
        """Visual tokens on average over decoder layers."""
        return statistics.fmean(self.layers)

    @property
    def shown_tokens(self) -> str:
        """Visual tokens in the prompt and, where they become fewer inside the decoder, from which layer on."""
        steps = [(layer, count) for layer, count in enumerate(self.layers) if layer and count != self.layers[layer - 1]]
        return ", ".join([str(self.visual_tokens), *(f"{count} from layer {layer}" for layer, count in steps)])


def open_shown(path: Path, frames: int | None) -> tuple[Image.Image | Video, list[str]]:
    """A picture, or ``frames`` of a video: where the name says that it is one, or where ``frames`` are asked for; and notes on it.

    Raises
    ------
    InputError : it cannot be read.
    MissingExtraError : it is a video, and PyAV is not installed.
    """
    if frames is None and path.suffix.lower() not in SUFFIXES:
        picture = open_picture(path)
        return picture.image, [*picture.notes]
    video = open_video(path, FRAMES if frames is None else frames)
    return video, [*video.notes]


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


def make_inputs(processor: Any, model: Any, shown: Image.Image | Video, question: str) -> tuple[dict[str, Any], str | None]:
    """Inputs for one picture or video and one question, and a note where the model brings no chat template of its own."""
    for token in media_words(processor):
        if token in question:
            raise InputError(
                f"the question holds {token!r}, which stands for the picture. Leave it out: the picture is put in front."
            )
    kind = "image"
    visuals: list[Any] = [shown]
    options: dict[str, Any] = {}
    if isinstance(shown, Video) and takes_videos(processor, model):
        frames = np.stack([np.asarray(frame) for frame in shown.frames])  # [F, H, W, 3]
        kind, visuals, options = "video", [frames], {"videos_kwargs": as_sampled(shown)}
    elif isinstance(shown, Video):
        visuals = [*shown.frames]
    try:
        with quiet_loading():  # what is too long for the model may fit once tokens are dropped
            inputs, note = _processed(processor, kind, visuals, question, options)
    except Exception as error:  # processors raise what their tokenizers and image processors make of it
        raise InputError(f"the processor of this model cannot use the picture and the question: {first_line(error)}") from error
    inputs = inputs.to(model.device)
    for name in inputs.keys() & {"pixel_values", "pixel_values_videos"}:
        inputs[name] = inputs[name].to(model.dtype)
    return dict(inputs), note


def _processed(processor: Any, kind: str, visuals: list[Any], question: str, options: dict[str, Any]) -> tuple[Any, str | None]:
    """What the processor makes of pictures or videos and a question, and a note."""
    if not getattr(processor, "chat_template", None):
        token = getattr(processor, f"{kind}_token", f"<{kind}>")
        text = PLAIN_PROMPT.format(shown=f"{token}\n" * len(visuals), question=question)
        inputs = processor(text=text, **{f"{kind}s": visuals}, **options, return_tensors="pt")
        return inputs, "the processor has no chat template; the prompt of LLaVA-1.5 is used"
    content = [*({"type": kind, kind: visual} for visual in visuals), {"type": "text", "text": question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,  # by the template, which knows whether it writes the first token itself
        return_dict=True,
        return_tensors="pt",
        processor_kwargs=options,
    )
    return inputs, None


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


def ask(
    model: Any, processor: Any, inputs: dict[str, Any], method: Method | None, *, new_tokens: int = 64, repeats: int = 1
) -> Answer:
    """Answer with the tokens a method leaves; None keeps all. ``repeats`` prefills are timed."""
    prefills = []
    with (method or Sequential(budget=1.0))(model) as session:
        for _ in range(repeats - 1):
            model.generate(**inputs, do_sample=False, max_new_tokens=1)
            prefills.append(session.report.seconds["prefill"])
        out = model.generate(**inputs, do_sample=False, max_new_tokens=new_tokens)
        report = session.report
    prefills.append(report.seconds["prefill"])
    prompt = inputs["input_ids"].shape[1]
    text = processor.decode(out[0, prompt:], skip_special_tokens=True).strip()
    layers = report.layers
    flops = prefill_flops(model.config, [prompt - sum(report.before) + count for count in layers])
    short = prompt - sum(report.before) + sum(report.after)
    return Answer(text, sum(report.after), short, layers, statistics.median(prefills), flops, report if method else None)


def frame_counts(video: Video, report: Report) -> list[dict[str, float]]:
    """When each frame is shown, and its visual tokens before and after; one entry for frames that the encoder puts together."""
    grids = by_frame(report.images, len(video.frames))
    every = -(-len(video.frames) // len(grids))
    return [
        {"seconds": second, "before": sum(grid.before for grid in group), "after": sum(grid.after for grid in group)}
        for second, group in zip(video.seconds[::every], grids, strict=True)
    ]


def limits(model: Any, answers: Mapping[str, Answer]) -> list[str]:
    """Notes about prompts that are longer than what the model was made for."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return [
        f"{title(name)}: the prompt has {answer.prompt} tokens, and the model was made for {longest}"
        for name, answer in answers.items()
        if longest and answer.prompt > longest
    ]


def title(name: str) -> str:
    """What a table calls an answer."""
    return "all tokens" if name == "full" else name


def save_kept(
    shown: Image.Image | Video, processor: Any, inputs: Mapping[str, Any], answers: Mapping[str, Answer], path: Path, title: str
) -> list[str]:
    """Save a picture of what each answer kept: panels of a picture, a strip of the frames of a video. Returns notes on it.

    Raises
    ------
    MissingExtraError : matplotlib is not installed.
    """
    reports = {name: answer.report.images for name, answer in answers.items() if answer.report}
    if isinstance(shown, Video):
        save_strip(frames_as_seen(inputs, processor, shown.frames), shown.seconds, reports, path, title)
        return []
    layers = {name: answer.layers for name, answer in answers.items()}
    first = {name: images[0] for name, images in reports.items()}
    save_figure(first_as_seen(inputs, processor, shown), first, path, title, layers)
    parts = max(map(len, reports.values()))
    return [f"the model reads the picture in {parts} parts; {path.name} shows the first of them"] if parts > 1 else []


def ask_all(
    model: Any, processor: Any, inputs: dict[str, Any], method: Method, *, new_tokens: int, compare: bool
) -> dict[str, Answer]:
    """The answer with a method, by its name.

    To compare, also "full" with all tokens, and "spatial" and "random" with as many as the method runs on average over decoder
    layers; each prefill is timed three times then.
    """
    repeats = 3 if compare else 1
    chosen = ask(model, processor, inputs, method, new_tokens=new_tokens, repeats=repeats)
    answers = {method.name: chosen}
    if compare:
        items = len(chosen.report.before) if chosen.report else 1
        others: dict[str, Method | None] = {"full": None}
        others |= {name: get(name, budget=max(1, round(chosen.mean_tokens / items))) for name in ("spatial", "random")}
        for name, other in others.items():
            if name not in answers:
                answers[name] = ask(model, processor, inputs, other, new_tokens=new_tokens, repeats=repeats)
    return answers


def load_model(name: str | None) -> tuple[Any, Any]:
    """The pocket model, or any model of the Hub or a folder with its processor.

    Raises
    ------
    InputError : the model cannot be loaded; the message gives the reason.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from transformers.utils.import_utils import is_accelerate_available

    from .pocket import load_pocket

    if name is None:
        with quiet_loading(bars=False):
            return load_pocket()
    if name.startswith((".", "/", "~")) and not Path(name).expanduser().exists():
        raise InputError(f"there is no folder {name}")
    gpu = torch.cuda.is_available()
    options: dict[str, Any] = {"device_map": "auto"} if gpu and is_accelerate_available() else {}
    try:
        with quiet_loading():
            loaded: Any = AutoModelForImageTextToText.from_pretrained(name, dtype="auto", output_loading_info=True, **options)
            processor = AutoProcessor.from_pretrained(name)
    except ImportError as error:
        raise InputError(f"the model {name!r} needs another library: {first_line(error).partition('. ')[0]}") from error
    except Exception as error:  # whatever a broken config, processor or weight file leads to
        raise InputError(f"the model {name!r} cannot be loaded: {first_line(error)}") from error
    model, found = loaded
    missing = sorted(found["missing_keys"])
    if missing:
        raise InputError(f"the model {name!r} is incomplete: {len(missing)} weights are missing, {missing[0]} for one")
    return (model if options or not gpu else model.to("cuda")).eval(), processor


@contextmanager
def quiet_loading(bars: bool = True) -> Iterator[None]:
    """Without the tables and retries that libraries report while they load, and without their progress ``bars`` if so wished.

    Errors still come.
    """
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    levels, shown = (logging.get_verbosity(), hub_logging.get_verbosity()), logging.is_progress_bar_enabled()
    if not bars:
        logging.disable_progress_bar()
    logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
        logging.set_verbosity(levels[0])
        hub_logging.set_verbosity(levels[1])
