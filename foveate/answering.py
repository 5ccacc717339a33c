"""One question about one picture or video, with all visual tokens or with fewer, and what that cost."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from .analysis.flops import prefill_flops
from .engine.cache_size import cache_bytes
from .engine.model.seams import find_cache
from .errors import CacheError
from .images import open_picture
from .loading import Loaded
from .methods.base import KeepAll, Method
from .methods.registry import get
from .pocket.worlds import world_of
from .report import Report
from .video import SUFFIXES, Video, open_video
from .viz.frames import by_frame, first_as_seen, frames_as_seen, save_strip
from .viz.overlay import save_figure

FRAMES = 8  # of a video, as many as Video-LLaVA takes


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
    seconds : of all of ``generate``, from its call to the last token.
    cache : bytes of keys and values after the last token; None where the cache does not show them.
    report : of the run; None where all tokens were kept.
    """

    text: str
    visual_tokens: int
    prompt: int
    layers: list[int]
    prefill: float
    flops: int
    seconds: float
    cache: int | None
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


def ask(
    model: Any, processor: Any, inputs: dict[str, Any], method: Method | None, *, new_tokens: int = 64, repeats: int = 1
) -> Answer:
    """Answer with the tokens a method leaves; None keeps all. ``repeats`` prefills are timed."""
    prefills = []
    with (method or KeepAll())(model) as session:
        for _ in range(repeats - 1):
            model.generate(**inputs, do_sample=False, max_new_tokens=1)
            prefills.append(session.report.seconds["prefill"])
        begin = time.perf_counter()
        out = model.generate(**inputs, do_sample=False, max_new_tokens=new_tokens, return_dict_in_generate=True)
        ids = out.sequences[0].tolist()  # a GPU is waited for
        seconds, report = time.perf_counter() - begin, session.report
    prefills.append(report.seconds["prefill"])
    prompt = inputs["input_ids"].shape[1]
    text = processor.decode(ids[prompt:], skip_special_tokens=True).strip()
    layers = report.layers
    flops = prefill_flops(model.config, [prompt - sum(report.before) + count for count in layers])
    short = prompt - sum(report.before) + sum(report.after)
    costs = (statistics.median(prefills), flops, seconds, _held(out))
    return Answer(text, sum(report.after), short, layers, *costs, report if method else None)


def _held(out: Any) -> int | None:
    try:
        return sum(cache_bytes(find_cache(out)))
    except CacheError:
        return None


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


def unknown(loaded: Loaded, image: Image.Image, question: str) -> list[str]:
    """Notes about what a model of a pocket world cannot know: other pictures, and words that it never saw."""
    world = world_of(loaded.processor)
    if world is None:
        return []
    from .pocket.scenes import SIDE
    from .pocket.vocabulary import unknown_words

    notes, words = [], ", ".join(repr(word) for word in unknown_words(question, loaded.processor.tokenizer.get_vocab()))
    if world == "pocket" and image.size != (SIDE, SIDE):
        notes.append("the pocket model knows only its own drawn scenes (foveate demo saves some); use --model for photos")
    if words:
        notes.append(f"the pocket model has never seen {words}; ask as in 'what color is the star ?'")
    return notes


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
