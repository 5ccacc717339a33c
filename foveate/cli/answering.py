"""One question about one picture, with all visual tokens or with fewer, and what that cost."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..analysis.flops import prefill_flops
from ..errors import InputError, first_line
from ..methods.base import Method
from ..methods.baselines import Sequential
from ..report import Report

PLAIN_PROMPT = "USER: <image>\n{question} ASSISTANT:"


@dataclass(frozen=True)
class Answer:
    """What a model said, and what it cost.

    Attributes
    ----------
    text : the answer.
    visual_tokens : in the prompt.
    layers : visual tokens that each decoder layer runs.
    prefill : seconds, median of the runs.
    flops : of the decoder's prefill.
    report : of the run; None where all tokens were kept.
    """

    text: str
    visual_tokens: int
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


def make_inputs(processor: Any, model: Any, image: Image.Image, question: str) -> tuple[dict[str, Any], str | None]:
    """Inputs for one picture and one question, and a note where the model brings no chat template of its own."""
    token, note = getattr(processor, "image_token", None), None
    if token and token in question:
        raise InputError(f"the question holds {token!r}, which stands for the picture. Leave it out: the picture is put in front.")
    try:
        if getattr(processor, "chat_template", None):
            content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
            inputs = processor.apply_chat_template(
                [{"role": "user", "content": content}],
                add_generation_prompt=True,
                tokenize=True,  # by the template, which knows whether it writes the first token itself
                return_dict=True,
                return_tensors="pt",
            )
        else:
            note = "the processor has no chat template; the prompt of LLaVA-1.5 is used"
            inputs = processor(text=PLAIN_PROMPT.format(question=question), images=image, return_tensors="pt")
    except Exception as error:  # processors raise what their tokenizers and image processors make of it
        raise InputError(f"the processor of this model cannot use the picture and the question: {first_line(error)}") from error
    inputs = inputs.to(model.device)
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    return dict(inputs), note


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
    return Answer(text, sum(report.after), layers, statistics.median(prefills), flops, report if method else None)


def load_model(name: str | None) -> tuple[Any, Any]:
    """The pocket model, or any model of the Hub or a folder with its processor.

    Raises
    ------
    InputError : the model cannot be loaded; the message gives the reason.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from transformers.utils.import_utils import is_accelerate_available

    from ..pocket import load_pocket

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
