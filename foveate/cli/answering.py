"""One question about one picture, with all visual tokens or with fewer, and what that cost."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from ..analysis.flops import prefill_flops
from ..errors import InputError
from ..methods.base import TokenReducer
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
    prefill : seconds, median of the runs.
    flops : of the decoder's prefill.
    report : of the run; None where all tokens were kept.
    """

    text: str
    visual_tokens: int
    prefill: float
    flops: int
    report: Report | None


def make_inputs(processor: Any, model: Any, image: Image.Image, question: str) -> tuple[dict[str, Any], str | None]:
    """Inputs for one picture and one question, and a note where the model brings no chat template of its own."""
    note = None
    if getattr(processor, "chat_template", None):
        chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
        text = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    else:
        text, note = PLAIN_PROMPT.format(question=question), "the processor has no chat template; the prompt of LLaVA-1.5 is used"
    inputs = processor(text=text, images=image, return_tensors="pt").to(model.device)
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    return dict(inputs), note


def ask(
    model: Any, processor: Any, inputs: dict[str, Any], method: TokenReducer | None, *, new_tokens: int = 64, repeats: int = 1
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
    short = prompt - sum(report.before) + sum(report.after)
    flops = prefill_flops(model.config, short)
    return Answer(text, sum(report.after), statistics.median(prefills), flops, report if method else None)


def load_model(name: str | None) -> tuple[Any, Any]:
    """The pocket model, or any model of the Hub or a folder with its processor.

    Raises
    ------
    InputError : the model cannot be loaded; the message gives the reason.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from ..pocket import load_pocket

    if name is None:
        return load_pocket()
    try:
        options: dict[str, Any] = {"device_map": "auto"} if torch.cuda.is_available() else {}
        model = AutoModelForImageTextToText.from_pretrained(name, dtype="auto", **options).eval()
        return model, AutoProcessor.from_pretrained(name)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"the model {name!r} cannot be loaded: {reason}") from error
