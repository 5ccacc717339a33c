"""What an export writes of conversations is compared with what the processor of the model writes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors import FoveateError, first_line
from .template import collapsed


class ExportError(FoveateError):
    """A language model cannot be taken out of its vision-language model, or does not do there what it did in it."""


CONVERSATIONS: tuple[tuple[tuple[str, str], ...], ...] = (
    (("user", "what is this ?"),),
    (("user", "# what is this ?"),),
    (("user", "what is # this ?"),),
    (("user", "# and # : is there a star ?"),),
    (("system", "answer in a word"), ("user", "# what is this ?")),
    (("user", "# what is this ?"), ("assistant", "a red star"), ("user", "# and this ?")),
)


def check_conversations(processor: Any, folder: Path, shown: dict[str, Any]) -> int:
    """Compare, for a few conversations, what the written template and tokenizer give with what the processor gives.

    Parameters
    ----------
    processor : of the model.
    folder : what was written.
    shown : the part of a message that stands for a picture there.

    Returns
    -------
    How many were compared: templates may refuse some roles.

    Raises
    ------
    ExportError : one differs, or all are refused.
    """
    from transformers import AutoTokenizer

    tokenizer, picture = AutoTokenizer.from_pretrained(folder), Image.new("RGB", (336, 224), (90, 120, 200))
    compared = 0
    for conversation in CONVERSATIONS:
        try:
            ids = collapsed(processor, _messages(conversation, {"type": "image", "image": picture}))
        except Exception as error:  # a template says with an error of its own that it does not take a role, or several pictures
            if len(conversation) == 1 and conversation[0][1].count("#") < 2:
                raise ExportError(f"the processor cannot make a prompt of one picture: {first_line(error)}") from error
            continue
        written: Any = tokenizer.apply_chat_template(_messages(conversation, shown), add_generation_prompt=True, tokenize=True)
        written = written["input_ids"]
        if written != ids:
            raise ExportError(
                f"the written chat template gives other tokens than the processor for {conversation}: "
                f"{tokenizer.decode(written)!r} instead of {tokenizer.decode(ids)!r}"
            )
        compared += 1
    return compared


def _messages(conversation: Sequence[tuple[str, str]], picture: dict[str, Any]) -> list[dict[str, Any]]:
    """A conversation for chat templates; # stands for a picture."""
    found = []
    for role, said in conversation:
        texts = said.split("#")
        parts: list[dict[str, Any]] = []
        for number, text in enumerate(texts):
            parts += [picture] if number else []
            parts += [{"type": "text", "text": text.strip()}] if text.strip() else []
        found.append({"role": role, "content": parts})
    return found
